"""The equations: per-token log-probabilities and the SFT, REDI, DPO and SimPO objectives.

This file needs torch only and can be copied alone into another code base. Data flows

    hidden, head weight, labels -> token_logps -> sequence_logps -> *_loss -> losses (B,), unreduced

so that the caller divides by a global count (all ranks, all micro-batches) of its own.

Equation numbers refer to the paper: Reinforcement Distillation, arXiv 2505.24850.
"""

import torch
import torch.nn.functional as F

IGNORE_INDEX = -100


class _LabelLogps(torch.autograd.Function):
    """log softmax(hidden @ head_weight.T)[label], holding the logits of one chunk of tokens at a time.

    Backward computes each chunk's logits again: one more matrix product, in exchange for never storing
    (T, V) values, which for one response of 19,800 tokens and 151,936 words are 12 GB.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, labels, chunk_size):
        logps = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        logsumexps = torch.empty_like(logps)
        for rows, logits in _logit_chunks(hidden, head_weight, chunk_size):
            logsumexps[rows] = logits.logsumexp(-1)
            logps[rows] = logits.gather(1, labels[rows, None]).squeeze(1) - logsumexps[rows]
        ctx.save_for_backward(hidden, head_weight, labels, logsumexps)
        ctx.chunk_size = chunk_size
        return logps

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, head_weight, labels, logsumexps = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Summed over chunks in fp32, and rounded to the weight's dtype once.
        grad_weight = (
            torch.zeros(head_weight.shape, dtype=torch.float32, device=hidden.device)
            if ctx.needs_input_grad[1]
            else None
        )
        matmul_dtype = hidden.dtype if hidden.is_cuda else torch.float32
        weight = head_weight.to(matmul_dtype)
        for rows, logits in _logit_chunks(hidden, head_weight, ctx.chunk_size):
            grad = grad_logps[rows, None]
            # d logp / d logits = onehot(label) - softmax, built in place of the logits.
            grad_logits = logits.sub_(logsumexps[rows, None]).exp_().mul_(-grad)
            grad_logits.scatter_add_(1, labels[rows, None], grad)
            grad_logits = grad_logits.to(matmul_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ weight).to(hidden.dtype)
            if grad_weight is None:
                continue
            if matmul_dtype == torch.float32:
                grad_weight.addmm_(grad_logits.t(), hidden[rows].float())
            else:
                grad_weight += torch.mm(grad_logits.t(), hidden[rows], out_dtype=torch.float32)
        return grad_hidden, None if grad_weight is None else grad_weight.to(head_weight.dtype), None, None


def _logit_chunks(hidden, head_weight, chunk_size):
    """Yield (rows, logits): slices of at most chunk_size tokens and their (rows, V) fp32 logits.

    Logits accumulate and stay in fp32 also for bf16 inputs: rounding them to bf16 before the softmax errs
    by up to 0.05 nats a token. CUDA has a matrix product with fp32 output; elsewhere the operands are upcast.
    """
    if hidden.is_cuda and hidden.dtype != torch.float32:
        for rows in _slices(len(hidden), chunk_size):
            yield rows, torch.mm(hidden[rows], head_weight.t(), out_dtype=torch.float32)
    else:
        weight = head_weight.float().t()
        for rows in _slices(len(hidden), chunk_size):
            yield rows, hidden[rows].float() @ weight


def _slices(length, chunk_size):
    return (slice(start, min(start + chunk_size, length)) for start in range(0, length, chunk_size))


def token_logps(
    hidden: torch.Tensor,
    head_weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_size: int = 2048,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """log π(label) of every token in nats, without ever holding the logits of more than a chunk.

    Args:
        hidden: (T, C), output of the final norm, fp32 or bf16.
        head_weight: (V, C), the output projection, same dtype.
        labels: (T,) int64, the next token, or -100 where there is nothing to predict.
        chunk_size: tokens whose (chunk_size, V) fp32 logits are in memory at once.
        positions: (M,) int64, where labels != -100, if the caller knows it already. Finding it out here
            makes a GPU wait for the host.

    Returns: (T,) fp32, 0 where labels are -100. Ignored tokens are dropped before the projection.
    Differentiable once in hidden and head_weight.
    """
    if positions is None:
        positions = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    logps = _LabelLogps.apply(hidden[positions], head_weight, labels[positions], chunk_size)
    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, logps)


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
