"""The CUDA paths without a GPU, over fake tensors: shapes, dtypes, devices, waits, what a graph captures.

Nothing is computed: this finds no wrong number. The checks run in a process of their own, since tests/fake_cuda.py
makes a process believe in a GPU for good:    python -m tests.test_fake_cuda training compile inference defects
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.backends.registry import lookup_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from redi import attention, data, distributed, kernels, losses, model
from redi.evaluation import generation
from redi.training import dataset_logps
from redi.training import run
from redi.evaluation.generation import Request
from redi.model import CausalLM
from redi.hub import weights
from redi.hub.config import parse_config
from tests import fake_cuda, tiny

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {**tiny.QWEN2, "head_dim": 8, "num_hidden_layers": 2}
ONE_LAYER = {"num_hidden_layers": 1}
# Model, method, flags, forward passes of attention to one backward (of dpo, the reference's come on top).
RUNS = [
    ({"model_type": "qwen2", **ONE_LAYER}, "redi", [], 1),
    ({"model_type": "qwen3", "tie_word_embeddings": False, **ONE_LAYER}, "dpo", ["--recompute", "all"], None),
    ({"model_type": "llama", "num_key_value_heads": 6, **ONE_LAYER}, "simpo", ["--recompute", "nothing"], 1),
    ({"model_type": "qwen2"}, "sft", ["--recompute", "all", "--keep-layers", "1", "--micro-batch-tokens", "300"], 1.5),
]


def test_on_a_pretended_gpu():
    if reason := fake_cuda.why_not():
        pytest.skip(reason)
    checks = ["training", "compile", "inference", "defects"]  # in one process: most of a check's time is its imports'
    command = [sys.executable, "-W", "ignore", "-m", "tests.test_fake_cuda", *checks]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


@contextlib.contextmanager
def fake_gpu():
    """Tensors made in here are fake, and watched."""
    with FakeTensorMode(allow_non_fake_inputs=True), fake_cuda.Watch() as watch:
        with mock.patch.multiple(torch.cuda, graph=watch.capture, CUDAGraph=fake_cuda.Graph):
            yield watch


def check_training() -> None:
    for ranks in (1, 4):
        with process_group(ranks), tempfile.TemporaryDirectory() as folder:
            for changes, method, flags, passes in RUNS:
                seen = run_training(Path(folder), changes, method, flags).seen
                assert seen["aten.addmm.dtype_out"] and seen["aten._fused_adamw_.default"] == 4, method
                forward, backward = (seen[f"torch_attn._varlen_attn{name}.default"] for name in ("", "_backward"))
                assert backward and (passes is None or forward == passes * backward), method


@contextlib.contextmanager
def process_group(ranks: int):
    """This process is the first; the others do nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    mesh = distributed.init_device_mesh("cuda", (ranks,))  # made of real numbers, so not among fake tensors
    with mock.patch.object(distributed, "init_device_mesh", lambda *_: mesh):
        yield
    torch.distributed.destroy_process_group()


def run_training(folder: Path, changes: dict, method: str, flags: list[str]) -> fake_cuda.Watch:
    """train.py's own loop, two steps of it, with a stand-in for what is read from the disk onto the device."""
    tiny.write_rows(folder, examples=9)
    tiny.write_model(folder / "model", **{**SHAPE, **changes})
    file = "positives.jsonl" if method == "sft" else "pairs.jsonl"
    args = train.parse_args([
        method, "--model", str(folder / "model"), "--data", str(folder / file), "--output", str(folder / "out"),
        "--overwrite", "--steps", "2", "--batch-size", "4", "--save-every", "0", "--log-every", "9", *flags,
    ])  # fmt: skip
    assert args.dtype == "bfloat16"

    def reference(path, model, dataset, batch_size, micro_batch_tokens):  # computed, and not cached on disk
        return dataset_logps.completion_logps(model, dataset, batch_size, micro_batch_tokens, "reference")

    with fake_gpu() as watch, mock.patch.object(dataset_logps, "reference", reference):

        class WatchedRun(run.Run):
            def steps(self, *args):
                for step in super().steps(*args):
                    watch.waits, watch.places = 0, []
                    yield step

            def after_step(self, *args, **kwargs):
                super().after_step(*args, **kwargs)
                assert watch.waits == 1, f"{watch.waits} waits in a step of {method}:\n" + "\n".join(watch.places)

            def finish(self):
                for parameter in self.model.parameters():
                    assert parameter.dtype == torch.float32 and parameter.device.type == "cuda"
                    moments = self.optimizer.state[parameter]
                    assert moments["exp_avg"].dtype == moments["exp_avg_sq"].dtype == torch.float32

        everyone = lambda value: [value] * distributed.world_size()  # noqa: E731
        with (
            mock.patch.object(train, "Run", WatchedRun),
            mock.patch.object(weights, "load_weights"),
            mock.patch.multiple(distributed, all_gather_object=everyone, any_rank=bool),  # over Gloo, on the host
            mock.patch.object(losses, "logit_rows", lambda *_: 64),
        ):
            train.train(args)
    return watch


