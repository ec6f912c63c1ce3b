import math
import random

import pytest
import torch

from redi.attention import cached_attention
from redi.evaluation import generation
from redi.evaluation.generation import Request, generate
from redi.evaluation.sampling import sample_key
from redi.hub.config import parse_config
from redi.model import CausalLM
from tests.tiny import all_logits


def tiny_model(vocab_size=61, seed=0, **changes):
    config = {
        "model_type": "qwen2", "vocab_size": vocab_size, "hidden_size": 36, "intermediate_size": 52,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 4096, "tie_word_embeddings": True,
    }  # fmt: skip
    model = CausalLM(parse_config({**config, **changes}))
    model.init_weights(seed, std=0.3)  # far from uniform, so that samples are sensitive to what the model sees
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))
    return model


def full_logits(model, ids):
    """Logits at every position of one sequence, without a cache. (T, V)"""
    return all_logits(model, torch.tensor([*ids, 0]))


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
    keys, values = torch.randn(n, slots, kv_heads, size), torch.randn(n, slots, kv_heads, size)
    out = cached_attention(q, keys, values, lengths)
    for i, length in enumerate(lengths):
        for h in range(heads):
            k, v = keys[i, :length, h // 3], values[i, :length, h // 3]
            weights = torch.softmax(k @ q[i, h] / math.sqrt(size), dim=0)
            torch.testing.assert_close(out[i, h], weights @ v)


@pytest.mark.parametrize("block", [8, 1024])
def test_decoding_with_a_cache_equals_the_full_forward(monkeypatch, block):
    """Every step's logits, with rows of different lengths, rows replaced, and the cache growing on the way."""
    monkeypatch.setattr(generation, "CACHE_BLOCK", block)
    model, requests = tiny_model(), make_requests()
    seen, compared = {}, 0
    original = generation.sample

    def recording(logits, keys, positions, *rest):
        for i, (key, position) in enumerate(zip(keys, positions)):
            seen[key, position] = logits[i].clone()
        return original(logits, keys, positions, *rest)

    monkeypatch.setattr(generation, "sample", recording)
    for index, ids, _ in generate(model, requests, stop_ids=(5,), max_batch_size=6):
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
    finished = list(generate(model, requests, stop_ids=(5, 6), max_batch_size=7))
    assert sorted(index for index, *_ in finished) == list(range(len(requests)))
    assert {reason for *_, reason in finished} == {"stop", "length"}
    for index, ids, reason in finished:
        assert not {5, 6} & set(ids[:-1])
        assert len(ids) <= requests[index].max_new_tokens
        assert reason == ("stop" if ids[-1] in (5, 6) else "length")
        assert reason == "stop" or len(ids) == requests[index].max_new_tokens


@pytest.mark.parametrize("vocab_size, tile", [(61, 16), (1000, 16), (61, 24)])
def test_samples_do_not_depend_on_order_rows_or_company(vocab_size, tile):
    model, requests = tiny_model(vocab_size), make_requests(vocab_size=vocab_size)

    def draw(order, rows):
        samples = generate(model, [requests[j] for j in order], (5,), max_batch_size=rows, tile=tile)
        return {order[i]: (ids, reason) for i, ids, reason in samples}

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
    for done, _ in enumerate(generate(tiny_model(), stream, (), max_batch_size=3)):
        assert len(taken) <= done + 1 + 3
    assert prefills == [request.prompt_ids for request in requests[::4]]


def test_every_token_is_counted_while_it_is_drawn():
    counts, requests, total = [], make_requests(count=6, samples=2, longest=9), 0
    for _, ids, _ in generate(tiny_model(), requests, (5,), max_batch_size=3, on_tokens=counts.append):
        total += len(ids)
        assert sum(counts) >= total  # told before the sample was finished
    assert sum(counts) == total and max(counts) == 3


def test_cache_follows_the_lengths_that_occur(monkeypatch):
    capacities = []
    original = generation.KVCache.decode

    def recording(self, *args):
        capacities.append(self.layers[0][0].shape[1])
        return original(self, *args)

    monkeypatch.setattr(generation.KVCache, "decode", recording)
    model = tiny_model()
    list(generate(model, [Request([1, 2, 3], 0, 32768)], range(60)))  # the limit is far, the end is near
    assert set(capacities) <= {1024}
    monkeypatch.setattr(generation, "CACHE_BLOCK", 16)
    capacities.clear()
    list(generate(model, [Request([1, 2, 3], 0, 100)], ()))
    # It grows by a quarter and more, but not past the 3 + 100 - 1 slots that the request can need: 7 blocks.
    assert capacities[0] == 16 and capacities[-1] == 112 and len(set(capacities)) > 3


def test_bf16_model_samples():
    model = tiny_model().to(torch.bfloat16)
    assert len(list(generate(model, make_requests(count=3), (5,)))) == 9


def test_long_prompts_attend_to_everything_before():
    """A prompt longer than the first block: writing it makes the cache grow while another row is active."""
    model = tiny_model()
    rng = random.Random(0)
    short, long = [7, 8], [rng.randrange(61) for _ in range(1500)]
    requests = [Request(short, 1, 30), Request(long, 2, 30)]
    for index, ids, _ in generate(model, requests, (), temperature=0):
        logits = full_logits(model, requests[index].prompt_ids + ids)[-len(ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == ids
