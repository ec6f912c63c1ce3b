"""Values and gradients of the losses, against arithmetic done by hand and against naive versions over all logits."""

import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from redi import losses as losses_module
from redi.losses import dpo_loss, redi_loss, sequence_logps, sft_loss, simpo_loss, token_logps

T, V, C, CHUNK = 47, 123, 31, 10  # sizes that divide each other nowhere
CU_SEQLENS = torch.tensor([0, 20, 21, 47], dtype=torch.int32)


def inputs(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(T, C, generator=generator).to(dtype)
    weight = (torch.randn(V, C, generator=generator) * 0.5).to(dtype)
    labels = torch.randint(V, (T,), generator=generator)
    labels[[0, 1, 5, 21, 22, 46]] = -100
    return hidden, weight, labels


def naive_token_logps(hidden, weight, labels):
    logps = (hidden @ weight.t()).log_softmax(-1)
    mask = labels != -100
    return torch.where(mask, logps.gather(1, labels.clamp(min=0)[:, None]).squeeze(1), 0.0)


def in_chunks(hidden, weight, labels):
    return token_logps(hidden, weight, labels, chunk_size=CHUNK)


def gradients(function, hidden, weight, labels):
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = function(hidden, weight, labels)
    upstream = torch.linspace(-2, 3, len(labels))  # a different weight for every token
    (out * upstream).sum().backward()
    return out.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("chunk_size", [1, CHUNK, 46, 47, 2048])
def test_token_logps_equal_the_naive_version(chunk_size):
    ours = gradients(lambda *args: token_logps(*args, chunk_size=chunk_size), *inputs())
    naive = gradients(naive_token_logps, *inputs())
    for a, b in zip(ours, naive):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    labels = inputs()[2]
    assert ours[0].dtype == torch.float32
    assert (ours[0][labels == -100] == 0).all() and (ours[1][labels == -100] == 0).all()


def test_token_logps_from_bf16_are_those_of_an_fp32_evaluation():
    hidden, weight, labels = inputs(torch.bfloat16)
    logps, grad_hidden, grad_weight = gradients(in_chunks, hidden, weight, labels)
    naive = gradients(naive_token_logps, hidden.float(), weight.float(), labels)
    torch.testing.assert_close(logps, naive[0], atol=1e-4, rtol=0)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    # Gradients are rounded to bf16 once, after their sum: half a unit in the last of 8 bits.
    torch.testing.assert_close(grad_hidden.float(), naive[1], atol=1e-5, rtol=2**-8)
    torch.testing.assert_close(grad_weight.float(), naive[2], atol=1e-5, rtol=2**-8)


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 5e-5), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("tokens, vocabulary, width, chunk", [
    (1, 1, 1, 1), (1, 7, 3, 4), (5, 17, 1, 2), (29, 33, 5, 29), (30, 33, 5, 29), (67, 1025, 19, 13), (13, 40_009, 9, 6),
])  # fmt: skip
def test_values_and_gradients_against_fp64(tokens, vocabulary, width, chunk, dtype, rtol):
    """Sizes around the vectors of a kernel; one chunk full, one token more; some tokens ignored."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, width, generator=generator).to(dtype)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    labels[1::5] = -100
    positions = (labels != -100).nonzero().squeeze(1)
    ours = gradients(lambda *a: token_logps(*a, chunk_size=chunk, positions=positions), hidden, weight, labels)
    exact = gradients(naive_token_logps, hidden.double(), weight.double(), labels)
    assert (ours[0] - exact[0]).abs().max() <= 2e-6 * max(1, exact[0].abs().max())
    for a, b in zip(ours[1:], exact[1:]):  # fp32: products over 40,009 words; bf16: rounded once, after the sum
        assert a.dtype == dtype and (a - b).abs().max() <= rtol * max(1, b.abs().max())


@pytest.mark.parametrize("vocabulary", [1, 7, 8, 15, 16, 17, 123, 1000, 40_009])
@pytest.mark.parametrize("softmax", [torch.softmax, torch.log_softmax])
def test_a_softmax_may_write_over_its_input(softmax, vocabulary):
    """What token_logps builds on, and torch does not promise; rows that are not finite harm no other row."""
    logits = torch.randn(9, vocabulary, generator=torch.Generator().manual_seed(0)) * 30
    logits[1], logits[3, -1], logits[5, 0], logits[7, -1] = -math.inf, math.inf, math.nan, -math.inf
    expected = softmax(logits, -1)
    assert torch.equal(expected.isnan(), softmax(logits.double(), -1).isnan())
    written_over = softmax(logits, -1, out=logits)
    assert written_over.data_ptr() == logits.data_ptr()
    torch.testing.assert_close(written_over, expected, atol=0, rtol=0, equal_nan=True)


def test_a_token_that_is_not_finite_spoils_no_other():
    hidden, weight, labels = inputs()
    clean = gradients(in_chunks, hidden, weight, labels)
    for value in (math.nan, math.inf):
        hidden[13, 0] = value
        logps, grad_hidden, grad_weight = gradients(in_chunks, hidden, weight, labels)
        others = torch.arange(T) != 13
        assert logps[13].isnan() and torch.equal(logps[others], clean[0][others])
        assert torch.equal(grad_hidden[others], clean[1][others])
        assert grad_weight.isnan().any()  # so that the update is skipped


def test_large_logits_do_not_overflow():
    hidden, weight, labels = inputs()
    ours = gradients(in_chunks, hidden * 100, weight, labels)
    naive = gradients(naive_token_logps, hidden * 100, weight, labels)
    torch.testing.assert_close(ours[0], naive[0], atol=1e-3, rtol=1e-5)
    assert all(x.isfinite().all() for x in ours)


def test_all_rows_ignored():
    hidden, weight, _ = inputs()
    labels = torch.full((T,), -100)
    logps, grad_hidden, grad_weight = gradients(token_logps, hidden, weight, labels)
    assert (logps == 0).all() and (grad_hidden == 0).all() and (grad_weight == 0).all()
    sums, lengths = sequence_logps(logps, labels, CU_SEQLENS)
    assert sums.tolist() == [0, 0, 0] and lengths.tolist() == [0, 0, 0]


def test_no_tokens_at_all():
    hidden, weight, _ = inputs()
    logps, _, grad_weight = gradients(token_logps, hidden[:0], weight, torch.empty(0, dtype=torch.int64))
    assert logps.shape == (0,) and (grad_weight == 0).all()


def test_label_positions_given_or_found_are_the_same():
    hidden, weight, labels = inputs()
    positions = (labels != -100).nonzero().squeeze(1)
    found = gradients(token_logps, hidden, weight, labels)
    given = gradients(lambda *args: token_logps(*args, positions=positions), hidden, weight, labels)
    assert all(torch.equal(a, b) for a, b in zip(found, given))


def test_gradient_of_one_input_alone():
    hidden, weight, labels = inputs()
    both = gradients(token_logps, hidden, weight, labels)
    upstream = torch.linspace(-2, 3, T)
    hidden.requires_grad_()
    (token_logps(hidden, weight, labels) * upstream).sum().backward()
    torch.testing.assert_close(hidden.grad, both[1])
    hidden = hidden.detach()
    weight.requires_grad_()
    (token_logps(hidden, weight, labels) * upstream).sum().backward()
    torch.testing.assert_close(weight.grad, both[2])


@pytest.mark.parametrize("chunk_size", [CHUNK, 2048])
def test_backward_twice_gives_the_same_gradients(chunk_size):
    hidden, weight, labels = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    loss = token_logps(hidden, weight, labels, chunk_size=chunk_size).sum()
    first, second = (torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for _ in range(2))
    for a, b in zip(first, second):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


class NewTensors(TorchDispatchMode):
    """made: how many tensors of each number of elements the operations allocate."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        given = {x.untyped_storage().data_ptr() for x in [*args, *kwargs.values()] if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.made[x.numel()] += 1
        return out


