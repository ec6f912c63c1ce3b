import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from redi.evaluation import sampling
from redi.evaluation.sampling import in_nucleus, sample, sample_key, uniform


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
    padded = torch.tensor(weights + [0] * (-vocab_size % 128), dtype=torch.float32)
    padded = padded.expand(len(numbers), -1).contiguous()
    noise = torch.tensor(numbers, dtype=torch.float64)[:, None]
    scaled = padded / 3.7
    assert sampling._draw(padded, sampling._masses(padded), noise)[:, 0].tolist() == expected
    assert all(weights[token] for token in sampling._draw(scaled, sampling._masses(scaled), noise)[:, 0].tolist())


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
    expected = numbers.numel() / 20
    assert ((counts - expected) ** 2 / expected).sum() < 45  # chi-square, 19 degrees of freedom: p 0.0007
    correlation = torch.corrcoef(numbers) - torch.eye(len(keys), dtype=torch.float64)
    assert correlation.abs().max() < 4.5 / math.sqrt(4000)
    lagged = torch.corrcoef(torch.stack([numbers[:, :-1].flatten(), numbers[:, 1:].flatten()]))
    assert abs(lagged[0, 1]) < 4.5 / math.sqrt(numbers.numel())
    attempts = torch.tensor([[uniform(key, 3, attempt) for attempt in range(2)] for key in range(4000)])
    assert abs(torch.corrcoef(attempts.T)[0, 1]) < 4.5 / math.sqrt(4000)
