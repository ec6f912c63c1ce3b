"""The life of a training run: its output directory, resuming, signals, the log, held-out values, checkpoints.
train.py calls, in this order and on every rank:

    run = Run(args, settings, method_flags)             refuses an output directory with another run
    run.prepare_output_dir(model_digest, …)             locks it, and records what the run begins with
    run.restore(model, optimizer, …)                    loads the newest checkpoint, if there is one
    for step, batch in run.steps(…):
        …; run.after_step(step + 1, …)
    run.finish()                                        writes OUTPUT/final
"""

import argparse
import contextlib
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from redi import distributed
from redi.cli import count, handle_signals, positive, positive_int
from redi.distributed import print_rank0
from redi.files import (
    append_row, drop_partial_line, json_line, lock_directory, read_json, read_jsonl, remove, write_atomically,
    write_json,
)  # fmt: skip
from redi.hub.weights import DTYPES
from redi.training import checkpoint

WINDOW = 10  # optimiser steps of the collapse monitor's mean; single batches of the example differ by 0.2 nats
SHOWN = ("step", "loss", "chosen_logp", "rejected_logp", "grad_norm", "lr", "tokens_per_second")
PATHS = ("model", "data", "eval_data")  # of these the content is compared


def add_run_flags(add: Callable) -> None:
    """Add the flags that `Run` reads; `add` is the add_argument of a parser."""
    add("--output", required=True, type=Path, help="directory for checkpoints, the final model and metrics.jsonl")
    add("--resume", action="store_true", help="continue the run in --output, or start it if there is none")
    add("--overwrite", action="store_true", help="replace the run in --output")
    add("--save-every", type=count, default=200, help="steps between checkpoints; 0 for none")
    add("--keep-checkpoints", type=count, default=2, help="how many to keep; 0 for all")
    add("--eval-every", type=positive_int, help="steps between evaluations of --eval-data (default: --save-every)")
    add("--log-every", type=positive_int, default=10, help="steps between lines on the screen")
    add("--tensorboard", action="store_true", help="also write event files to OUTPUT/tensorboard")
    add("--collapse-threshold", type=positive, default=1.5, help="warn if the chosen LogPS falls by this, in nats")
    add("--stop-on-collapse", action="store_true", help="save and stop at that warning")
    add("--max-skipped", type=count, default=10, help="most consecutive updates skipped because of non-finite values")


