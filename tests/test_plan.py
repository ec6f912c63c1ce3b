"""--plan against the run that it foretells. A whole run's memory is compared on a GPU only."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import train
from redi.training import plan
from redi.model import CausalLM
from redi.hub.config import parse_config
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
# Qwen2.5-Math-1.5B
QWEN_1_5B = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
             "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
             "max_position_embeddings": 32768, "rope_theta": 300000.0, "rms_norm_eps": 1e-6,
             "tie_word_embeddings": True}


def run(folder: Path, *arguments: str, check=True) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=check)


def planned(folder: Path, *arguments: str) -> str:
    """What --plan prints; in this process, which saves the time to import torch."""
    out = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out):
        train.main([*arguments, "--output", "none", "--plan"])
    return out.getvalue()


def without_weights(folder: Path, name: str) -> Path:
    """A copy of the model directory, but for the weights, which a plan does not read."""
    copy = folder / name
    copy.mkdir(exist_ok=True)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (copy / file).write_bytes((folder / "model" / file).read_bytes())
    return copy


def figure(text: str, pattern: str) -> str:
    return re.search(pattern, text).group(1).replace(",", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plan")
    tiny.write_model(path / "model")
    tiny.write_rows(path, examples=23)
    return path


SETTINGS = {
    "redi": ["--data", "pairs.jsonl", "--batch-size", "5"],
    "sft": ["--data", "positives.jsonl", "--batch-size", "8"],
}


@pytest.mark.parametrize("method", SETTINGS)
def test_steps_and_tokens_are_those_of_a_real_run(folder, method):
    """With dropped rows, and a last step that is smaller."""
    settings = [method, *SETTINGS[method], "--epochs", "2", "--micro-batch-tokens", "300", "--seed", "3",
                "--max-response-tokens", "60", "--max-tokens", "80"]  # fmt: skip
    run(folder, *settings, "--model", "model", "--output", method)
    rows = tiny.read_rows(folder / method / "metrics.jsonl")
    text = planned(folder, *settings, "--model", str(without_weights(folder, "weightless")))
    assert not (folder / "none").exists()
    tokens = [row["tokens"] for row in rows]
    assert int(figure(text, r"steps +([\d,]+) of")) == len(rows)
    assert int(figure(text, r"tokens +([\d,]+);")) == sum(tokens)
    assert int(figure(text, r"a step ([\d,]+) to")) == min(tokens)
    assert int(figure(text, r" to ([\d,]+)\n")) == max(tokens)
    assert "(0 too long" not in text and "2 epochs" in text and "fits: " in text and "GiB of each rank" in text


def test_more_ranks_share_the_work(folder):
    settings = ["redi", "--model", "model", "--data", "pairs.jsonl", "--batch-size", "8", "--micro-batch-tokens", "400"]
    one, four = (planned(folder, *settings, "--world-size", ranks) for ranks in ("1", "4"))
    for pattern in (r"tokens +([\d,]+);", r"arithmetic +(\S+)", r"longest +(.*)"):
        assert figure(one, pattern) == figure(four, pattern)
    assert float(figure(four, r"micro-batches +(\S+)")) < float(figure(one, r"micro-batches +(\S+)"))
    assert float(figure(four, r"time +(\S+) h")) == pytest.approx(float(figure(one, r"time +(\S+) h")) / 4, rel=0.01)


MODES = [("nothing", 0), ("all", 0), ("all-but-attention", 0), ("all", 1), ("all-but-attention", 2), ("all", 9)]


@pytest.mark.parametrize("recompute, keep_layers", MODES)
@pytest.mark.parametrize("tied", [False, True])
def test_matrix_products_counted_by_torch(recompute, keep_layers, tied):
    layers = 3
    config = parse_config({**tiny.QWEN2, "vocab_size": 123, "tie_word_embeddings": tied})
    model = CausalLM(config, recompute, keep_layers)
    tiny.randomize(model, 0)
    length, answer = 47, 30
    labels = torch.full((length,), -100)
    labels[-answer:] = 5
    with FlopCounterMode(display=False) as counter:
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
        model(torch.arange(length), torch.arange(length), cu_seqlens, length, labels).sum().backward()
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    one_layer = 2 * 6 * 8 * length**2  # heads, head size
    attention = one_layer * (3 * layers + (max(0, layers - keep_layers) if recompute == "all" else 0))
    foretold = plan.training_flops(config, np.array([length]), np.array([answer]), recompute, keep_layers)[0]
    head_gradient = 2 * 123 * 48 * answer  # accumulated by addmm_, which the counter does not know
    assert foretold - attention == counted + head_gradient


def test_arithmetic_of_the_papers_model():
    """Worked out by hand: 1310.2M + 233.4M parameters in products, 86,016 FLOPs a token and its context."""
    config = parse_config(QWEN_1_5B)
    size = np.array([5500.0])
    per_token = plan.training_flops(config, size, 0 * size, "nothing")[0] / 5500
    assert per_token == pytest.approx(3 * (2 * 1310.2e6 + 86016 * 5500), rel=1e-4)
    with_labels = plan.training_flops(config, size, size, "nothing")[0] / 5500
    assert with_labels - per_token == pytest.approx(8 * 233.4e6, rel=2e-4)
    assert plan.forward_flops(config, size, size)[0] / 5500 == pytest.approx(2 * 1543.6e6 + 86016 * 5500, rel=1e-4)


def test_memory_of_the_papers_model_adds_up():
    config = parse_config(QWEN_1_5B)
    one, eight = (plan.peak_memory(config, 40960, ranks, 2, "all") for ranks in (1, 8))
    sharded = ["master weights (fp32)", "gradients (fp32)", "AdamW moments (fp32)"]
    # 16 bytes of each of 1543.7M parameters
    assert sum(one["loss"][name] for name in sharded) == pytest.approx(16 * 1543.7e6, rel=1e-4)
    for moment in one:
        for name in one[moment]:
            shares = 8 if name in sharded else 1
            assert one[moment][name] == pytest.approx(shares * eight[moment][name])
    kept = plan.peak_memory(config, 40960, 8, 2, "nothing")
    assert kept["loss"]["kept activations"] > 20 * eight["loss"]["kept activations"]
    # Logits of at most 2048 tokens are there, whatever the response's length.
    assert plan.peak_memory(config, 4096, 8, 2, "all")["loss"]["logits chunk"] == eight["loss"]["logits chunk"]


@pytest.mark.parametrize("model_type, layers, vocab_size, tokens, recompute, keep_layers", [
    *(("qwen2", 5, 1000, 1000, *mode) for mode in MODES[:3]), ("qwen3", 5, 1000, 1000, "nothing", 0),
    ("qwen2", 5, 1000, 1000, "all", 2), ("qwen2", 5, 1000, 1000, "all-but-attention", 3),
    ("qwen2", 1, 10000, 6710, "all", 0),  # two full chunks of logits
])  # fmt: skip
def test_memory_of_the_model_against_torchs_count(model_type, layers, vocab_size, tokens, recompute, keep_layers):
    """Forward and backward without FSDP and AdamW, whose tensors are left out of the plan; in fp32 on a CPU."""
    shape = {**tiny.QWEN2, "hidden_size": 128, "intermediate_size": 704, "num_attention_heads": 4, "head_dim": 32}
    changes = {"model_type": model_type, "num_hidden_layers": layers, "vocab_size": vocab_size}
    config = parse_config({**shape, **changes})
    model = CausalLM(config, recompute, keep_layers)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    ids, cu_seqlens = torch.zeros(tokens, dtype=torch.int64), torch.tensor([0, 600, tokens], dtype=torch.int32)
    tracker = MemTracker()
    tracker.track_external(model)
    with tracker:
        model(ids, ids, cu_seqlens, tokens - 600, ids).sum().backward()
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    foreseen = plan.peak_memory(config, tokens, 1, 4, recompute, keep_layers, on_gpu=False)
    for column in foreseen.values():
        del column["AdamW moments (fp32)"]
        assert column.get("gathered weights", 0) == column.get("gradients of one layer and the head", 0) == 0
    assert max(sum(column.values()) for column in foreseen.values()) == pytest.approx(counted, rel=0.1)


def test_what_does_not_fit(folder):
    """A larger model's config is enough: no weights stand behind it."""
    path = without_weights(folder, "wide") / "config.json"
    config = json.loads(path.read_text()) | QWEN_1_5B | {"head_dim": 128, "rope_parameters": None}
    path.write_text(json.dumps(config))

    def verdict(*more: str) -> list[str]:
        text = planned(folder, "redi", "--model", "wide", "--data", "pairs.jsonl", *more)
        return text.splitlines()[-2:]

    too_small = verdict("--memory-gib", "20")
    assert too_small[0].startswith("does not fit: ") and "--world-size" in too_small[1]
    assert verdict("--memory-gib", "80", "--world-size", "8")[0].startswith("fits: ")


