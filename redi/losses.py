"""The SFT, REDI, DPO and SimPO objectives, and the log-probabilities they are computed from.

This file needs torch only and can be copied alone into another code base.

    hidden, head weight, labels -> token_logps -> sequence_logps -> *_loss -> losses (B,), unreduced

The caller divides by a global count over all ranks and micro-batches.
Equation numbers refer to the paper: Reinforcement Distillation, arXiv 2505.24850.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORE_INDEX = -100


def sft_loss(logps: torch.Tensor) -> torch.Tensor:
    """Eq. 1: -log π(y|x). logps (N,) in nats -> losses (N,). The caller divides the sum by the batch's tokens."""
    return -logps


def redi_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    alpha: float = 0.8,
) -> torch.Tensor:
    """Eq. 5: -log π(y_w|x) / |y_w| + α log π(y_l|x) / |y_l|. No reference model, no sigmoid.

    α = 0 is SFT on the chosen responses (mean per-token NLL of each sequence). α = 1 is the symmetric objective:
    exchanging chosen and rejected flips its sign, and it is unbounded below, so it diverges first. α < 1 gives
    more weight to what must stay likely than to what must become unlikely.

    Args: logps (B,) in nats, lengths (B,) in tokens, α in [0, 1]. Returns: losses (B,).
    """
    return -chosen_logps / chosen_lengths + alpha * rejected_logps / rejected_lengths


def dpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.001,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Eq. 2: -log σ(β [(log π(y_w) - log π_ref(y_w)) - (log π(y_l) - log π_ref(y_l))]).

    With label_smoothing ε (conservative DPO) the label is taken to be wrong with probability ε:
    -(1 - ε) log σ(z) - ε log σ(-z). If policy and reference are equal, the loss is ln 2.

    Args: logps (B,) in nats, sums over a response. Returns: losses (B,).
    """
    logits = beta * ((chosen_logps - reference_chosen_logps) - (rejected_logps - reference_rejected_logps))
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def simpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    chosen_lengths: torch.Tensor,
    rejected_lengths: torch.Tensor,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> torch.Tensor:
    """Eq. 3: -log σ(β [log π(y_w)/|y_w| - log π(y_l)/|y_l|] - γ). γ is the target margin itself, not a ratio to β.

    Args: logps (B,) in nats, lengths (B,) in tokens. Returns: losses (B,).
    """
    return -F.logsigmoid(beta * (chosen_logps / chosen_lengths - rejected_logps / rejected_lengths) - gamma)


def sequence_logps(
    token_logps: torch.Tensor, labels: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the token log-probs of each packed sequence, and count its labels with the same mask.

    Args:
        token_logps: (T,) fp32, 0 where ignored.
        labels: (T,) int64, -100 where ignored.
        cu_seqlens: (N+1,) int32, sequence boundaries: first 0, last T.

    Returns: logps (N,) fp32, log π(y|x) in nats; lengths (N,) int64, |y| in tokens.
    """
    n = len(cu_seqlens) - 1
    sequence = torch.repeat_interleave(
        torch.arange(n, device=labels.device), cu_seqlens.diff(), output_size=len(labels)
    )
    # Tens of thousands of terms of one sign: fp32 running sums would lose the last digits.
    logps = torch.zeros(n, dtype=torch.float64, device=labels.device).index_add(0, sequence, token_logps.double())
    lengths = torch.zeros(n, dtype=torch.int64, device=labels.device)
    lengths.index_add_(0, sequence, (labels != IGNORE_INDEX).long())
    return logps.float(), lengths