class Run:
    def __init__(self, args: argparse.Namespace, settings: Collection[str], method_flags: Collection[str]):
        """args: the command line; settings, method_flags: the names of those in which a resumed run must agree, and of
        the method's own, in which it must agree too.

        Raises ValueError where the ranks have different flags, or OUTPUT contains another run.
        """
        self.args, self.method_flags = args, [f"--{name.replace('_', '-')}" for name in method_flags]
        self.settings = {name: str(getattr(args, name)) for name in (*settings, *method_flags)}
        self.output, self.record = args.output, args.output / "run.json"
        distributed.agree_on_flags(args, (*PATHS, "output"))
        restarted = distributed.was_started(str(self.output))  # and is now restarted by torchrun
        self.resume, self.overwrite = args.resume or restarted, args.overwrite and not restarted
        self.is_finished = distributed.all_gather_object(self.resume and (self.output / "final").is_dir())[0]
        distributed.run_on_ranks(distributed.rank() == 0, self._check_directory)

    def _check_directory(self) -> None:
        if self.args.tensorboard:
            event_writer_class()
        if self.output.is_dir() and not self.is_finished:
            lock_directory(self.output)  # another run may be using it
        ours = self._files()
        if ours and not self.resume and not self.overwrite:
            raise ValueError(f"{self.output} contains another run ({ours[0].name}): --resume continues it, --overwrite "
                             "replaces it")
        start = Path(self.args.model).resolve()
        if self.overwrite and any(start.is_relative_to(path.resolve()) for path in ours):
            raise ValueError(f"{self.args.model} is part of the run that --overwrite would replace: choose another "
                             "--output")
        if self.resume and self.record.is_file():
            record = self._read_record()
            begun_with = {**self.settings, **record["settings"]}  # earlier versions had fewer settings
            for name, value in self.settings.items():
                by_content = name == "data" or name == "model" and "model_digest" in record
                if begun_with[name] != value and not by_content:
                    raise ValueError(f"{self.output} was begun with --{name.replace('_', '-')} {begun_with[name]}, not "
                                     f"{value}: a resumed run keeps its settings")

    def _files(self) -> list[Path]:
        """What a run has left in the output directory."""
        named = [self.output / name for name in ("run.json", "metrics.jsonl", "tensorboard", "best", "final")]
        return [path for path in named if os.path.lexists(path)] + checkpoint.checkpoints(self.output)

    def _read_record(self) -> dict:
        """run.json: {"settings": as text by name, "model_digest", "data_digest", "eval_data_digest"}. The last two are
        of token ids; runs begun by earlier versions lack the first and the last."""
        try:
            record = read_json(self.record)
            return {**record, "settings": dict(record["settings"]), "data_digest": str(record["data_digest"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is corrupt ({error!r}); --overwrite starts over") from None

    def prepare_output_dir(self, model_digest: str, data_digest: str, eval_data_digest: str | None) -> None:
        """Lock the output directory and record what the run begins with. The digests are those of the initial model's
        weights, and of the token ids of --data and --eval-data."""
        digests = {"model": model_digest, "data": data_digest, "eval_data": eval_data_digest}
        distributed.agree({f"--{name.replace('_', '-')} (SHA-256)": digest for name, digest in digests.items()})
        distributed.lock_output(self.output)

        def prepare() -> None:
            self._check_directory()  # again: the lock may have been another run's
            record = self._read_record() if self.resume and self.record.is_file() else {}
            for name, digest in digests.items():
                if record.get(f"{name}_digest") not in (None, digest):
                    raise ValueError(f"--{name.replace('_', '-')} {getattr(self.args, name)} or its tokenizer has "
                                     f"changed since the run in {self.output} was begun")
            for path in self._files() if self.overwrite else ():
                remove(path)
            checkpoint.remove_leftovers(self.output)
            write_json(self.record, {"settings": self.settings, **{f"{name}_digest": d for name, d in digests.items()}})
            distributed.note_start(str(self.output))

        distributed.run_on_ranks(distributed.rank() == 0, prepare)

    def restore(self, model, optimizer, tokenizer, held_out: Callable[[], dict[str, float]] | None) -> None:
        """Load the newest checkpoint, if the run is resumed and there is one.

        held_out: evaluates the current weights on --eval-data (None without it): eval_chosen_logp and, of pairs,
        eval_rejected_logp and eval_margin. Raises ValueError where --stop-on-collapse has ended the run.
        """
        self.model, self.optimizer, self.tokenizer, self.held_out = model, optimizer, tokenizer, held_out
        self.dtype = DTYPES[self.args.dtype]
        self.state = {
            "step": 0, "skipped": 0, "skipped_in_a_row": 0, "collapse": new_history(), "stopped": None,
            "best_step": None, "best_margin": None, "held_out_start": None,
        }
        if self.resume and (newest := checkpoint.newest_checkpoint(self.output)):
            self.state.update(checkpoint.load_checkpoint(newest, model, optimizer))
        if self.state["stopped"] and self.args.stop_on_collapse:
            raise ValueError(self.state["stopped"])
        self.state["stopped"] = None
        best = self.output / "best"
        if self.state["best_step"] and not distributed.all_gather_object(best.is_dir())[0]:
            print_rank0(f"{best} is missing: the best of the remaining evaluations will be kept there")
            self.state.update(best_step=None, best_margin=None)
        path, step = self.output / "metrics.jsonl", self.state["step"]
        self.log = distributed.run_on_ranks(distributed.rank() == 0, lambda: MetricsLog(path, step))
        show = self.args.tensorboard and distributed.rank() == 0
        self.events = distributed.run_on_ranks(show, lambda: EventFiles(self.output / "tensorboard", step))
        if held_out and self.state["held_out_start"] is None:
            values = held_out()
            self.state["held_out_start"] = values["eval_chosen_logp"]
            if step == 0:
                self._write_log({"step": 0, **values})

    def steps(self, total_steps: int, make_batch: Callable[[int], object]) -> Iterator[tuple[int, object]]:
        """Yields (step from 0, make_batch(step)) of the remaining steps. A thread makes each batch one step ahead. From
        here to the end of `finish`, a signal ends the run after the current step, or after `finish`."""
        self.total_steps, self.signals, first = total_steps, [], self.state["step"]
        self.handlers = contextlib.ExitStack()
        self.handlers.enter_context(handle_signals(self.signals.append))
        bar = tqdm(range(first, total_steps), self.args.method, total_steps, initial=first, unit="step",
                   disable=distributed.hide_bar())
        try:
            with ThreadPoolExecutor(1) as pool:
                following = None
                for step in bar:
                    self.started = time.perf_counter()
                    batch = following or pool.submit(make_batch, step)
                    following = pool.submit(make_batch, step + 1) if step + 1 < total_steps else None
                    yield step, batch.result()
        except GeneratorExit:  # the loop has ended with an exception
            self.handlers.close()
            raise

    def after_step(self, step: int, epoch: int, metrics: dict[str, float], lines, updated: bool) -> None:
        """Everything that follows an update: the log, skipped updates, held-out evaluation, the collapse monitor,
        checkpoints, and stopping early.

        step: from 1; metrics: by name, "tokens" among them; lines: those of the batch in --data;
        updated: False where the update was skipped, because the loss or the gradient is not finite.
        """
        args, state = self.args, self.state
        seconds = time.perf_counter() - self.started
        state["step"] = step
        state["skipped"] += not updated
        state["skipped_in_a_row"] = 0 if updated else state["skipped_in_a_row"] + 1
        tokens = int(metrics["tokens"])
        metrics = {
            "step": step, "epoch": epoch, **metrics, "tokens": tokens, "tokens_per_second": tokens / seconds,
            "peak_memory_gib": peak_memory(), "seconds": seconds, "skipped": state["skipped"],
        }
        if self.held_out and (step % args.eval_every == 0 or step == self.total_steps):
            values = self.held_out()
            self._consider_best(values)
            metrics |= {**values, "best_step": state["best_step"]}
        metrics = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._write_log(metrics)
        if step == 1 or step % args.log_every == 0:
            print_rank0("  ".join(f"{key} {metrics[key]:.5g}" for key in SHOWN if metrics.get(key) is not None))
        if not updated:
            self._report_skipped(lines)
        warning = watch(state["collapse"], metrics, args.collapse_threshold)
        if warning:
            print_rank0(f"{warning}; {' or '.join(['a smaller --lr', *(f'another {f}' for f in self.method_flags)])} "
                        "may help")
        if warning and args.stop_on_collapse:
            state["stopped"] = f"stopped after step {step}, as --stop-on-collapse asks"
        stopping = distributed.any_rank(bool(self.signals))
        if stopping or state["stopped"] or args.save_every and step % args.save_every == 0:
            self._save_checkpoint()
        if state["stopped"]:
            raise ValueError(state["stopped"])
        if stopping:
            flag = "" if args.resume else " with --resume"
            print_rank0(f"stopped after step {step} of {self.total_steps}: run the same command{flag} to continue")
            raise SystemExit(self._signal_status())

    def finish(self) -> None:
        """Write OUTPUT/final."""
        with self.handlers:
            print_rank0(f"wrote {self._write_model('final')}")
            if distributed.any_rank(bool(self.signals)):
                raise SystemExit(self._signal_status())

    def _signal_status(self) -> int:
        return 128 + (self.signals[0] if self.signals else signal.SIGTERM)

    def _write_log(self, metrics: dict) -> None:
        for log in filter(None, (self.log, self.events)):
            log.write(metrics)

    def _report_skipped(self, lines) -> None:
        state = self.state
        print_rank0(
            f"step {state['step']}: loss or gradient is not finite, update skipped ({state['skipped']} so far); "
            f"lines {list(map(int, lines))} of {self.args.data}"
        )
        if state["skipped_in_a_row"] > self.args.max_skipped:
            raise ValueError(f"{state['skipped_in_a_row']} updates in a row had a loss or gradient that is not finite")

    def _write_model(self, name: str) -> Path:
        return checkpoint.save_model(self.output / name, self.model, self.tokenizer, self.dtype)

    def _consider_best(self, values: dict[str, float]) -> None:
        """OUTPUT/best has the largest held-out margin (SFT: chosen LogPS) among the evaluations whose chosen LogPS is
        at most --collapse-threshold below that of the initial model: the margin alone prefers collapsed models."""
        state, step, threshold = self.state, self.state["step"], self.args.collapse_threshold
        name = "eval_margin" if "eval_margin" in values else "eval_chosen_logp"
        change = values["eval_chosen_logp"] - state["held_out_start"]
        about = f"step {step}: held-out {name.removeprefix('eval_')} {values[name]:.4f}, chosen LogPS {change:+.3f} " \
                "since the start"
        if not change >= -threshold:
            print_rank0(f"{about}, a loss of more than {threshold:g}: not a candidate for {self.output / 'best'}")
        elif state["best_step"] is None or values[name] > state["best_margin"]:
            try:
                best = self._write_model("best")
            except OSError as error:
                return print_rank0(f"warning: {about}, the best so far, but not saved: {error}")
            state.update(best_step=step, best_margin=values[name])
            print_rank0(f"{about}: the best so far, kept as {best}")

    def _save_checkpoint(self) -> None:
        """Write a checkpoint and delete the oldest. If it cannot be written, warn and continue training."""
        try:
            checkpoint.save_checkpoint(self.output, self.model, self.optimizer, self.tokenizer, self.state, self.dtype)
        except OSError as error:
            return print_rank0(f"warning: the checkpoint of step {self.state['step']} is not saved: {error}")
        if distributed.rank() == 0 and self.args.keep_checkpoints:
            # A newer one was corrupt when the run was resumed: it does not count.
            step_of, step = checkpoint.step_of, self.state["step"]
            found = [path for path in checkpoint.checkpoints(self.output) if step_of(path) <= step]
            for path in found[: -self.args.keep_checkpoints]:
                with contextlib.suppress(OSError):
                    remove(path)


class MetricsLog:
    """metrics.jsonl: one line a step, without gaps or repeats. For one process to write."""

    def __init__(self, path: Path, steps_done: int):
        """Keep the lines of the first steps_done steps, and drop those that an interrupted run wrote after its last
        checkpoint, step 0 included where there is none. Raises ValueError naming file and line where steps are not in
        ascending order."""
        self.path, self.waiting = path, []
        drop_partial_line(path)
        kept, last = [], -1
        for line, row in read_jsonl(path) if path.exists() else ():
            step = row.get("step")
            if type(step) is not int or step <= last:
                raise ValueError(f"{path}, line {line}: step {step!r} after step {last}; repair the file, or move it "
                                 "away to continue without its lines")
            last = step
            if steps_done and step <= steps_done:
                kept.append(row)
        missing = steps_done - sum(row["step"] > 0 for row in kept)  # step 0 has held-out values only
        if missing > 0:
            print_rank0(f"{path} lacks the lines of {missing} of the {steps_done} steps done")
        with write_atomically(path) as file:
            file.writelines(map(json_line, kept))

    def write(self, metrics: dict) -> None:
        """Append a line. If that fails (full disk), warn once, keep the line, and retry with the next."""
        self.waiting.append(metrics)
        try:
            while self.waiting:
                append_row(self.path, self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if len(self.waiting) == 1:
                print_rank0(f"warning: {self.path} cannot be written ({error}); retried at each step")


def peak_memory() -> float:
    """GiB: of this rank's GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def event_writer_class():
    """torch.utils.tensorboard.SummaryWriter. Raises ValueError where the tensorboard package is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


class EventFiles:
    """For one process to write."""

    def __init__(self, directory: Path, steps_done: int):
        """TensorBoard drops the points after the first steps_done steps, which an interrupted run has written."""
        self.directory = directory
        self.writer = event_writer_class()(directory, purge_step=steps_done + 1 if steps_done else 0)

    def write(self, metrics: dict) -> None:
        """Add each number of a line of metrics.jsonl under its name. If that fails (full disk), warn and stop."""
        if self.writer is None:
            return
        try:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, metrics["step"])
            self.writer.flush()
        except OSError as error:
            self.writer = None
            print_rank0(f"warning: {self.directory} cannot be written ({error}); no further events")


def new_history() -> dict:
    """The state of `watch`, in JSON types: it is saved with a checkpoint."""
    return {"first": None, "recent": [], "warned": False}


def watch(history: dict, metrics: dict, threshold: float) -> str | None:
    """The collapse monitor: has the likelihood of the chosen responses collapsed? Returns a warning, once.

    Pushing rejected responses down also lowers the likelihood of the chosen ones: slightly in a stable run, without
    bound in one that diverges (paper, Section 4). In the embedded example, over seeds 10 to 14, α = 0.8 at a learning
    rate of 1.5e-4 loses at most 1.05 nats per token, and the symmetric objective at 3e-4, which diverges, 5.3 to 8.1.
    The rule: the mean chosen LogPS of the last WINDOW steps is more than `threshold` below that of the first step. At
    the default of 1.5 nats the (geometric) mean token probability is 4.5 times smaller; the diverging runs reach that
    between steps 48 and 68 of 150.

    Args: threshold in nats per token. Steps without finite values (None) are ignored, and so is SFT, which has no
    rejected responses.
    """
    chosen = metrics["chosen_logp"]
    if chosen is None or "rejected_logp" not in metrics:
        return None
    if history["first"] is None:
        history["first"] = {key: metrics[key] for key in ("chosen_logp", "rejected_logp", "grad_norm")}
    history["recent"] = [*history["recent"], chosen][-WINDOW:]
    mean = sum(history["recent"]) / len(history["recent"])
    first = history["first"]
    if history["warned"] or len(history["recent"]) < WINDOW or first["chosen_logp"] - mean <= threshold:
        return None
    history["warned"] = True
    changes = [f"chosen LogPS {first['chosen_logp']:.2f} -> {mean:.2f} (mean of {WINDOW} steps)"]
    for key, name in (("rejected_logp", "rejected LogPS"), ("grad_norm", "gradient norm")):
        if first[key] is not None and metrics[key] is not None:
            changes.append(f"{name} {first[key]:.3g} -> {metrics[key]:.3g}")
    return (f"step {metrics['step']}: collapse? {'; '.join(changes)}. The correct responses are losing probability "
            "as well")