def test_logits_of_all_tokens_are_never_in_memory():
    tokens, vocabulary, width, chunk = 400, 3000, 8, 16
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,))
    with NewTensors() as tensors:
        loss = token_logps(hidden, weight, labels, chunk_size=chunk).sum()
        loss.backward()
    assert max(tensors.made) == chunk * vocabulary  # the naive version: tokens * vocabulary
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        token_logps(hidden, weight, labels, chunk_size=chunk)
    assert max(saved) <= max(hidden.numel(), weight.numel())


def test_the_gradient_of_the_head_is_summed_in_place():
    """On CUDA, tests/test_fake_cuda.py."""
    hidden, weight, labels = inputs()
    hidden.requires_grad_(), weight.requires_grad_()
    with NewTensors() as tensors:
        loss = token_logps(hidden, weight, labels, chunk_size=CHUNK).sum()
        torch.autograd.grad(loss, (hidden, weight))
    assert tensors.made[V * C] == 1  # the gradient: no product of a chunk beside it, no copy of the weight


def test_ignored_tokens_are_not_projected():
    hidden, weight, labels = inputs()
    labels[3:] = -100
    labels[2] = 7
    with NewTensors() as tensors:
        token_logps(hidden, weight, labels)
    assert max(tensors.made) < 5 * V + C * V  # a single token has a label; the naive version makes 47 * V


