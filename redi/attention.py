"""Causal attention over packed sequences (training, prompts) and over a cache of keys and values (decoding),
each with a CPU and a CUDA back-end of one signature.

Queries are (T, H, D), keys and values (T, K, D) with H a multiple of K (grouped-query attention): query
head h reads key/value head h // (H / K). Scores are scaled by 1 / sqrt(D).
"""

import functools
import inspect

import torch
import torch.nn.functional as F


def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int
) -> torch.Tensor:
    """Each token attends to itself and to what precedes it in its own sequence.

    Args: q (T, H, D), k and v (T, K, D), cu_seqlens (N+1,) int32, max_seqlen: tokens of the longest sequence.
    Returns: (T, H, D), dtype of q.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen_attention(q, k, v, cu_seqlens, max_seqlen)
    return _loop_attention(q, k, v, cu_seqlens)


def _loop_attention(q, k, v, cu_seqlens):
    """One dense causal call a sequence: no padding, no block mask, nothing quadratic in T."""
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    # Split, not sliced: backward of a slice fills a tensor of all T tokens, for every sequence. Saves 6 % of a
    # step with 32 sequences of 512 tokens.
    for sequence in zip(*(x.split(lengths) for x in (q, k, v))):
        q_i, k_i, v_i = (x[None].transpose(1, 2) for x in sequence)  # (1, heads, L, D)
        out = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2)[0])  # (L, H, D)
    return torch.cat(outputs)


def _varlen_attention(q, k, v, cu_seqlens, max_seqlen):
    """FlashAttention over the packed tokens: one kernel for all sequences, no host synchronisation."""
    from torch.nn.attention.varlen import varlen_attn

    options = {}
    if q.shape[1] != k.shape[1]:
        if _varlen_has_gqa():
            options["enable_gqa"] = True
        else:
            groups = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **options
    )


@functools.cache
def _varlen_has_gqa() -> bool:
    """Whether this torch takes fewer key/value heads as they are: 2.12 does, 2.11 does not."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def cached_attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """One new token in each of N rows attends to what its row's cache holds, itself included.

    Args: q (N, H, D); keys, values (N, K, S, D), where slot i of a row is its position i and slots from
    `lengths` on are unused; lengths (N,) int64.
    Returns: (N, H, D), dtype of q.
    """
    rows, heads, size = q.shape
    q = q.view(rows, keys.shape[1], -1, size)  # heads of a group as queries to one key head: (N, K, H/K, D)
    if q.is_cuda:
        visible = torch.arange(keys.shape[2], device=q.device) < lengths[:, None, None, None]  # (N, 1, 1, S)
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
    else:
        out = torch.cat(_attend_by_row(q, keys, values, lengths))
    return out.reshape(rows, heads, size)


def _attend_by_row(q, keys, values, lengths):
    """Reads no unused slot; and a row's result has the same bits whatever the lengths of the others."""
    return [
        F.scaled_dot_product_attention(q[i : i + 1], keys[i : i + 1, :, :n], values[i : i + 1, :, :n])
        for i, n in enumerate(lengths.tolist())
    ]