def test_the_fastest_setting_that_fits_is_named(folder):
    """Against every setting by itself: what the plan says of its memory and its arithmetic."""

    def plan_of(*more: str) -> str:
        return planned(folder, "redi", "--model", "model", "--data", "pairs.jsonl", *more)

    config = parse_config(json.loads((folder / "model" / "config.json").read_text()))
    every = {}
    for name, layers in [("nothing", 0), *((name, n) for name in ("all", "all-but-attention") for n in range(3))]:
        flags = "--recompute", name, "--keep-layers", str(layers)
        text = plan_of(*flags, "--memory-gib", "0.001")  # where nothing fits
        assert "no --recompute takes less than 90%" in text
        table = plan.peak_memory(config, int(figure(text, r"largest ([\d,]+) tokens")), 1, 2, name, layers)
        every[flags] = plan.peak_gib(table), float(figure(text, r"arithmetic +(\S+) FLOPs"))
    named = set()
    for memory in {gib / 0.899 for gib, _ in every.values()}:
        text = plan_of("--memory-gib", str(memory))
        flags = re.search(r"fastest setting .*: (--recompute \S+ --keep-layers \d) ", text).group(1)
        fitting = {" ".join(flags): flops for flags, (gib, flops) in every.items() if gib <= 0.9 * memory}
        assert fitting[flags] == min(fitting.values())
        named.add(flags)
    assert "--recompute nothing --keep-layers 0" in named and len(named) >= 5