def test_sequence_logps_by_hand():
    values = torch.tensor([0.0, -1.0, -2.0, 0.0, -0.5, -0.25, -4.0])
    labels = torch.tensor([-100, 4, 5, -100, 0, 9, 3])  # id 0 is a label like any other
    sums, lengths = sequence_logps(values, labels, torch.tensor([0, 3, 6, 7], dtype=torch.int32))
    assert sums.tolist() == [-3.0, -0.75, -4.0] and lengths.tolist() == [2, 2, 1]
    assert sums.dtype == torch.float32 and lengths.dtype == torch.int64


def test_sequence_logps_keep_the_last_digits_of_long_sums():
    values = torch.full((200_000,), -0.1)
    sums, _ = sequence_logps(values, torch.ones(200_000, dtype=torch.int64), torch.tensor([0, 200_000]))
    assert abs(sums.item() - float(values[0]) * 200_000) < 2e-3  # one unit in the last place of fp32 there


# Chosen: 4 labels, log-probs that sum to -2; rejected: 10 labels, -15. Averages -0.5 and -1.5.
PAIR = [torch.tensor([x]) for x in (-2.0, -15.0, 4.0, 10.0)]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_losses_by_hand():
    chosen, rejected, chosen_length, rejected_length = PAIR
    assert sft_loss(chosen).item() == 2.0
    assert redi_loss(*PAIR, alpha=0.8).item() == pytest.approx(0.5 - 0.8 * 1.5)
    assert redi_loss(*PAIR).item() == pytest.approx(-0.7)  # the default is the paper's 0.8
    assert simpo_loss(*PAIR, beta=2.0, gamma=1.0).item() == pytest.approx(-math.log(sigmoid(2 * 1.0 - 1)))
    assert simpo_loss(*PAIR).item() == pytest.approx(0.3132617)
    # Policy over reference: chosen -2 - (-3) = 1, rejected -15 - (-11) = -4.
    reference = torch.tensor([-3.0]), torch.tensor([-11.0])
    assert dpo_loss(chosen, rejected, *reference, beta=0.1).item() == pytest.approx(-math.log(sigmoid(0.5)))
    smoothed = -0.9 * math.log(sigmoid(0.5)) - 0.1 * math.log(sigmoid(-0.5))
    assert dpo_loss(chosen, rejected, *reference, 0.1, 0.1).item() == pytest.approx(smoothed)
    assert dpo_loss(chosen, rejected, *reference).item() == pytest.approx(-math.log(sigmoid(0.005)))


def test_gradients_of_the_losses_by_hand():
    def slopes(loss):
        chosen, rejected = PAIR[0].clone().requires_grad_(), PAIR[1].clone().requires_grad_()
        loss(chosen, rejected).sum().backward()
        return chosen.grad.item(), rejected.grad.item()

    assert slopes(lambda w, l: redi_loss(w, l, *PAIR[2:], alpha=0.8)) == pytest.approx((-1 / 4, 0.8 / 10))
    miss = 1 - sigmoid(2 * 1.0 - 1)
    assert slopes(lambda w, l: simpo_loss(w, l, *PAIR[2:])) == pytest.approx((-2 * miss / 4, 2 * miss / 10))
    reference = torch.tensor([-3.0]), torch.tensor([-11.0])
    miss = 1 - sigmoid(0.5)
    assert slopes(lambda w, l: dpo_loss(w, l, *reference, beta=0.1)) == pytest.approx((-0.1 * miss, 0.1 * miss))


def random_pairs(batch=7):
    generator = torch.Generator().manual_seed(1)
    logps = -torch.rand(2, batch, generator=generator) * 300
    lengths = torch.randint(1, 500, (2, batch), generator=generator)
    return *logps, *lengths


def test_redi_at_alpha_0_is_the_mean_nll_and_at_alpha_1_changes_sign_with_the_roles():
    chosen, rejected, chosen_lengths, rejected_lengths = random_pairs()
    imitation = redi_loss(chosen, rejected, chosen_lengths, rejected_lengths, alpha=0.0)
    torch.testing.assert_close(imitation, sft_loss(chosen) / chosen_lengths)
    one_way = redi_loss(chosen, rejected, chosen_lengths, rejected_lengths, alpha=1.0)
    other_way = redi_loss(rejected, chosen, rejected_lengths, chosen_lengths, alpha=1.0)
    torch.testing.assert_close(one_way, -other_way)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_dpo_at_the_reference_is_ln_2(label_smoothing):
    chosen, rejected, *_ = random_pairs()
    loss = dpo_loss(chosen, rejected, chosen, rejected, beta=0.5, label_smoothing=label_smoothing)
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))


