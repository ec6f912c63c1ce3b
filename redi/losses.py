"""The equations: the SFT, REDI, DPO and SimPO objectives, and the log-probabilities that they are made of.

This file needs torch only and can be copied alone into another code base. Data flows

    hidden, head weight, labels -> token_logps -> sequence_logps -> *_loss -> losses (B,), unreduced

so that the caller divides by a global count (all ranks, all micro-batches) of its own.

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

    α = 0 is SFT on the chosen responses (the mean per-sequence NLL). α = 1 is the symmetric objective:
    exchanging chosen and rejected flips its sign, and nothing bounds it from below, which is why it
    collapses. α < 1 weighs what must stay likely above what must become unlikely.

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
    -(1 - ε) log σ(z) - ε log σ(-z). Where policy and reference are equal the loss is ln 2.

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
    """log π(label) of every token in nats, without ever holding the logits of more than a chunk.

    Args:
        hidden: (T, C), output of the final norm, fp32 or bf16.
        head_weight: (V, C), the output projection, same dtype.
        labels: (T,) int64, the next token, or -100 where there is nothing to predict.
        chunk_size: tokens whose (chunk_size, V) fp32 logits are in memory at once; None: see `logit_rows`.
        positions: (M,) int64, where labels != -100, if the caller knows it already. Finding it out here
            makes a GPU wait for the host.
        product: the head's matrix product, with the contract of `fp32_product` (the default); a faster one may be
            handed in.

    Returns: (T,) fp32, 0 where labels are -100. Ignored tokens are dropped before the projection.
    Differentiable once in hidden and head_weight.
    """
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    chunk_size = chunk_size or logit_rows(len(head_weight), hidden.is_cuda)
    logps = _LabelLogps.apply(hidden[positions], head_weight, labels[positions], chunk_size, product or fp32_product)
    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, logps)


def logit_rows(vocab_size: int, on_cuda: bool) -> int:
    """Rows of logits that are worth holding at once: 2048 on CUDA, where each chunk costs one more pass over the
    fp32 gradient of the head; 128 MB of them on a CPU."""
    return 2048 if on_cuda else max(64, 2**25 // vocab_size)


class _LabelLogps(torch.autograd.Function):
    """log softmax(hidden @ head_weight.T)[label], holding the logits of one chunk of tokens at a time.

    Backward computes each chunk's logits again: one more matrix product, in exchange for never storing
    (T, V) values, which for one response of 19,800 tokens and 151,936 words are 12 GB. Only the last chunk,
    which backward takes first, is kept in between. The softmaxes write over their input, which their kernels
    bear: an element is read for the last time where it is written.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, labels, chunk_size, product):
        logps = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        dtype = matmul_dtype(hidden)
        weight, log_probs = head_weight.to(dtype), None
        for rows in _chunks(len(labels), chunk_size):
            log_probs = None  # gone before the next logits take their place
            logits = product(hidden[rows].to(dtype), weight)
            log_probs = torch.log_softmax(logits, -1, out=logits)
            del logits
            logps[rows] = log_probs.gather(1, labels[rows, None]).squeeze(1)
        ctx.save_for_backward(hidden, head_weight, labels)
        ctx.chunk_size, ctx.product = chunk_size, product
        # Saves a quarter of the head's arithmetic where all labels fit into one chunk (14 % of the CPU seconds
        # of an SFT step: 25M parameters, 32,000 words, one pair), and takes no memory that backward would not.
        ctx.last_probs = log_probs.exp_()
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logps):
        hidden, head_weight, labels = ctx.saved_tensors
        probs, ctx.last_probs = ctx.last_probs, None
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None  # summed over chunks in fp32, and rounded to the weight's dtype once
        dtype = matmul_dtype(hidden)
        weight = head_weight.to(dtype)
        for rows in reversed(_chunks(len(labels), ctx.chunk_size)):
            chunk, grad = hidden[rows].to(dtype), grad_logps[rows, None]
            if probs is None:
                logits = ctx.product(chunk, weight)
                probs = torch.softmax(logits, -1, out=logits)
                del logits
            # d logp / d logits = onehot(label) - softmax, here with the other sign, in place of the probabilities;
            # the factor grad goes to the narrow sides of the two products.
            probs.scatter_add_(1, labels[rows, None], probs.new_full((len(probs), 1), -1.0))
            negative, probs = probs.to(dtype), None
            if needs_hidden:
                grad_hidden[rows] = ctx.product(negative, weight.t()).mul_(-grad).to(hidden.dtype)
            if needs_weight:
                grad_weight = _add_product(grad_weight, negative.t(), (chunk * -grad).to(dtype))
            negative = None  # gone before the next chunk's logits take their place
        return grad_hidden, grad_weight.to(head_weight.dtype) if needs_weight else None, None, None, None


def _add_product(total, a, b):
    """total (m, n) fp32 + a (m, k) @ b (k, n), in place of total; None stands for zero."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def _chunks(length, chunk_size):
    """As few slices of at most chunk_size as there can be, of even lengths."""
    count = max(1, -(-length // chunk_size))
    bounds = [length * i // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in zip(bounds, bounds[1:])]


def matmul_dtype(hidden: torch.Tensor) -> torch.dtype:
    """Logits accumulate and stay in fp32 also for bf16 inputs: rounding them to bf16 before the softmax errs
    by up to 0.05 nats a token. CUDA has a matrix product with fp32 output; elsewhere the operands are upcast."""
    return hidden.dtype if hidden.is_cuda else torch.float32


def fp32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a (n, k) @ b (m, k).T, accumulated and returned in fp32: (n, m). Both fp32, or on CUDA both bf16."""
    if a.dtype == torch.float32:
        return F.linear(a, b)
    return torch.mm(a, b.t(), out_dtype=torch.float32)