@pytest.mark.parametrize("flag, value", [("--utilization", "0"), ("--world-size", "0"), ("--memory-gib", "-1")])
def test_bad_settings(folder, flag, value):
    with pytest.raises(ValueError, match=f"{flag}.*{value}"):
        planned(folder, "redi", "--model", "model", "--data", "pairs.jsonl", flag, value)


def test_described_gpus_do_not_change_what_a_run_on_a_cpu_computes_in():
    args = ["redi", "--model", "m", "--data", str(ROOT / "README.md"), "--output", "o", "--world-size", "8"]
    assert train.parse_args(args).dtype == ("bfloat16" if torch.cuda.is_available() else "float32")
    assert train.parse_args([*args, "--plan"]).dtype == "bfloat16"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="peak memory can be foretold only for a GPU: pytest -m gpu")
def test_peak_memory_within_15_percent_on_a_gpu(folder):
    sized = {**QWEN_1_5B, "num_hidden_layers": 8, "max_position_embeddings": 512}
    tiny.write_model(folder / "large", **{key: sized[key] for key in sized if key != "model_type"})
    settings = ["redi", "--model", "large", "--data", "pairs.jsonl", "--batch-size", "23", "--steps", "3"]
    text = run(folder, *settings, "--output", "none", "--plan").stdout
    run(folder, *settings, "--output", "large-run")
    rows = tiny.read_rows(folder / "large-run" / "metrics.jsonl")
    assert float(figure(text, r"fit[^:]*: (\S+) of")) == pytest.approx(rows[-1]["peak_memory_gib"], rel=0.15)