def test_losses_are_unreduced_and_finite_far_out():
    pairs = torch.tensor([-9e4, -1.0]), torch.tensor([-1.0, -9e4]), torch.tensor([1, 1]), torch.tensor([1, 1])
    for loss in (redi_loss(*pairs), simpo_loss(*pairs), dpo_loss(*pairs[:2], pairs[0] * 0, pairs[1] * 0, beta=1.0)):
        assert loss.shape == (2,) and loss.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["redi", "simpo", "dpo"])
def test_whole_path_equals_the_naive_one(method, dtype):
    """Hidden states to losses to gradients, packed, on awkward sizes; 3 pairs in 6 uneven sequences."""
    hidden, weight, labels = inputs(dtype)
    cu_seqlens = torch.tensor([0, 9, 13, 20, 24, 37, 47], dtype=torch.int32)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-4
    reference = -torch.arange(6.0).view(2, 3) - 20

    def loss(logps, lengths):
        if method == "dpo":
            return dpo_loss(*logps.chunk(2), *reference, beta=0.05)
        return {"redi": redi_loss, "simpo": simpo_loss}[method](*logps.chunk(2), *lengths.chunk(2))

    def ours(hidden, weight):
        return loss(*sequence_logps(in_chunks(hidden, weight, labels), labels, cu_seqlens))

    def naive(hidden, weight):
        logps, lengths = [], []
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
            logps.append(naive_token_logps(hidden[start:end], weight, labels[start:end]).sum())
            lengths.append(float((labels[start:end] != -100).sum()))
        return loss(torch.stack(logps), torch.tensor(lengths))

    results = []
    for function, convert in ((ours, lambda x: x), (naive, lambda x: x.float())):
        h, w = (convert(x).clone().requires_grad_() for x in (hidden, weight))
        out = function(h, w)
        out.sum().backward()
        results.append((out.detach(), h.grad.float(), w.grad.float()))
    torch.testing.assert_close(results[0][0], results[1][0], atol=tolerance, rtol=tolerance)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    for a, b in zip(results[0][1:], results[1][1:]):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=rtol)


def test_the_file_copied_alone_runs(tmp_path):
    shutil.copy(losses_module.__file__, tmp_path / "losses.py")
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import torch, losses\n"
        "hidden = torch.ones(4, 2, requires_grad=True)\n"
        "logps = losses.token_logps(hidden, torch.zeros(8, 2), torch.tensor([-100, 1, -100, 2]))\n"
        "sums, lengths = losses.sequence_logps(logps, torch.tensor([-100, 1, -100, 2]), torch.tensor([0, 2, 4]))\n"
        "loss = losses.redi_loss(*sums.chunk(2), *lengths.chunk(2), alpha=0.0)\n"
        "loss.sum().backward()\n"
        "assert not any(name.split('.')[0] == 'redi' for name in sys.modules)\n"
        "print(loss.item())\n"
    )
    run = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(math.log(8))
    assert {path.name for path in Path(tmp_path).iterdir()} <= {"losses.py", "__pycache__"}


@pytest.mark.parametrize("hidden, labels", [((6, 4), (4,)), ((2, 3, 4), (6,)), ((2, 3, 4), (2, 3)), ((4,), (4,))])
def test_hidden_and_labels_of_other_shapes_are_refused(hidden, labels):
    """B·L hidden states beside B·(L-1) labels would be paired with the wrong labels."""
    with pytest.raises(ValueError, match=f"{re.escape(str(hidden))}.*{re.escape(str(labels))}"):
        token_logps(torch.randn(hidden), torch.randn(7, 4), torch.zeros(labels, dtype=torch.int64))


def test_a_product_that_is_handed_in_computes_all_logits():
    hidden, weight = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels, shapes = torch.arange(9) % 7, []

    def product(a, b):
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return losses_module.fp32_product(a, b)

    ours = token_logps(hidden, weight, labels, chunk_size=4, product=product)
    assert torch.equal(ours, token_logps(hidden, weight, labels, chunk_size=4))
    assert shapes == [((3, 4), (7, 4))] * 3
    ours.sum().backward()
    assert shapes[3:] == [((3, 7), (4, 7)), ((3, 4), (7, 4)), ((3, 7), (4, 7)), ((3, 4), (7, 4)), ((3, 7), (4, 7))]
