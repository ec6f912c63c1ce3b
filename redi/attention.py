"""Causal attention over packed sequences (training, prompts) and over a cache of keys and values (decoding).

Each has two back-ends with one signature, chosen by `uses_flash`: FlashAttention, or PyTorch's scaled dot-product
attention one sequence at a time, which runs anywhere.

Queries are (T, H, D), keys and values (T, K, D) with H a multiple of K (grouped-query attention): query
head h reads key/value head h // (H / K). Scores are scaled by 1 / sqrt(D).
"""

import torch
import torch.nn.functional as F

# Operations whose outputs selective activation checkpointing stores instead of recomputing.
ATTENTION_OPS = {"torch_attn::_varlen_attn", "aten::_scaled_dot_product_flash_attention_for_cpu",
                 "aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_efficient_attention"}
VARLEN_HAS_GQA = torch.__version__ >= (2, 12)  # varlen_attn supports grouped queries


def uses_flash(q: torch.Tensor) -> bool:
    """Whether FlashAttention supports these queries (T, H, D): 16-bit, and a head size it has kernels for."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


def packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens: torch.Tensor,
                     max_seqlen: int) -> torch.Tensor:
    """Each token attends to itself and to earlier tokens of its own sequence.

    Args: q (T, H, D), k and v (T, K, D), cu_seqlens (N+1,) int32, max_seqlen: tokens of the longest sequence.
    Returns: (T, H, D), dtype of q.
    """
    if uses_flash(q):
        return _packed_flash(q, k, v, cu_seqlens, max_seqlen)
    return _packed_dense(q, k, v, cu_seqlens)


def _packed_dense(q, k, v, cu_seqlens):
    """One causal call per sequence: no padding, no block mask, memory linear in T."""
    if q.is_cuda:  # the memory-efficient kernel needs as many key heads as query heads
        k, v = _expand_heads(q, k, v)
    lengths = cu_seqlens.diff().tolist()
    outputs = []
    # split, not slices: the backward of each slice would fill a tensor of all T tokens (6 % of a step with 32
    # sequences of 512 tokens).
    for sequence in zip(*(x.split(lengths) for x in (q, k, v))):
        q_i, k_i, v_i = (x[None].transpose(1, 2) for x in sequence)  # (1, heads, L, D)
        out = F.scaled_dot_product_attention(q_i, k_i, v_i, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.transpose(1, 2)[0])  # (L, H, D)
    return torch.cat(outputs)


def _packed_flash(q, k, v, cu_seqlens, max_seqlen):
    """One kernel for all sequences, no host synchronisation."""
    from torch.nn.attention.varlen import varlen_attn  # imports torch.compile (25 MB), so only if used

    options = {}
    if q.shape[1] != k.shape[1]:
        if VARLEN_HAS_GQA:
            options["enable_gqa"] = True
        else:
            k, v = _expand_heads(q, k, v)
    return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, window_size=(-1, 0), **options)


def _expand_heads(q, k, v):
    groups = q.shape[1] // k.shape[1]
    return k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)


def cached_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """One new token in each of N rows attends to the cached tokens of its row, itself included.

    Args: q (N, H, D); keys, values (N, S, K, D), where slot i of a row is its position i and slots from
    `lengths` on are unused; lengths (N,) int32.
    Returns: (N, H, D), dtype of q.
    """
    if uses_flash(q):
        return _cached_flash(q, keys, values, lengths)
    return _cached_dense(q, keys, values, lengths)


def _cached_dense(q, keys, values, lengths):
    """Row by row, so that a row's result is bitwise independent of the other rows' lengths."""
    rows, heads, size = q.shape
    groups = q.view(rows, 1, keys.shape[2], -1, size)  # heads of a group as queries to one key head: (N, 1, K, H/K, D)
    outputs = []
    for q_i, k_i, v_i, n in zip(groups, keys, values, lengths.tolist()):
        k_i, v_i = (x[None, :n].transpose(1, 2) for x in (k_i, v_i))  # (1, K, n, D)
        outputs.append(F.scaled_dot_product_attention(q_i, k_i, v_i))
    return torch.cat(outputs).reshape(rows, heads, size)


def _cached_flash(q, keys, values, lengths):
    """The rows as sequences of one query each, in one kernel that splits the keys of long rows over blocks. The
    operator below varlen_attn, which does not take seqused_k before torch 2.12."""
    rows, slots = keys.shape[:2]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    out, *_ = torch.ops.aten._flash_attention_forward(
        q, keys.flatten(0, 1), values.flatten(0, 1), starts, starts * slots, 1, slots, 0.0, False, False,
        seqused_k=lengths,
    )
    return out