def token_logps(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int | None = None,
    positions: torch.Tensor | None = None,
    product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """log π(label) of every token in nats; only one chunk's logits are in memory at a time.

    Args:
        hidden: (T, C), output of the final norm, fp32 or bf16.
        head_weight: (V, C), the output projection, same dtype.
        labels: (T,) int64, the next token, or -100 where there is nothing to predict.
        chunk_size: tokens per chunk of fp32 logits (chunk_size, V); default: `logit_rows`.
        positions: (M,) int64, where labels != -100, if known. Computing it here synchronises with the device.
        product: computes the head's matrix products; default, and specification: `fp32_product`.

    Returns: (T,) fp32, 0 where labels are -100. Ignored tokens are dropped before the projection.
    Differentiable once in hidden and head_weight. Raises ValueError if hidden and labels differ in length.
    """
    if hidden.ndim != 2 or hidden.shape[:1] != labels.shape:
        raise ValueError(f"expected hidden (T, C) and labels (T,), found {tuple(hidden.shape)} and "
                         f"{tuple(labels.shape)}: labels are shifted, one for each hidden state")
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    chunk_size = chunk_size or logit_rows(len(head_weight), hidden.is_cuda)
    logps = _LabelLogps.apply(hidden[positions], head_weight, labels[positions], chunk_size, product or fp32_product)
    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, logps)


def logit_rows(vocab_size: int, on_cuda: bool) -> int:
    """Default tokens per chunk: 2048 on CUDA, where each chunk adds a pass over the head's fp32 gradient; as many as
    make 128 MB of logits on a CPU."""
    return 2048 if on_cuda else max(64, 2**25 // vocab_size)


def matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Dtype of the head's operands. Logits stay in fp32 for bf16 inputs too: rounding them to bf16 before the softmax
    errs by up to 0.05 nats per token. CUDA multiplies bf16 with fp32 output; elsewhere the operands are upcast."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, k) @ b (m, k).T -> (n, m) fp32, accumulated in fp32. Operands both fp32, or on CUDA both bf16."""
    return F.linear(a, b) if a.dtype == torch.float32 else torch.mm(a, b.t(), out_dtype=torch.float32)


class _LabelLogps(torch.autograd.Function):
    """log softmax(hidden @ head_weight.T)[label], with the logits of one chunk of tokens at a time.

    Backward recomputes each chunk's logits: one more matrix product, instead of storing (T, V) values, which for one
    response of 19,800 tokens and a vocabulary of 151,936 are 12 GB. Only the last chunk, which backward takes first,
    is stored. Softmax runs in place: its kernels read each element for the last time before they write it.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, labels, chunk_size, product):
        logps = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        dtype = matmul_dtype(hidden)
        weight, log_probs = head_weight.to(dtype), None
        for rows in _chunks(len(labels), chunk_size):
            log_probs = None  # free the buffer before allocating the next chunk
            logits = product(hidden[rows].to(dtype), weight)
            log_probs = torch.log_softmax(logits, -1, out=logits)
            del logits
            logps[rows] = log_probs.gather(1, labels[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, head_weight, labels)
        ctx.chunk_size, ctx.product = chunk_size, product
        ctx.last_probs = log_probs.exp_()  # saves a quarter of the head's FLOPs if all labels fit into one chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        hidden, head_weight, labels = ctx.saved_tensors
        probs, ctx.last_probs = ctx.last_probs, None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None  # accumulated over chunks in fp32, rounded to the weight's dtype once
        dtype = matmul_dtype(hidden)
        weight = head_weight.to(dtype)
        for rows in reversed(_chunks(len(labels), ctx.chunk_size)):
            chunk, grad = hidden[rows].to(dtype), grad_logps[rows, None]
            if probs is None:
                logits = ctx.product(chunk, weight)
                probs = torch.softmax(logits, -1, out=logits)
                del logits
            # -d logp / d logits = softmax - onehot(label), in place of the probabilities; the factor -grad is applied
            # to the narrow operands of the two products.
            probs.scatter_add_(1, labels[rows, None], probs.new_full((len(probs), 1), -1.0))
            negative, probs = probs.to(dtype), None
            if needs_hidden:
                grad_hidden[rows] = ctx.product(negative, weight.t()).mul_(-grad).to(hidden.dtype)
            if needs_weight:
                grad_weight = _add_product(grad_weight, negative.t(), (chunk * -grad).to(dtype))
            negative = None  # free the buffer before allocating the next chunk
        return grad_hidden, grad_weight.to(head_weight.dtype) if needs_weight else None, None, None, None


def _add_product(total, a, b):
    """total (m, n) fp32 + a (m, k) @ b (k, n), in place; a total of None stands for zero."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _chunks(length, chunk_size):
    """The fewest slices of at most chunk_size, of even lengths."""
    count = max(1, -(-length // chunk_size))
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]