def check_compile() -> None:
    """Layers compiled one by one, as train.py does it: the code of the first serves all, whatever the lengths."""
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    layers, kept, lengths, graphs = 9, 3, (40, 64, 51), []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("eager")(graph, inputs)

    with fake_gpu() as watch:
        with torch.device("cuda"), default_dtype(torch.bfloat16):
            config = parse_config({**SHAPE, "vocab_size": 300, "num_hidden_layers": layers})
            lm = CausalLM(config, "all-but-attention", kept)
        for layer in lm.model.layers:
            layer.compile(backend=backend)
        for length in lengths:
            ids = torch.zeros(length, dtype=torch.int64, device="cuda")
            bounds = torch.zeros(3, dtype=torch.int32, device="cuda")
            lm(ids, ids, bounds, length - 3, ids, ids[3:]).sum().backward()
        with torch.no_grad():
            lm(ids, ids, bounds, length - 3, ids, ids[3:])
    assert len(graphs) == 3  # for the first length, for any length, and without gradients
    forward, backward = (watch.seen[f"torch_attn._varlen_attn{name}.default"] for name in ("", "_backward"))
    assert (forward, backward) == (layers * (len(lengths) + 1), layers * len(lengths))  # kept also where compiled


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


def check_inference() -> None:
    for changes, temperature in (
        ({"model_type": "qwen2"}, 0.6),
        ({"model_type": "qwen3", "tie_word_embeddings": False}, 0),
        ({"model_type": "llama", "num_key_value_heads": 6}, 0.6),
    ):
        # Prompts of several lengths, rows that end and move, a cache that grows twice.
        requests = [Request([5] * (3 + i // 2), i, 1 + 3 * i) for i in range(5)]
        assert run_sampling(requests, temperature, torch.bfloat16, changes).seen[FLASH]
    # Dense attention asks for lengths; what is read here is 1.
    watch = run_sampling([Request([5], i, 2) for i in range(2)], 0.6, torch.float32, {"model_type": "qwen2"})
    assert watch.seen[DENSE[0][2]] and not watch.seen[FLASH]
    for dtype, size, kernel in DENSE:
        check_packed_attention(dtype, size, kernel)


def run_sampling(requests: list[Request], temperature: float, dtype: torch.dtype, changes: dict) -> fake_cuda.Watch:
    with fake_gpu() as watch, mock.patch.object(generation, "CACHE_BLOCK", 4):
        with torch.device("cuda"), default_dtype(dtype):
            lm = CausalLM(parse_config({**SHAPE, "vocab_size": 300, **changes}))
        samples = sorted(generation.generate(lm, requests, (), temperature, max_batch_size=3))
    assert [len(ids) for _, ids, _ in samples] == [request.max_new_tokens for request in requests]
    return watch


FLASH = "aten._flash_attention_forward.default"
# What FlashAttention does not take as it is -> the kernel behind scaled_dot_product_attention.
DENSE = [
    (torch.float32, 8, "aten._scaled_dot_product_efficient_attention.default"),
    (torch.float32, 20, "aten._scaled_dot_product_efficient_attention.default"),
    (torch.bfloat16, 20, "aten._scaled_dot_product_flash_attention.default"),
    (torch.bfloat16, 264, "aten._scaled_dot_product_efficient_attention.default"),
]


def check_packed_attention(dtype: torch.dtype, size: int, kernel: str) -> None:
    """With fewer key heads than query heads, forward and backward: no tensor is quadratic in the tokens."""
    tokens, heads = 4096, 4
    with fake_gpu() as watch:
        q, k, v = (torch.ones(tokens, n, size, dtype=dtype, device="cuda", requires_grad=True) for n in (heads, 2, 2))
        assert not attention.uses_flash(q)
        bounds = mock.Mock()
        bounds.diff().tolist.return_value = [tokens - 1000, 1000]
        out = attention.packed_attention(q, k, v, bounds, tokens - 1000)
        out.sum().backward()
    assert (out.shape, out.dtype) == (q.shape, dtype) and k.grad.shape == k.shape
    name = kernel.removesuffix(".default").replace(".", "::", 1)
    assert watch.seen[kernel] and name in attention.ATTENTION_OPS
    assert watch.largest <= tokens * heads * -(-size // 8) * 8


def check_defects() -> None:
    """The checks themselves: what they are for, put in, is found."""
    rope, terms = model.rope_frequencies, train.metric_terms
    dense, reserve = attention._cached_dense, generation.KVCache.reserve

    def reserve_and_keep_graph(cache, *args):
        graph = cache.graph
        reserve(cache, *args)
        cache.graph = graph

    defects = {
        r"two.* devices,? cuda:0": (model, "rope_frequencies", lambda config, device: rope(config)),
        r"addmm.default of {torch.": (kernels, "rms_norm", lambda x, weight, eps: F.rms_norm(x.float(), x.shape[-1:])),
        "2 waits in a step": (train, "metric_terms", lambda method, loss, *rest: (
            terms(method, loss * loss.item(), *rest))),
        "aten.nonzero": (data.MicroBatch, "model_inputs", lambda self: (
            self.input_ids, self.position_ids, self.cu_seqlens, self.max_seqlen, self.labels)),
        "the host waits in a graph": (attention, "_cached_flash", dense),
        "in a graph uses the CPU": (model, "rope_frequencies", lambda config, device: rope(config).to(device)),
        "a graph is replayed on freed memory": (generation.KVCache, "reserve", reserve_and_keep_graph),
    }  # fmt: skip
    with process_group(1), tempfile.TemporaryDirectory() as folder:
        for words, (place, name, defect) in defects.items():
            run = check_inference if "graph" in words else partial(run_training, Path(folder), *RUNS[0][:3])
            with mock.patch.object(place, name, defect), pytest.raises(Exception, match=words):
                run()


if __name__ == "__main__":
    fake_cuda.pretend()
    for check in sys.argv[1:]:
        globals()[f"check_{check}"]()
    sys.stdout.flush()
    os._exit(0)  # torch would call back into an interpreter that has ended
