"""The layers' hand-written forward and backward passes against autograd, on products large enough for oneDNN."""

import pytest
import torch
import torch.nn.functional as F

from redi import kernels
from redi.kernels import fp32_product, uses_onednn
from redi.losses import token_logps
from redi.model import MLP, Linear, RMSNorm
from redi.hub.config import parse_config
from tests import tiny


def gradients(function, *inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    upstream = torch.sin(torch.arange(out.numel(), dtype=torch.float32)).to(out.dtype).view_as(out)
    return out, *torch.autograd.grad(out, inputs, upstream)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tokens", [0, 1, 7, 301])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(tokens, bias):
    layer, inputs = Linear(250, 313, bias=bias), [random(tokens, 250), random(313, 250, seed=1)]
    inputs += [random(313, seed=2)] if bias else []
    assert uses_onednn(*inputs[:2]) == (tokens == 301 and torch.backends.mkldnn.is_available())

    def ours(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(("weight", "bias"), parameters)), (x,))

    for found, expected in zip(gradients(ours, *inputs), gradients(F.linear, *inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_products_of_strided_operands():
    """As the backward passes make them: transposed views, rows cut out of a longer tensor."""
    a, b = random(400, 350)[13:313].t(), random(260, 300, seed=1)
    torch.testing.assert_close(fp32_product(a, b), a @ b.t(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(fp32_product(b, a), b @ a.t(), rtol=1e-5, atol=1e-4)


def test_only_large_fp32_products_on_a_cpu_go_to_onednn():
    a, b = random(300, 256), random(256, 256)
    assert uses_onednn(a, b) == torch.backends.mkldnn.is_available()
    assert not uses_onednn(a[:255], b)
    assert not uses_onednn(a.bfloat16(), b.bfloat16()) and not uses_onednn(a.to("meta"), b.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(47, 13), (47, 3, 8), (1, 13), (0, 13)])
def test_rms_norm(shape, dtype):
    norm = RMSNorm(shape[-1], 1e-6)
    inputs = (3 * random(*shape)).to(dtype), (1 + random(shape[-1], seed=1)).to(dtype)

    def ours(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    def naive(x, weight):
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    for found, expected in zip(gradients(ours, *inputs), gradients(naive, *inputs)):
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_mlp():
    mlp = MLP(parse_config({**tiny.QWEN2, "vocab_size": 10}))
    names, parameters = zip(*mlp.named_parameters())

    def ours(x, *parameters):
        return torch.func.functional_call(mlp, dict(zip(names, parameters)), (x,))

    def naive(x, gate, up, down):
        return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()

    inputs = [random(31, 48), *(p.detach() for p in parameters)]
    for found, expected in zip(gradients(ours, *inputs), gradients(naive, *inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [301, 2048])
def test_token_logps_of_a_large_head(chunk_size):
    hidden, head, labels = random(600, 64), random(1009, 64, seed=1) / 8, torch.arange(600) % 1009
    labels[::7] = -100

    def naive(hidden, head):
        logps = torch.log_softmax(hidden @ head.t(), -1).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
        return torch.where(labels == -100, 0, logps)

    found = gradients(lambda *inputs: token_logps(*inputs, labels, chunk_size=chunk_size), hidden, head)
    for ours, expected in zip(found, gradients(naive, hidden, head)):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("function", [
    lambda x: kernels.linear(x, torch.ones(512, 512, requires_grad=True), None),
    lambda x: kernels.rms_norm(x, torch.ones(512, requires_grad=True), 1e-6),
    lambda x: kernels.swiglu(x, x),
    lambda x: token_logps(x, torch.ones(7, 512), torch.arange(256) % 7),
])  # fmt: skip
def test_a_second_derivative_is_refused(function):
    """A hand-written backward is not differentiable; without the refusal it would be silently wrong."""
    x = torch.randn(256, 512, requires_grad=True)
    [gradient] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
