"""F.linear, F.rms_norm and silu(gate) * up: the same numbers, in less time and memory on a CPU.

Each function decides by one visible condition. Figures: 25M parameters, one core of an AMD EPYC (Zen 5).
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def fp32_product(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b.T (+ bias), accumulated and returned in fp32, not differentiable.

    Args: a (n, k), b (m, k), both fp32, or on CUDA both bf16; bias (m,) fp32. Returns: (n, m) fp32.
    """
    if a.dtype != torch.float32:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    if uses_onednn(a, b):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return F.linear(a, b, bias)


def uses_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether oneDNN is to compute the product of a (n, k) and b (m, k): a large one in fp32 on a CPU.

    Otherwise it is MKL, which takes AVX2 kernels on AMD processors: 104 GFLOP/s against oneDNN's 230 on one
    Zen 5 core. A product of a new shape costs oneDNN 0.5 ms of preparation, more than small ones save.
    """
    possible = a.device.type == "cpu" and a.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    return possible and len(a) * b.numel() > 2**24


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (T, C) @ weight (O, C).T + bias (O,)."""
    if uses_onednn(x, weight):
        return _OneDnnLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _OneDnnLinear(torch.autograd.Function):
    """With the head's products in oneDNN too, a REDI step takes 6.3 instead of 8.3 CPU seconds (4,200 tokens)."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return fp32_product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_bias = grad.sum(0) if ctx.needs_input_grad[2] else None
        return fp32_product(grad, weight.t()), fp32_product(grad.t(), x.t()), grad_bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (…, C) / sqrt(mean(x²) + eps) * weight (C,): in fp32, rounded once to the dtype of x."""
    if x.is_cuda:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return _RMSNorm.apply(x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """F.rms_norm is one kernel on CUDA, but on a CPU a chain of operations that keeps two more tensors of x's size
    for backward: 13 % of what the layers keep."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = x.float().square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight.float()
        along = (grad * normed).mean(-1, keepdim=True)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, any shape."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Backward computes silu(gate) again, which saves a quarter of what the MLP would keep: an eighth of a layer's
    activations."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)
