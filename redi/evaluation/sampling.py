"""Sampling a token from logits: temperature, top-p, and random numbers that depend only on the sample. Torch only."""

import hashlib
from itertools import count

import torch
import torch.nn.functional as F

MASS_BLOCK = 128  # tokens of the vocabulary whose probabilities are summed together


def sample(logits: torch.Tensor, keys: list[int], positions: list[int], temperature: float, top_p: float) -> list[int]:
    """One token for each row of logits (N, V): temperature, then fp32 softmax, then top-p.

    Top-p keeps the tokens for which the mass of all more likely tokens is below `top_p`. Neither a sort nor the kept
    set is needed: a token is drawn from all and tested against that definition; if it fails, so does every token that
    is not more likely, and the next draw is from the more likely ones. This takes at most 1 / top_p draws on average,
    and samples the top-p distribution, since every set drawn from contains the kept one. Temperature 0 takes the most
    likely token. Raises ValueError when logits are not finite (-inf is allowed: a token of probability 0).
    """
    scaled = logits / temperature if temperature else logits
    if not scaled.amax(-1).isfinite().all():
        raise ValueError("the model's logits are not finite")
    if temperature == 0:
        return logits.argmax(-1).tolist()
    probs = torch.softmax(scaled, dim=-1)
    if padding := -probs.shape[1] % MASS_BLOCK:
        probs = F.pad(probs, (0, padding))
    candidates, masses, tokens, pending = probs, _masses(probs), [0] * len(keys), list(range(len(keys)))
    limits = top_p * masses.sum(-1, keepdim=True)
    for attempt in count():
        noise = [uniform(keys[i], positions[i], attempt) for i in pending]
        drawn = _draw(candidates, masses, torch.tensor(noise, dtype=torch.float64, device=probs.device)[:, None])
        accepted = in_nucleus(probs, drawn, limits)[:, 0].tolist()
        for i, token, done in zip(pending, drawn[:, 0].tolist(), accepted):
            if done:
                tokens[i] = token
        retry = [i for i, done in enumerate(accepted) if not done]
        if not retry:
            return tokens
        pending = [pending[i] for i in retry]
        probs, limits, drawn = probs[retry], limits[retry], drawn[retry]
        candidates = _more_likely(probs, drawn)
        masses = _masses(candidates)


def _draw(weights: torch.Tensor, masses: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """For weights (N, V), their `_masses` and noise (N, 1) fp64 in [0, 1): the first token at which the cumulative sum
    of the weights exceeds that share of their total, (N, 1). First the block, then the token in it: a cumulative sum
    over the entire vocabulary is sequential and took 50 times as long on CPU."""
    ends = masses.cumsum(-1)
    target = noise * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True)  # (N, 1)
    rows = torch.arange(len(weights), device=weights.device)
    within = weights.view(*masses.shape, MASS_BLOCK)[rows, block[:, 0]]  # (N, MASS_BLOCK)
    sums = within.double().cumsum(-1)
    # Rounding may put the target just outside the block, where a token may have probability 0.
    target = (target - (ends - masses).gather(1, block)).clamp(min=0).minimum(sums[:, -1:] * (1 - 2.0**-50))
    return block * MASS_BLOCK + torch.searchsorted(sums, target, right=True)


def _masses(weights: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive blocks of weights (N, V), in fp64: (N, V / MASS_BLOCK)."""
    return weights.view(len(weights), -1, MASS_BLOCK).sum(-1, dtype=torch.float64)


def in_nucleus(probs: torch.Tensor, tokens: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Whether all tokens that are more likely than `tokens` (N, 1) have less mass than `limits` (N, 1): (N, 1) bool.
    probs (N, V) with V a multiple of MASS_BLOCK."""
    return _masses(_more_likely(probs, tokens)).sum(-1, keepdim=True) < limits


def _more_likely(probs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """probs (N, V) where they exceed that of the row's token (N, 1), else 0. A product with a 0/1 tensor of the same
    dtype takes a tenth of the time of torch.where on CPU."""
    exceeds = torch.gt(probs, probs.gather(-1, tokens), out=torch.empty_like(probs))
    return exceeds.mul_(probs)


def sample_key(seed: int, problem_id: str, sample: int) -> int:
    """A 64-bit key for the random numbers of one sample."""
    text = f"{seed}\0{sample}\0{problem_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform(key: int, position: int, attempt: int = 0) -> float:
    """A number in [0, 1 - 2^-48]: an element of the splitmix64 sequence (Steele, Lea and Flood 2014)."""
    mask = (1 << 64) - 1
    z = (key + ((position << 16) + attempt + 1) * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return ((z ^ (z >> 31)) >> 16) * 2.0**-48
