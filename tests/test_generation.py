import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from redi import generation
from redi.attention import cached_attention, packed_attention
from redi.generation import Request, generate, in_nucleus, sample, sample_key, uniform
from redi.model import CausalLM, ModelConfig


def tiny_model(vocab_size=61, seed=0, **changes):
    config = {
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": 36,
        "intermediate_size": 52,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    model = CausalLM(ModelConfig.from_dict({**config, **changes}))
    model.init_weights(seed, std=0.3)  # far from uniform, so that samples are sensitive to what the model sees
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def full_logits(model, ids):
    """Logits at every position of one sequence, without a cache. (T, V)"""
    cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
    attend = lambda layer, q, k, v: packed_attention(q, k, v, cu_seqlens, len(ids))  # noqa: E731
    return model.logits(model.hidden(torch.tensor(ids), torch.arange(len(ids)), attend))


def make_requests(count=23, samples=3, vocab_size=61, seed=0, longest=40):
    rng = random.Random(seed)
    requests = []
    for i in range(count):
        prompt_ids = [rng.randrange(vocab_size) for _ in range(rng.choice((1, 2, 7, 30)))]
        for k in range(samples):
            requests.append(Request(prompt_ids, sample_key(seed, f"p{i}", k), rng.randint(1, longest)))
    return requests


def test_cached_attention_equals_attention_over_each_row_alone():
    torch.manual_seed(0)
    n, heads, kv_heads, slots, size = 5, 6, 2, 13, 7
    lengths = torch.tensor([1, 13, 4, 8, 2])
    q = torch.randn(n, heads, size)
    keys, values = torch.randn(n, kv_heads, slots, size), torch.randn(n, kv_heads, slots, size)
    out = cached_attention(q, keys, values, lengths)
    for i, length in enumerate(lengths):
        for h in range(heads):
            k, v = keys[i, h // 3, :length], values[i, h // 3, :length]
            weights = torch.softmax(k @ q[i, h] / math.sqrt(size), dim=0)
            torch.testing.assert_close(out[i, h], weights @ v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares the CUDA back-end with the CPU one: no GPU here")
def test_cached_attention_is_the_same_on_cuda():
    torch.manual_seed(0)
    lengths = torch.tensor([1, 300, 64, 2])
    q, keys, values = torch.randn(4, 12, 128), torch.randn(4, 2, 512, 128), torch.randn(4, 2, 512, 128)
    expected = cached_attention(q, keys, values, lengths)
    for dtype, atol in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        inputs = (x.to("cuda", dtype) for x in (q, keys, values))
        out = cached_attention(*inputs, lengths.cuda())
        torch.testing.assert_close(out.float().cpu(), expected, atol=atol, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs: no GPU here")
def test_decoding_by_cuda_graph_gives_the_greedy_ids_of_the_cpu(monkeypatch):
    monkeypatch.setattr(generation, "CACHE_BLOCK", 8)
    model, requests = tiny_model(), make_requests(count=7, samples=1)
    expected = sorted(generate(model, requests, (), temperature=0))
    assert sorted(generate(model.cuda(), requests, (), temperature=0, rows=4)) == expected


@pytest.mark.parametrize("block", [8, 1024])
def test_decoding_with_a_cache_equals_the_full_forward(monkeypatch, block):
    """Every step's logits, with rows of different lengths, rows replaced, and the cache growing on the
    way."""
    monkeypatch.setattr(generation, "CACHE_BLOCK", block)
    model, requests = tiny_model(), make_requests()
    seen, compared = {}, 0
    original = generation.sample

    def recording(logits, keys, positions, *rest):
        for i, (key, position) in enumerate(zip(keys, positions)):
            seen[key, position] = logits[i].clone()
        return original(logits, keys, positions, *rest)

    monkeypatch.setattr(generation, "sample", recording)
    for index, ids, _ in generate(model, requests, stop_ids=(5,), rows=6):
        request = requests[index]
        expected = full_logits(model, request.prompt_ids + ids)
        for j in range(len(ids)):
            position = len(request.prompt_ids) + j
            torch.testing.assert_close(seen[request.key, position], expected[position - 1], atol=1e-4, rtol=0)
            compared += 1
    assert compared == sum(1 for _ in seen) > 500


def test_greedy_is_the_likeliest_token_each_time():
    model, prompt_ids = tiny_model(), [3, 1, 4]
    [(index, ids, reason)] = generate(model, [Request(prompt_ids, 0, 12)], (), temperature=0)
    expected = list(prompt_ids)
    for _ in range(12):
        expected.append(int(full_logits(model, expected)[-1].argmax()))
    assert (index, ids, reason) == (0, expected[3:], "length")


def test_stop_ids_and_limits():
    model, requests = tiny_model(), make_requests(count=40, samples=2)
    finished = list(generate(model, requests, stop_ids=(5, 6), rows=7))
    assert sorted(index for index, *_ in finished) == list(range(len(requests)))
    assert {reason for *_, reason in finished} == {"stop", "length"}
    for index, ids, reason in finished:
        assert not {5, 6} & set(ids[:-1])
        assert len(ids) <= requests[index].max_new_tokens
        assert reason == ("stop" if ids[-1] in (5, 6) else "length")
        assert reason == "stop" or len(ids) == requests[index].max_new_tokens


@pytest.mark.parametrize("vocab_size", [61, 1000])
def test_samples_do_not_depend_on_order_rows_or_company(vocab_size):
    model, requests = tiny_model(vocab_size), make_requests(vocab_size=vocab_size)

    def draw(order, rows):
        return {order[i]: (ids, reason) for i, ids, reason in generate(model, [requests[j] for j in order], (5,), rows=rows)}

    everything = draw(range(len(requests)), 16)
    assert len({tuple(ids) for ids, _ in everything.values()}) > 60  # the k samples of a prompt differ
    rng = random.Random(1)
    for rows in (1, 5, 16, 33, 100):
        order = rng.sample(range(len(requests)), len(requests))
        assert draw(order, rows) == everything
    part = rng.sample(range(len(requests)), 9)  # as after an interruption, or on one of several ranks
    assert draw(part, 16) == {i: everything[i] for i in part}


def test_a_prompt_is_computed_once_for_its_samples_and_requests_are_taken_as_rows_become_free(monkeypatch):
    prefills, taken = [], []
    original = generation._prefill
    monkeypatch.setattr(generation, "_prefill", lambda model, ids: prefills.append(ids) or original(model, ids))
    requests = make_requests(count=6, samples=4)
    stream = (taken.append(i) or request for i, request in enumerate(requests))
    for done, _ in enumerate(generate(tiny_model(), stream, (), rows=3)):
        assert len(taken) <= done + 1 + 3
    assert prefills == [request.prompt_ids for request in requests[::4]]


def test_cache_follows_the_lengths_that_occur(monkeypatch):
    capacities = []
    original = generation.KVCache.decode
    monkeypatch.setattr(
        generation.KVCache, "decode", lambda self, *a: capacities.append(self.layers[0][0].shape[2]) or original(self, *a)
    )
    model = tiny_model()
    list(generate(model, [Request([1, 2, 3], 0, 32768)], range(60)))  # the limit is far, the end is near
    assert set(capacities) <= {1024}
    monkeypatch.setattr(generation, "CACHE_BLOCK", 16)
    capacities.clear()
    list(generate(model, [Request([1, 2, 3], 0, 100)], ()))
    assert capacities[0] == 16 and capacities[-1] <= 144 and len(set(capacities)) > 3


def nucleus_by_sorting(probs, top_p):
    """The definition: tokens in descending order are kept while the mass before them is below top_p."""
    kept, mass = set(), 0.0
    for prob, token in sorted(((p, i) for i, p in enumerate(probs.tolist())), reverse=True):
        if mass >= top_p:
            break
        kept.add(token)
        mass += prob
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 0.999, 1.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_kept_set_is_that_of_the_sorted_definition(top_p, scale):
    logits = torch.randn(3, 997, generator=torch.Generator().manual_seed(0)) * scale
    probs = torch.softmax(logits, -1)
    padded = torch.nn.functional.pad(probs, (0, 27))
    limits = top_p * probs.sum(-1, keepdim=True, dtype=torch.float64)
    for i in range(3):
        expected = nucleus_by_sorting(probs[i].double() / probs[i].double().sum(), top_p)
        tokens = torch.arange(997)[:, None]
        kept = in_nucleus(padded[i].expand(997, -1), tokens, limits[i].expand(997, 1))
        differing = set(kept[:, 0].nonzero()[:, 0].tolist()) ^ expected
        assert sum(float(probs[i, token]) for token in differing) <= 1e-6


def test_ties_at_the_border_are_kept_together():
    probs = torch.zeros(1, 128)
    probs[0, :4] = torch.tensor([0.4, 0.2, 0.2, 0.2])
    kept = [bool(in_nucleus(probs, torch.tensor([[i]]), torch.tensor([[0.5]]))) for i in range(4)]
    assert kept == [True] * 4
    kept = [bool(in_nucleus(probs, torch.tensor([[i]]), torch.tensor([[0.4]]).double())) for i in range(4)]
    assert kept == [True, False, False, False]  # mass before: 0, 0.4, 0.4, 0.4


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 1.0])
def test_frequencies_are_those_of_the_truncated_distribution(top_p):
    n, temperature = 40_000, 0.7
    logits = torch.tensor([1.5, 0.3, -0.2, 1.1, -3.0, 0.9, -0.9])
    probs = torch.softmax(logits / temperature, -1)
    kept = nucleus_by_sorting(probs, top_p)
    expected = torch.tensor([float(p) if i in kept else 0.0 for i, p in enumerate(probs)])
    expected /= expected.sum()
    keys = [sample_key(7, "problem", k) for k in range(n)]
    tokens = torch.tensor(sample(logits.expand(n, -1), keys, [11] * n, temperature, top_p))
    found = torch.bincount(tokens, minlength=7) / n
    assert found[expected == 0].sum() == 0
    error = (expected * (1 - expected) / n).sqrt()
    assert ((found - expected).abs() <= 4.5 * error).all()


@pytest.mark.parametrize("vocab_size", [1, 127, 128, 1000])
def test_drawing_is_the_inverse_of_the_distribution_function(vocab_size):
    """The token in whose share of [0, total) the number falls, in the vocabulary's order, by exact fractions;
    also with tokens of no weight at either end of a block."""
    rng = random.Random(0)
    weights = [rng.choice((0, 1, 2, 3, 50)) for _ in range(vocab_size - 1)] + [1]
    if vocab_size == 1000:
        weights[100:300] = [0] * 200
    total = sum(weights)
    numbers = [i / 2**20 for i in (0, 2**20 - 1)] + [rng.random() for _ in range(300)]
    expected = []
    for number in numbers:
        sums = itertools.accumulate(weights)
        expected.append(next(i for i, value in enumerate(sums) if value > Fraction(number) * total))
    padded = torch.tensor(weights + [0] * (-vocab_size % 128), dtype=torch.float32).expand(len(numbers), -1).contiguous()
    noise = torch.tensor(numbers, dtype=torch.float64)[:, None]
    assert generation._draw(padded, noise)[:, 0].tolist() == expected
    assert all(weights[token] for token in generation._draw(padded / 3.7, noise)[:, 0].tolist())


def test_sampling_draws_by_temperature_first():
    logits = torch.tensor([[2.0, 1.0, 0.0]])  # at temperature 0.1 the first token has all of the mass but 5e-5
    assert {sample(logits, [sample_key(0, "a", k)], [0], 0.1, 0.95)[0] for k in range(300)} == {0}
    assert {sample(logits, [sample_key(0, "a", k)], [0], 10.0, 0.95)[0] for k in range(300)} == {0, 1, 2}


def test_logits_that_are_not_finite_are_refused():
    for temperature, value in itertools.product((0, 0.6), (math.nan, math.inf)):
        logits = torch.zeros(2, 9)
        logits[1, 4] = value
        with pytest.raises(ValueError, match="not finite"):
            sample(logits, [1, 2], [0, 0], temperature, 0.95)
    assert sample(torch.tensor([[0.0, -math.inf]]), [1], [0], 0.6, 1.0) == [0]  # a banned token is no error


def test_random_numbers_are_those_written_down():
    """Samples drawn long ago must come out again, so the numbers behind them may not change. For key 0: the
    first outputs of splitmix64's reference implementation with seed 0."""
    published = (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F)
    assert [uniform(0, 0, attempt) for attempt in range(3)] == [(z >> 16) / 2**48 for z in published]
    key = sample_key(0, "math500-0", 0)
    assert (key, uniform(key, 5, 1)) == (0xA92934867E7A2007, 0.6438954833574542)


def test_random_numbers_are_uniform_and_unrelated():
    keys = [sample_key(seed, id, k) for seed in (0, 1) for id in ("1", "11", "a") for k in (0, 1, 11)]
    assert len(set(keys)) == len(keys)
    numbers = torch.tensor([[uniform(key, position) for position in range(4000)] for key in keys], dtype=torch.float64)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = torch.histc(numbers.float(), 20, 0, 1)
    assert ((counts - numbers.numel() / 20) ** 2 / (numbers.numel() / 20)).sum() < 45  # chi-square, 19 degrees: p 0.0007
    correlation = torch.corrcoef(numbers) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)
    lagged = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))
    assert abs(lagged[0, 1]) < 4.5 / math.sqrt(numbers.numel())
    attempts = torch.tensor([[uniform(key, 3, attempt) for attempt in range(2)] for key in range(4000)])
    assert abs(torch.corrcoef(attempts.T)[0, 1]) < 4.5 / math.sqrt(4000)


def test_bf16_model_samples():
    model = tiny_model().to(torch.bfloat16)
    assert len(list(generate(model, make_requests(count=3), (5,)))) == 9


def test_long_prompts_attend_to_everything_before():
    """A prompt longer than the first block, so that writing it makes the cache grow while another row is
    active."""
    model = tiny_model()
    rng = random.Random(0)
    short, long = [7, 8], [rng.randrange(61) for _ in range(1500)]
    requests = [Request(short, 1, 30), Request(long, 2, 30)]
    for index, ids, _ in generate(model, requests, (), temperature=0):
        logits = full_logits(model, requests[index].prompt_ids + ids)[-len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids
