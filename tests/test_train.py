"""The training command: the same numbers on any number of processes, exact resumption, and survival of faults."""

import dataclasses
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from redi import data
from redi.training import checkpoint
from redi.training import run as run_module
from redi.losses import dpo_loss, redi_loss, simpo_loss
from redi.hub.weights import load_pretrained
from redi.tokenizer import Tokenizer
from tests import tiny, train_jobs

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("sft", "redi", "dpo", "simpo")
EXAMPLES, BATCH_SIZE = 20, 8  # three steps an epoch, the last of 4 examples
SETTINGS = {"batch-size": BATCH_SIZE, "epochs": 2, "lr": 1e-3, "save-every": 2, "keep-checkpoints": 0,
            "max-grad-norm": 0.5}
STEPS = 6
FIELDS = ["step", "epoch", "loss", "chosen_logp", "rejected_logp", "margin", "reward_accuracy", "reference_gap",
          "grad_norm", "lr", "lr_grad_norm", "tokens", "tokens_per_second", "peak_memory_gib", "seconds", "skipped"]


@pytest.fixture(scope="module", autouse=True)
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/, positives.jsonl, pairs.jsonl, and below runs/ one finished run of each method in this process."""
    place = tmp_path_factory.mktemp("train")
    tiny.write_model(place / "model", hidden_size=36, intermediate_size=50, num_hidden_layers=2)
    tiny.write_rows(place, examples=EXAMPLES)
    for method in METHODS:
        with train_jobs.capture_gradients(place / f"one-{method}.gradients"):
            train.main(arguments(place, method, place / "one" / method))
    return place


def arguments(place, method, output, **changes) -> list[str]:
    values = {"model": place / "model", "output": output,
              "data": place / ("positives.jsonl" if method == "sft" else "pairs.jsonl"),
              "beta": 0.5 if method in ("dpo", "simpo") else None, **SETTINGS}
    values |= {key.replace("_", "-"): value for key, value in changes.items()}
    words = [method]
    for key, value in values.items():  # True is a flag without a value, None takes a setting out
        if value is not None:
            words += [f"--{key}"] + ([] if value is True else [str(value)])
    return words


@pytest.fixture(scope="module")
def two(place):
    """Everything that needs two processes, in one launch: name -> outcome of each rank."""
    out = place / "two"
    jobs = {}
    for method in METHODS:
        jobs[method] = {"argv": arguments(place, method, out / method),
                        "gradients": str(place / f"two-{method}.gradients")}
    for method in ("sft", "redi"):
        jobs[f"{method}-small"] = {"argv": arguments(place, method, out / f"{method}-small", micro_batch_tokens=150),
                                   "gradients": str(place / f"two-{method}-small.gradients")}
    stopped = arguments(place, "redi", out / "stopped")
    jobs["stop"] = {"argv": stopped, "stop_at": 3}
    jobs["stop again"] = {"argv": [*stopped, "--resume"], "stop_at": 5}
    jobs["go on"] = {"argv": [*stopped, "--resume"]}
    jobs["finished"] = {"argv": [*stopped, "--resume"]}
    jobs["unwritable"] = {"argv": arguments(place, "redi", out / "unwritable"), "unwritable_at": 4}
    cut_back(place / "one" / "redi", out / "from-one", step=2)
    jobs["from one"] = {"argv": arguments(place, "redi", out / "from-one", resume=True)}
    jobs["copy"] = {"argv": arguments(place, "redi", out / "unused"),
                    "copy": [str(place / "one" / "redi" / "step-000004"), str(out / "copied")]}
    jobs["bad data"] = {"argv": arguments(place, "redi", out / "bad", data=place / "absent.jsonl")}
    jobs["other run"] = {"argv": arguments(place, "redi", out / "redi")}
    path = place / "jobs.json"
    path.write_text(json.dumps(list(jobs.values())))
    run = torchrun(2, ROOT / "tests" / "train_jobs.py", path)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(jobs, json.loads(Path(f"{path}.outcomes").read_text())))


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}


def torchrun(processes, *words, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
               "--master-port", str(tiny.free_port()), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), **options)


def cut_back(run, copy, step):
    """Copy a run as it was when the checkpoint of this step was its newest and it went on for a bit."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "final")
    for path in checkpoint.checkpoints(copy):
        if path.name > checkpoint.step_name(step):
            shutil.rmtree(path)
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(lines[: step + 1]) + '{"step": 99, "lo')  # one too many, one cut off


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def column(run, key):
    return torch.tensor([row[key] for row in metrics(run)], dtype=torch.float64)


def weights(run) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()


def same_run(a, b) -> bool:
    """Bitwise the same weights, and the same numbers in the log but for the clock."""
    def untimed(run):
        return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gib")}
                for row in metrics(run)]

    return weights(a) == weights(b) and untimed(a) == untimed(b)


# One step against plain torch


def first_step_by_hand(place, method):
    """Loss of the first batch and its gradients: one sequence at a time, all logits, none of the training code."""
    tokenizer = Tokenizer.from_pretrained(place / "model")
    model, reference = load_pretrained(place / "model"), load_pretrained(place / "model")
    file = place / ("positives.jsonl" if method == "sft" else "pairs.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]

    def logp(model, row, key):
        prompt = tokenizer.encode(tokenizer.render_prompt(row["prompt"]))
        text = row[key][0]["content"]
        assert text.startswith("<think>\n")
        response = tokenizer.encode("<think>\n") + tokenizer.encode(text[8:]) + [tokenizer.end_of_turn_id]
        ids = torch.tensor(prompt + response)

        def attend(q, k, v):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1).transpose(0, 1) for x in (k, v))
            scores = q.transpose(0, 1) @ k.transpose(1, 2) / math.sqrt(q.shape[2])
            mask = torch.ones(len(q), len(q)).triu(1).bool()
            return (scores.masked_fill(mask, -math.inf).softmax(-1) @ v).transpose(0, 1)

        hidden = model.hidden(ids[:-1], torch.arange(len(ids) - 1), [attend] * model.config.num_hidden_layers)
        logps = model.logits(hidden).log_softmax(-1)[torch.arange(len(ids) - 1), ids[1:]]
        return logps[len(prompt) - 1 :].sum(), len(response)

    batch = [rows[i] for i in data.epoch_order(EXAMPLES, 0, 0)[:BATCH_SIZE]]
    if method == "sft":
        sums, lengths = zip(*(logp(model, row, "completion") for row in batch))
        loss = -sum(sums) / sum(lengths)
        chosen = torch.stack([s / n for s, n in zip(sums, lengths)])
        rejected = None
    else:
        (chosen, n), (rejected, m) = (
            map(torch.stack, zip(*((s, torch.tensor(float(c))) for s, c in (logp(model, row, key) for row in batch))))
            for key in ("chosen", "rejected")
        )
        if method == "redi":
            losses = redi_loss(chosen, rejected, n, m, 0.8)
        elif method == "simpo":
            losses = simpo_loss(chosen, rejected, n, m, 0.5, 1.0)
        else:
            with torch.no_grad():
                chosen_reference = torch.stack([logp(reference, row, "chosen")[0] for row in batch])
                rejected_reference = torch.stack([logp(reference, row, "rejected")[0] for row in batch])
            losses = dpo_loss(chosen, rejected, chosen_reference, rejected_reference, 0.5)
        loss = losses.sum() / len(batch)
        chosen, rejected = chosen / n, rejected / m
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}, chosen.detach(), rejected


@pytest.mark.parametrize("method", METHODS)
def test_first_step_equals_plain_torch(place, two, method):
    loss, gradients, chosen, rejected = first_step_by_hand(place, method)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    runs = {f"one-{method}": place / "one" / method, f"two-{method}": place / "two" / method}
    if method in ("sft", "redi"):
        runs[f"two-{method}-small"] = place / "two" / f"{method}-small"
    for name, run in runs.items():
        first = metrics(run)[0]
        assert first["loss"] == pytest.approx(loss, abs=5e-6)
        assert first["grad_norm"] == pytest.approx(norm, abs=1e-6 * max(1, norm) * 5)
        assert first["chosen_logp"] == pytest.approx(chosen.mean().item(), abs=5e-6)
        if rejected is not None:
            assert first["rejected_logp"] == pytest.approx(rejected.mean().item(), abs=5e-6)
            assert first["reward_accuracy"] == (chosen > rejected).float().mean().item()
        captured = load_file(place / f"{name}.gradients")
        assert captured.keys() == gradients.keys()
        for key, gradient in gradients.items():
            torch.testing.assert_close(captured[key], gradient, atol=1e-6, rtol=1e-5, msg=f"{name} {key}")


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_give_the_losses_of_one(place, two, method):
    assert two[method] == ["ok", "ok"]
    for key, tolerance in (("loss", 5e-6), ("chosen_logp", 5e-6), ("lr", 0), ("tokens", 0)):
        one, other = column(place / "one" / method, key), column(place / "two" / method, key)
        torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=f"{key}: {one} {other}")


def test_micro_batches_do_not_change_the_losses(place, two, tmp_path):
    for method in ("sft", "redi"):
        train.main(arguments(place, method, tmp_path / method, micro_batch_tokens=1, save_every=0))  # one example each
        one = column(place / "one" / method, "loss")
        for run in (tmp_path / method, place / "two" / f"{method}-small"):
            torch.testing.assert_close(column(run, "loss"), one, atol=5e-6, rtol=0)


@pytest.mark.parametrize("changes", [{"recompute": "all"}, {"recompute": "nothing"}, {"keep_layers": 1}], ids=str)
def test_what_is_computed_again_does_not_change_the_run(place, tmp_path, changes):
    train.main(arguments(place, "redi", tmp_path / "run", **changes))
    assert same_run(place / "one" / "redi", tmp_path / "run")


def test_the_same_command_gives_the_same_bytes_and_another_seed_another_order(place, tmp_path):
    train.main(arguments(place, "redi", tmp_path / "again"))
    assert same_run(place / "one" / "redi", tmp_path / "again")
    train.main(arguments(place, "redi", tmp_path / "seed", seed=1, steps=1, epochs=None))
    assert metrics(tmp_path / "seed")[0]["tokens"] != metrics(tmp_path / "again")[0]["tokens"]


# The log


@pytest.mark.parametrize("method", METHODS)
def test_metrics_have_every_field_of_every_step(place, method):
    rows = metrics(place / "one" / method)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and [row["epoch"] for row in rows] == [0] * 3 + [1] * 3
    absent = {"rejected_logp", "margin", "reward_accuracy"} if method == "sft" else set()
    absent |= {"reference_gap"} if method != "dpo" else set()
    for row in rows:
        assert list(row) == [key for key in FIELDS if key not in absent]
        assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in row.values())
        assert row["lr_grad_norm"] == pytest.approx(row["lr"] * row["grad_norm"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert 0 < row["peak_memory_gib"] < 16 and row["skipped"] == 0
        if method != "sft":
            assert row["margin"] == pytest.approx(row["chosen_logp"] - row["rejected_logp"], abs=1e-6)
            assert 0 <= row["reward_accuracy"] <= 1
    # Warm-up over a tenth of 6 steps, rounded up: 1; then linear to zero.
    assert [row["lr"] for row in rows] == pytest.approx([1e-3 * x / 5 for x in (5, 5, 4, 3, 2, 1)])


def test_grad_norm_is_that_before_clipping(place):
    first = metrics(place / "one" / "redi")[0]
    gradients = load_file(place / "one-redi.gradients")
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-6) and norm > SETTINGS["max-grad-norm"]


def parameters(directory) -> list[torch.Tensor]:
    return [p.detach() for p in load_pretrained(directory).parameters()]


def test_weights_after_a_step_are_those_of_torchs_adamw(place, tmp_path):
    """Clipping, learning rate, weight decay on matrices only, and bias correction: by AdamW on the gradients."""
    train.main(arguments(place, "redi", tmp_path / "run", save_every=1, weight_decay=0.5, steps=1, epochs=None))
    gradients = load_file(place / "one-redi.gradients")
    model = load_pretrained(place / "model")
    norm = metrics(place / "one" / "redi")[0]["grad_norm"]
    for name, parameter in model.named_parameters():
        decay = 0.0 if name.endswith(("norm.weight", "bias")) else 0.5
        parameter.grad = gradients[name] * SETTINGS["max-grad-norm"] / norm
        torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=decay).step()
    for (name, ours), theirs in zip(model.named_parameters(), parameters(tmp_path / "run" / "final")):
        torch.testing.assert_close(ours.detach(), theirs, atol=2e-6, rtol=1e-5, msg=name)


def test_bf16_computes_near_fp32_over_fp32_master_weights(place, tmp_path):
    train.main(arguments(place, "redi", tmp_path / "run", dtype="bfloat16"))
    fp32 = column(place / "one" / "redi", "loss")
    torch.testing.assert_close(column(tmp_path / "run", "loss"), fp32, atol=0.03, rtol=0)
    assert all(t.dtype == torch.bfloat16 for t in load_file(tmp_path / "run" / "final" / "model.safetensors").values())
    assert json.loads((tmp_path / "run" / "final" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    state = load_file(tmp_path / "run" / "step-000002" / "training_state" / "rank-00000-of-00001.safetensors")
    assert all(t.dtype == torch.float32 for key, t in state.items() if key != "rng_state")


def test_final_directory_holds_the_tokenizer_and_the_changed_context(place, tmp_path):
    train.main(arguments(place, "sft", tmp_path / "run", steps=1, epochs=None, rope_theta=300000.0,
                         max_position_embeddings=2048))
    raw = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert raw["rope_theta"] == raw["rope_parameters"]["rope_theta"] == 300000.0
    assert raw["max_position_embeddings"] == 2048
    assert Tokenizer.from_pretrained(tmp_path / "run" / "final").encode("1+2") == (
        Tokenizer.from_pretrained(place / "model").encode("1+2")
    )


# Held-out rows


@pytest.fixture
def held_out(tmp_path):
    (tmp_path / "held_out").mkdir()
    tiny.write_rows(tmp_path / "held_out", examples=5, seed=9)
    return tmp_path / "held_out"


def measured(run) -> dict[int, dict]:
    return {row["step"]: row for row in metrics(run) if "eval_chosen_logp" in row}


@pytest.mark.parametrize("method", METHODS)
def test_held_out_rows_are_measured_before_the_first_step_and_then_every_so_often(place, held_out, tmp_path, method):
    file = held_out / ("positives.jsonl" if method == "sft" else "pairs.jsonl")
    train.main(arguments(place, method, tmp_path / "run", eval_data=file, eval_every=4, save_every=3))
    logged = measured(tmp_path / "run")
    assert list(logged) == [0, 4, 6] and list(logged[0])[:2] == ["step", "eval_chosen_logp"]
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(7))
    # As training on those rows alone sees them, with a rate too small to change anything.
    once = {"lr": 1e-30, "steps": 1, "epochs": None, "batch_size": 5, "data": file}
    for step, model in ((0, place / "model"), (6, tmp_path / "run" / "final")):
        train.main(arguments(place, method, tmp_path / f"at-{step}", model=model, **once))
        first = metrics(tmp_path / f"at-{step}")[0]
        for key in ("chosen_logp", "rejected_logp", "margin"):
            assert (key in first) == (f"eval_{key}" in logged[step])
            if key in first:
                assert logged[step][f"eval_{key}"] == pytest.approx(first[key], abs=5e-6)
    for key in ("loss", "grad_norm"):
        untouched = column(place / "one" / method, key).tolist()
        assert [row[key] for row in metrics(tmp_path / "run")[1:]] == untouched


def test_held_out_rows_are_measured_at_every_save_unless_asked_otherwise(place, held_out, tmp_path):
    train.main(arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl"))
    assert list(measured(tmp_path / "run")) == [0, 2, 4, 6]


CURVES = {  # held-out (chosen LogPS, margin) at steps 0, 2, 4, 6 -> the best step
    "the largest margin": ([(-1.0, 0.0), (-1.1, 0.3), (-1.2, 0.2), (-1.3, 0.1)], 2),
    "the last": ([(-1.0, 0.0), (-1.1, 0.3), (-1.2, 0.2), (-1.3, 0.4)], 6),
    "a collapsed one is none": ([(-1.0, 0.0), (-1.1, 0.1), (-2.6, 0.9), (-1.2, 0.05)], 2),
    "all have collapsed": ([(-1.0, 0.0), (-3.0, 0.3), (-4.0, 0.5), (-5.0, 0.7)], None),
    "not a number": ([(-1.0, 0.0), (-1.1, 0.1), (math.nan, math.nan), (math.nan, math.nan)], 2),
}


@pytest.mark.parametrize("curve", CURVES)
def test_the_best_evaluation_is_kept_and_is_none_that_has_collapsed(place, held_out, tmp_path, curve, capsys):
    values, best = CURVES[curve]
    rows = iter([{"eval_chosen_logp": chosen, "eval_rejected_logp": chosen - margin, "eval_margin": margin}
                 for chosen, margin in values])
    run = arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl", eval_every=2, save_every=3)
    with mock.patch.object(train.dataset_logps, "held_out", lambda *_, **__: next(rows)):
        with train_jobs.signal_at(3), pytest.raises(SystemExit):
            train.main(run)
        train.main([*run, "--resume"])  # earlier evaluations count
    assert [row["best_step"] for row in measured(tmp_path / "run").values() if row["step"]][-1] == best
    assert (tmp_path / "run" / "best").is_dir() == (best is not None)
    if best:
        saved = place / "one" / "redi" / f"step-{best:06d}" / "model.safetensors"
        assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == saved.read_bytes()
        load_pretrained(tmp_path / "run" / "best")
    out = capsys.readouterr().out
    if curve == "a collapsed one is none":
        assert "step 2: held-out margin 0.1000, chosen LogPS -0.100 since the start: the best so far" in out
        assert "step 4: held-out margin 0.9000, chosen LogPS -1.600 since the start, a loss of more than 1.5" in out
        assert out.count("the best so far") == 1


def test_the_best_of_sft_has_the_likeliest_held_out_responses(place, held_out, tmp_path):
    rows = iter([{"eval_chosen_logp": value} for value in (-3.0, -1.0, -2.0, -2.5)])
    with mock.patch.object(train.dataset_logps, "held_out", lambda *_, **__: next(rows)):
        train.main(arguments(place, "sft", tmp_path / "run", eval_data=held_out / "positives.jsonl"))
    assert measured(tmp_path / "run")[6]["best_step"] == 2
    train.main(arguments(place, "redi", tmp_path / "run", overwrite=True, steps=1, epochs=None))
    assert not (tmp_path / "run" / "best").exists()


def test_a_best_that_cannot_be_written_leaves_the_one_before(place, held_out, tmp_path, capsys):
    rows = iter([{"eval_chosen_logp": value} for value in (-3.0, -2.0, -1.0, -1.5)])
    save, failed = checkpoint.save_pretrained, []

    def failing(model, directory, *rest):
        if directory.name == "best.partial" and (tmp_path / "run" / "best").exists() and not failed:
            failed.append(True)
            raise OSError(28, "No space left on device")
        save(model, directory, *rest)

    with (mock.patch.object(train.dataset_logps, "held_out", lambda *_, **__: next(rows)),
          mock.patch.object(checkpoint, "save_pretrained", failing)):
        train.main(arguments(place, "sft", tmp_path / "run", eval_data=held_out / "positives.jsonl"))
    assert "not saved: [Errno 28]" in capsys.readouterr().out
    assert [row["best_step"] for row in measured(tmp_path / "run").values() if row["step"]] == [2, 2, 6]
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize("data", ["changed", None])
def test_other_held_out_rows_are_refused_when_a_run_is_resumed(place, held_out, tmp_path, data):
    run = arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl")
    with train_jobs.signal_at(3), pytest.raises(SystemExit):
        train.main(run)
    if data:
        rows = (held_out / "pairs.jsonl").read_text().splitlines(keepends=True)
        (held_out / "pairs.jsonl").write_text("".join(rows[1:]))
    else:
        run = arguments(place, "redi", tmp_path / "run")
    with pytest.raises(ValueError, match="--eval-data .*changed"):
        train.main([*run, "--resume"])


# DPO's reference


def test_dpo_begins_at_ln_2_and_keeps_its_reference(place, tmp_path, capsys):
    assert metrics(place / "one" / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    files = {path: path.stat().st_mtime_ns for path in place.glob("pairs.jsonl.reference-*")}
    assert len(files) == 1
    train.main(arguments(place, "dpo", tmp_path / "again", steps=1, epochs=None))
    assert {path: path.stat().st_mtime_ns for path in place.glob("pairs.jsonl.reference-*")} == files

    other = tmp_path / "model"
    shutil.copytree(place / "model", other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.1
    save_file(tensors, other / "model.safetensors")
    train.main(arguments(place, "dpo", tmp_path / "other", model=other, steps=1, epochs=None))
    now = set(place.glob("pairs.jsonl.reference-*"))
    assert len(now) == 2 and metrics(tmp_path / "other")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    new, = now - set(files)
    new.write_bytes(new.read_bytes()[:-5])
    with pytest.raises(ValueError, match="pairs.jsonl.reference-.* is corrupt .*delete it"):
        train.main(arguments(place, "dpo", tmp_path / "damaged", model=other, steps=1, epochs=None))
    new.unlink()


# Stop and go on


def test_stopped_and_resumed_with_two_processes_is_the_uninterrupted_run(place, two):
    assert two["stop"] == two["stop again"] == ["SystemExit: 143"] * 2  # though one rank alone got the signal
    assert two["go on"] == two["finished"] == ["ok", "ok"]
    assert same_run(place / "two" / "redi", place / "two" / "stopped")


def test_stopped_and_resumed_in_one_process_is_the_uninterrupted_run(place, tmp_path, capsys):
    run = arguments(place, "redi", tmp_path / "run", resume=True)  # which also begins a run
    for step in (3, 4):
        with train_jobs.signal_at(step), pytest.raises(SystemExit) as stopped:
            train.main(run)
        assert stopped.value.code == 143
        assert f"stopped after step {step} of 6: run the same command to continue" in capsys.readouterr().out
        assert len(metrics(tmp_path / "run")) == step
    train.main(run)
    assert same_run(place / "one" / "redi", tmp_path / "run")
    before = weights(tmp_path / "run")
    train.main(run)
    assert "final exists: nothing to do" in capsys.readouterr().out and weights(tmp_path / "run") == before


def test_resumed_with_another_number_of_processes(place, two, tmp_path):
    assert two["from one"] == ["ok", "ok"]
    cut_back(place / "two" / "redi", tmp_path / "from-two", step=4)
    train.main(arguments(place, "redi", tmp_path / "from-two", resume=True))
    for run in (place / "two" / "from-one", tmp_path / "from-two"):
        assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4, 5, 6]
        torch.testing.assert_close(column(run, "loss"), column(place / "one" / "redi", "loss"), atol=5e-6, rtol=0)


def test_training_state_moves_between_one_and_two_processes_bitwise(place, two, tmp_path):
    """Saved by one process, loaded and saved by two, loaded and saved by one."""
    assert two["copy"] == ["ok", "ok"]
    copied = place / "two" / "copied" / "step-000004"
    assert len(list((copied / "training_state").glob("rank-*"))) == 2
    train_jobs.copy_checkpoint(arguments(place, "redi", tmp_path / "unused"), copied, tmp_path)
    original = place / "one" / "redi" / "step-000004"
    for file in ("model.safetensors", "training_state/rank-00000-of-00001.safetensors", "training_state/state.json"):
        assert (original / file).read_bytes() == (tmp_path / "step-000004" / file).read_bytes(), file


def test_changed_settings_and_other_runs_are_refused_on_every_rank(place, two):
    assert two["bad data"] == [f"ValueError: {place}/absent.jsonl: no such data file"] * 2
    assert all("contains another run" in outcome for outcome in two["other run"])


def test_overwriting_replaces_the_whole_run(place, tmp_path):
    shutil.copytree(place / "one" / "simpo", tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    train.main(arguments(place, "redi", tmp_path / "run", overwrite=True, save_every=3))
    assert same_run(place / "one" / "redi", tmp_path / "run")
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == ["step-000003", "step-000006"]
    assert (tmp_path / "run" / "notes.txt").exists()  # what is not a run's is left alone


@pytest.mark.parametrize("save_every", [2, 0])
def test_a_signal_while_the_final_model_is_written_loses_nothing(place, tmp_path, capsys, save_every):
    save = checkpoint.save_pretrained

    def interrupted(model, directory, *rest):
        if directory.name == "final.partial":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)
        save(model, directory, *rest)

    with mock.patch.object(checkpoint, "save_pretrained", interrupted), pytest.raises(SystemExit) as stopped:
        train.main(arguments(place, "redi", tmp_path / "run", save_every=save_every))
    assert stopped.value.code == 143 and weights(tmp_path / "run") == weights(place / "one" / "redi")


def test_a_run_that_stopped_on_collapse_stays_stopped(place, tmp_path):
    """Also when torchrun starts it again, which is what --resume stands for here."""
    run = arguments(place, "redi", tmp_path / "run", stop_on_collapse=True)
    with mock.patch.object(run_module, "watch", side_effect=[None, None, "step 3: collapse?"]):
        with pytest.raises(ValueError, match="stopped after step 3, as --stop-on-collapse asks"):
            train.main(run)
    with pytest.raises(ValueError, match="stopped after step 3, as --stop-on-collapse asks"):
        train.main([*run, "--resume"])
    assert len(metrics(tmp_path / "run")) == 3 and not (tmp_path / "run" / "final").exists()
    train.main(arguments(place, "redi", tmp_path / "run", resume=True))  # the user decides otherwise
    assert same_run(place / "one" / "redi", tmp_path / "run")


@pytest.mark.parametrize("method", ["redi", "dpo"])
def test_a_run_knows_its_model_and_data_by_their_content(place, tmp_path, method, monkeypatch):
    shutil.copytree(place / "model", tmp_path / "model")
    shutil.copy(place / "pairs.jsonl", tmp_path / "pairs.jsonl")
    run = {"model": tmp_path / "model", "data": tmp_path / "pairs.jsonl", "resume": True}
    with train_jobs.signal_at(3), pytest.raises(SystemExit):
        train.main(arguments(place, method, tmp_path / "run", **run))
    (tmp_path / "moved").mkdir()
    for name in ("model", "pairs.jsonl"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    monkeypatch.chdir(tmp_path / "moved")
    run |= {"model": "./model/", "data": "pairs.jsonl"}
    tensors = load_file("model/model.safetensors")
    save_file({**tensors, "model.norm.weight": tensors["model.norm.weight"] * 1.1}, "model/model.safetensors")
    with pytest.raises(ValueError, match="--model ./model/ .*changed"):
        train.main(arguments(place, method, tmp_path / "run", **run))
    save_file(tensors, "model/model.safetensors", metadata={"format": "pt"})
    shutil.copy(place / "model" / "model.safetensors", "model/model.safetensors")
    train.main(arguments(place, method, tmp_path / "run", **run))
    assert same_run(place / "one" / method, tmp_path / "run")


def test_links_in_place_of_an_output_or_of_checkpoints(place, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    with pytest.raises(ValueError, match=f"{tmp_path}/link is a link to {tmp_path}/absent"):
        train.main(arguments(place, "redi", tmp_path / "link"))
    run, moved = tmp_path / "run", tmp_path / "moved"
    cut_back(place / "one" / "redi", run, step=4)
    for step in ("step-000002", "step-000004"):
        shutil.move(run / step, moved / step)
        (run / step).symlink_to(moved / step)
    train.main(arguments(place, "redi", run, resume=True, keep_checkpoints=1))
    assert [path.name for path in checkpoint.checkpoints(run)] == ["step-000006"]
    assert same_run(place / "one" / "redi", run)
    shutil.move(run / "step-000006", moved / "step-000006")
    (run / "step-000006").symlink_to(moved / "step-000006")
    shutil.rmtree(run / "final")
    (run / "final").symlink_to(tmp_path / "absent")
    train.main(arguments(place, "redi", run, overwrite=True, save_every=0))
    assert same_run(place / "one" / "redi", run) and not checkpoint.checkpoints(run)
    assert len(list(moved.glob("*/training_state"))) == 3  # what the links pointed to is the user's


def test_a_run_of_the_first_version_goes_on(place, held_out, tmp_path):
    """Its record names every method's settings and none that came later; its state lacks the held-out start."""
    run = tmp_path / "run"
    cut_back(place / "one" / "dpo", run, step=4)
    record = json.loads((run / "run.json").read_text())
    record["settings"] |= {"alpha": "0.8", "gamma": "1.0", "loss_on_prompt": "False", "gradient_checkpointing": "True"}
    del record["model_digest"], record["eval_data_digest"]
    for key in ("label_smoothing", "append_end_of_text", "weight_decay"):  # as if these had come later
        del record["settings"][key]
    (run / "run.json").write_text(json.dumps(record, indent=2))
    path = run / "step-000004" / "training_state" / "state.json"
    state = json.loads(path.read_text())
    del state["held_out_start"]
    state["collapse"]["first"]["update_norm"] = 0.1
    state["digest"] = checkpoint._state_digest(state)
    path.write_text(json.dumps(state, indent=2))
    train.main(arguments(place, "dpo", run, resume=True, eval_data=held_out / "pairs.jsonl"))
    assert weights(run) == weights(place / "one" / "dpo")
    assert list(measured(run)) == [6]  # the first measurement, at step 4, is the start; that step has its line
    with pytest.raises(ValueError, match="was begun with --label-smoothing 0.0, not 0.1"):
        (run / "final").rename(tmp_path / "final")
        train.main(arguments(place, "dpo", run, resume=True, label_smoothing=0.1))


def wait_for_lines(path, count, process):
    started = time.monotonic()
    while not path.is_file() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 200
        time.sleep(0.01)


LONG = {"steps": 40, "epochs": None, "save_every": 7}


@pytest.fixture(scope="module")
def long_run(place):
    train.main(arguments(place, "redi", place / "long", **LONG))
    return place / "long"


def test_killed_command_resumes_bitwise(place, long_run, tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), *arguments(place, "redi", tmp_path / "run", resume=True, **LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 10, process)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run" / "final").exists() and checkpoint.checkpoints(tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=200)
    assert done.returncode == 0 and f"wrote {tmp_path}/run/final" in done.stdout
    assert same_run(long_run, tmp_path / "run")


def test_sigterm_to_torchrun_saves_and_one_process_goes_on(place, long_run, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port",
               str(tiny.free_port()), str(ROOT / "train.py"), *arguments(place, "redi", tmp_path / "run", **LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=200)
    step = int(re.search(r"stopped after step (\d+) of 40: run the same command with --resume", out)[1])
    assert checkpoint.checkpoints(tmp_path / "run")[-1].name == f"step-{step:06d}" and step < 40
    assert len(metrics(tmp_path / "run")) == step and not (tmp_path / "run" / "final").exists()
    train.main(arguments(place, "redi", tmp_path / "run", resume=True, **LONG))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 41))
    torch.testing.assert_close(column(tmp_path / "run", "loss")[:8], column(long_run, "loss")[:8], atol=5e-6, rtol=0)


def agents(place, rendezvous: str, *words) -> list[subprocess.Popen]:
    """Two torchruns of one process each, as on two machines."""
    port = str(tiny.free_port())
    started = []
    for node in "01":
        how = ["--node-rank", node, "--master-addr", "127.0.0.1", "--master-port", port]
        if rendezvous == "c10d":
            how = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "job"]
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                   "--max-restarts", "3", *how, str(ROOT / "train.py"), *words]
        with open(place / f"log-{node}", "w") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment(), cwd=place))
    return started


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["c10d", "static"])
def test_a_killed_worker_is_restarted_by_torchrun_and_nothing_changes(place, tmp_path, rendezvous):
    whole = torchrun(2, ROOT / "train.py", *arguments(place, "redi", tmp_path / "whole", **LONG))
    assert whole.returncode == 0
    both = agents(tmp_path, rendezvous, *arguments(place, "redi", tmp_path / "run", overwrite=True, **LONG))
    for lines, victim in ((10, 0), (25, 1)):
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", lines, both[0])
        os.kill(children(both[victim])[0], signal.SIGKILL)
    assert [process.wait(200) for process in both] == [0, 0], (tmp_path / "log-0").read_text()[-3000:]
    out = (tmp_path / "log-0").read_text()
    assert out.count("from step 0") == 1 and len(re.findall("from step (?:7|14|21|28|35)", out)) == 2
    assert same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_workers_do_not_outlive_a_torchrun_that_is_killed_while_they_import_torch(place, tmp_path):
    agent, other = agents(tmp_path, "c10d", *arguments(place, "redi", tmp_path / "run"))
    while not (workers := children(agent)):
        time.sleep(0.01)
    time.sleep(0.2)
    agent.kill(), other.kill()
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Faults


def test_a_damaged_checkpoint_is_passed_over_and_leftovers_are_cleaned(place, tmp_path, capsys):
    run = tmp_path / "run"
    cut_back(place / "one" / "redi", run, step=4)
    file = run / "step-000004" / "training_state" / "rank-00000-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x10
    file.write_bytes(content)
    (run / "step-000006.partial" / "training_state").mkdir(parents=True)
    (run / "final.partial").mkdir()
    train.main(arguments(place, "redi", run, resume=True))
    out = capsys.readouterr().out
    assert "step-000004 is corrupt and skipped: rank-00000-of-00001.safetensors does not match" in out
    assert "from step 2" in out and not list(run.glob("*.partial"))
    assert same_run(place / "one" / "redi", run)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_good_ones(place, tmp_path):
    run = tmp_path / "run"
    cut_back(place / "one" / "redi", run, step=4)
    (run / "step-000004" / "training_state" / "state.json").unlink()
    with train_jobs.signal_at(3), pytest.raises(SystemExit):  # saves step 3, while step 4 is there and damaged
        train.main(arguments(place, "redi", run, resume=True, keep_checkpoints=1))
    assert checkpoint.newest_checkpoint(run).name == "step-000003"
    train.main(arguments(place, "redi", run, resume=True))
    assert same_run(place / "one" / "redi", run)


@pytest.mark.parametrize("keep, left", [(1, [6]), (2, [4, 6]), (0, [2, 4, 6])])
def test_keep_checkpoints(place, tmp_path, keep, left):
    train.main(arguments(place, "simpo", tmp_path / "run", keep_checkpoints=keep))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run")] == [f"step-{i:06d}" for i in left]


def test_a_full_disk_at_a_checkpoint_of_one_rank_loses_nothing_else(place, two):
    assert two["unwritable"] == ["ok", "ok"]
    names = [path.name for path in checkpoint.checkpoints(place / "two" / "unwritable")]
    assert names == ["step-000002", "step-000006"]  # tried again at the next
    assert not list((place / "two" / "unwritable").glob("*.partial"))
    assert same_run(place / "two" / "redi", place / "two" / "unwritable")


def test_files_that_may_not_grow(place, tmp_path, capsys):
    """A limit on file sizes, which fails as a full disk does, in the library that writes the weights."""
    run = arguments(place, "redi", tmp_path / "run")
    with train_jobs.signal_at(2), pytest.raises(SystemExit):
        train.main(run)
    kept = tmp_path / "run" / "step-000002"
    saved = {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*final.partial/model.safetensors"):
            train.main([*run, "--resume"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the checkpoint of step 4 is not saved: cannot write" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in kept.rglob("*") if path.is_file()} == saved
    assert sorted(os.listdir(tmp_path / "run")) == [".lock", "metrics.jsonl", "run.json", "step-000002"]
    train.main([*run, "--resume"])
    assert same_run(place / "one" / "redi", tmp_path / "run")


def test_a_log_that_cannot_be_written_for_a_while_has_no_gap(place, tmp_path, capsys):
    append = run_module.append_row

    def failing(path, row):
        if len(tried) in (1, 2, 3):
            tried.append(row)
            raise OSError(28, "No space left on device")
        tried.append(row)
        append(path, row)

    tried = []
    with mock.patch.object(run_module, "append_row", failing):
        train.main(arguments(place, "redi", tmp_path / "run"))
    assert same_run(place / "one" / "redi", tmp_path / "run")
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_an_output_directory_that_vanishes_does_not_end_the_run(place, tmp_path, capsys):
    run, set_lr = tmp_path / "run", train.set_lr

    def vanish(optimizer, step, *rest):
        if step == 2:
            shutil.rmtree(run)
        return set_lr(optimizer, step, *rest)

    with mock.patch.object(train, "set_lr", vanish):
        train.main(arguments(place, "redi", run))
    assert weights(run) == weights(place / "one" / "redi")
    assert [row["step"] for row in metrics(run)] == [3, 4, 5, 6]  # what was logged before is gone; nothing else is


def test_updates_that_are_not_finite_are_skipped_counted_and_named(place, tmp_path, capsys):
    """One example holds a token whose embedding is not a number."""
    tiny.write_model(tmp_path / "model", hidden_size=36, num_hidden_layers=1, tie_word_embeddings=False)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    token, = tokenizer.encode("~")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    rows[12]["prompt"][0]["content"] += "~"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = arguments(place, "redi", tmp_path / "run", model=tmp_path / "model", data=tmp_path / "pairs.jsonl")
    train.main(run)
    logged = metrics(tmp_path / "run")
    bad = [i + 1 for i, row in enumerate(logged) if row["loss"] is None]
    assert len(bad) == 2 and logged[-1]["skipped"] == 2  # once an epoch
    out = capsys.readouterr().out
    for count, step in enumerate(bad, 1):
        lines = re.search(rf"step {step}: .*update skipped \({count} so far\); lines \[(.*)\] of", out)[1]
        assert "13" in lines.split(", ")
    final = load_file(tmp_path / "run" / "final" / "model.safetensors")
    assert all(t.isfinite().all() for name, t in final.items() if name != "model.embed_tokens.weight")

    stopped = arguments(place, "redi", tmp_path / "stopped", model=tmp_path / "model", data=tmp_path / "pairs.jsonl",
                        max_skipped=0)
    with pytest.raises(ValueError, match="1 updates in a row had a loss or gradient that is not finite"):
        train.main(stopped)
    assert not (tmp_path / "stopped" / "final").exists() and len(metrics(tmp_path / "stopped")) == bad[0]


def test_a_skipped_update_leaves_the_weights_and_moments_alone(place, tmp_path):
    """A run whose third step is skipped saves, before and after it, the same weights and moments."""
    method, calls = train.METHODS["redi"], []

    def spoil(*args, **flags):
        calls.append(1)
        losses = method.losses(*args, **flags)
        return losses * math.inf if len(calls) == 3 else losses

    with mock.patch.dict(train.METHODS, redi=dataclasses.replace(method, losses=spoil)):
        train.main(arguments(place, "redi", tmp_path / "run", save_every=1))
    before, after = (
        load_file(tmp_path / "run" / step / "training_state" / "rank-00000-of-00001.safetensors")
        for step in ("step-000002", "step-000003")
    )
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [row["skipped"] for row in metrics(tmp_path / "run")] == [0, 0, 1, 1, 1, 1]
    saved = checkpoint.checkpoints(tmp_path / "run")
    states = [json.loads((path / "training_state" / "state.json").read_text()) for path in saved]
    assert [state["updates"] for state in states] == [1, 2, 2, 3, 4, 5]
    assert [state["skipped_in_a_row"] for state in states] == [0, 0, 1, 0, 0, 0]


def test_a_run_killed_before_its_first_checkpoint_measures_held_out_rows_once(place, held_out, tmp_path):
    run = arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl", eval_every=2, save_every=0)
    train.main(run)
    untouched = {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if row["step"]}
    for _ in range(2):
        shutil.rmtree(tmp_path / "run" / "final")
        train.main([*run, "--resume"])
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(STEPS + 1))
    assert {row["step"]: row["loss"] for row in metrics(tmp_path / "run") if row["step"]} == untouched


def test_held_out_values_that_are_not_finite_are_null_in_the_log(place, held_out, tmp_path):
    values = {"eval_chosen_logp": math.nan, "eval_rejected_logp": -math.inf, "eval_margin": math.nan}
    with mock.patch.object(train.dataset_logps, "held_out", side_effect=[{"eval_chosen_logp": -1.0}, values]):
        train.main(arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl", eval_every=6))
    assert {key: metrics(tmp_path / "run")[-1][key] for key in values} == dict.fromkeys(values)


# TensorBoard


def events(run) -> dict[str, list[tuple]]:
    """name -> [(step, value)] of the event files, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(event.step, event.value) for event in shown.Scalars(tag)] for tag in shown.Tags()["scalars"]}


def logged(run) -> dict[str, list[tuple]]:
    rows = metrics(run)
    return {key: [(row["step"], pytest.approx(row[key])) for row in rows if row.get(key) is not None]
            for row in rows for key in row if key != "step"}


@pytest.mark.peers("tensorboard")
@pytest.mark.parametrize("stop", [3, None], ids=["resumed from a checkpoint", "resumed from the start"])
def test_tensorboard_shows_every_number_of_the_log_once(place, held_out, tmp_path, stop):
    run = arguments(place, "redi", tmp_path / "run", eval_data=held_out / "pairs.jsonl", tensorboard=True, save_every=3)
    with train_jobs.signal_at(5), pytest.raises(SystemExit):
        train.main(run)
    # As after a kill: the log and the event files are ahead of the newest checkpoint.
    for path in checkpoint.checkpoints(tmp_path / "run"):
        if path.name != checkpoint.step_name(stop or 0):
            shutil.rmtree(path)
    assert [step for step, _ in events(tmp_path / "run")["loss"]] == [1, 2, 3, 4, 5]
    train.main([*run, "--resume"])
    assert [step for step, _ in logged(tmp_path / "run")["eval_margin"]] == [0, 3, 6]
    assert events(tmp_path / "run") == logged(tmp_path / "run")
    train.main([*run, "--overwrite"])
    assert len(os.listdir(tmp_path / "run" / "tensorboard")) == 1


@pytest.mark.peers("tensorboard")
def test_one_of_two_ranks_writes_event_files(place, tmp_path):
    done = torchrun(2, ROOT / "train.py", *arguments(place, "redi", tmp_path / "run", tensorboard=True, steps=2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(os.listdir(tmp_path / "run" / "tensorboard")) == 1
    assert events(tmp_path / "run") == logged(tmp_path / "run")


@pytest.mark.peers("tensorboard")
def test_event_files_that_cannot_be_written_do_not_end_the_run(place, tmp_path, capsys):
    from torch.utils.tensorboard import SummaryWriter

    full = OSError(28, "No space left on device")
    with mock.patch.object(SummaryWriter, "flush", side_effect=full) as flush:
        train.main(arguments(place, "redi", tmp_path / "run", tensorboard=True))
    assert same_run(place / "one" / "redi", tmp_path / "run") and flush.call_count == 1
    assert capsys.readouterr().out.count("tensorboard cannot be written ([Errno 28] No space left on device)") == 1


def test_a_missing_tensorboard_is_said_before_anything_is_written(place, tmp_path):
    (tmp_path / "without").mkdir()
    (tmp_path / "without" / "tensorboard.py").write_text("raise ImportError")
    before = sorted(os.listdir(place))
    words = arguments(place, "redi", tmp_path / "run", tensorboard=True)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *words], capture_output=True, text=True,
                          env={**environment(), "PYTHONPATH": str(tmp_path / "without")})
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr == "error: --tensorboard needs a package that is not installed: pip install tensorboard\n"
    assert sorted(os.listdir(place)) == before


# What a run says


@pytest.mark.parametrize("method, advice", [
    ("redi", "a smaller --lr or another --alpha may help"),
    ("simpo", "a smaller --lr or another --beta or another --gamma may help"),
    ("dpo", "a smaller --lr or another --beta or another --label-smoothing may help"),
])  # fmt: skip
def test_a_collapse_names_the_flags_of_the_method_in_use(place, tmp_path, capsys, method, advice):
    with mock.patch.object(run_module, "watch", side_effect=[None, "step 2: collapse?", None]):
        train.main(arguments(place, method, tmp_path / "run", steps=3, epochs=None))
    assert f"\nstep 2: collapse?; {advice}\n" in capsys.readouterr().out


def test_a_collapse_of_a_method_without_flags(place, tmp_path, capsys):
    method = dataclasses.replace(train.METHODS["redi"], flags={}, losses=lambda logps, *_: -logps.chunk(2)[0])
    with (mock.patch.dict(train.METHODS, plain=method),
          mock.patch.object(run_module, "watch", side_effect=["step 1: collapse?"])):
        train.main(arguments(place, "plain", tmp_path / "run", steps=1, epochs=None))
    assert "\nstep 1: collapse?; a smaller --lr may help\n" in capsys.readouterr().out


def test_help_names_the_methods_and_of_each_its_own_flags_with_their_defaults(capsys):
    def shown(*words) -> str:
        with pytest.raises(SystemExit) as exit:
            train.main([*words, "--help"])
        assert exit.value.code == 0
        return " ".join(capsys.readouterr().out.split())

    assert "sft, redi, dpo, simpo, example; train.py METHOD --help" in shown()
    for name, method in train.METHODS.items():
        text = shown(name)
        for flag, options in method.flags.items():
            default = f" (default: {options['default']})" if "default" in options else ""
            assert f"--{flag.replace('_', '-')}" in text and f"{options['help']}{default}" in text
        others = {flag for other in train.METHODS.values() for flag in other.flags} - set(method.flags)
        assert not any(f"--{flag.replace('_', '-')}" in text for flag in others)
        assert f"(default: {method.lr})" in text and f"(default: {method.batch_size})" in text
        assert "default: None" not in text and "default: True" not in text and "default: False" not in text


@pytest.mark.parametrize("method", ["sft", "redi"])
def test_metrics_do_not_hold_the_graph_of_a_micro_batch(method):
    """They are kept to the end of the step: 80 MB of 1,260 with eight micro-batches of 25M parameters."""
    loss = torch.ones((), requires_grad=True) * 2
    terms = train.metric_terms(train.METHODS[method], loss, torch.ones(4), torch.ones(4), None, 0.5)
    assert terms["loss"] == 2 and not any(term.requires_grad for term in terms.values())
