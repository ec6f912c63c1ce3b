"""The life of a training run: whose directory it is, resuming, signals, skipped updates, the log, held-out values,
when to save and what to keep. train.py calls, in this order:

    run = Run(args, settings)            refuses a directory that holds another run
    run.claim(dataset.digest, …)         makes the directory this run's
    run.begin(...)                       goes to the newest checkpoint, if there is one
    for step, batch in run.steps(...):   …; run.after_step(step + 1, metrics, …)
    run.finish()                         writes OUTPUT/final
"""

import argparse
import contextlib
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

from redi import distributed
from redi.distributed import print_rank0
from redi.files import append_row, drop_partial_line, json_line, read_json, read_jsonl, write_atomically, write_json
from redi.hub.weights import DTYPES
from redi.training import checkpoint

WINDOW = 10  # optimiser steps of the collapse monitor's mean; single batches of the example differ by 0.2 nats
SHOWN = ("step", "loss", "chosen_logp", "rejected_logp", "grad_norm", "lr", "tokens_per_second")


class Run:
    def __init__(self, args: argparse.Namespace, settings: dict[str, str], defaults: dict[str, str], knobs: list[str]):
        """`settings`: what a resumed run must agree in; `defaults`: what a run begun before a setting existed had;
        `knobs`: the method's own flags.

        Every rank calls. Raises ValueError where --output holds a run that is not ours to go on with.
        """
        self.args, self.settings, self.knobs, self.output = args, settings, knobs, args.output
        self.record = args.output / "run.json"
        distributed.run_on_ranks(distributed.rank() == 0, lambda: self._check_directory(defaults))

    def _check_directory(self, defaults: dict[str, str]) -> None:
        if self.args.tensorboard:
            event_writer_class()
        ours = self._files()
        if ours and not self.args.resume and not self.args.overwrite:
            raise ValueError(
                f"{self.output} holds another run ({ours[0].name}): --resume continues it, --overwrite replaces it"
            )
        start = Path(self.args.model).resolve()
        if self.args.overwrite and any(start.is_relative_to(path.resolve()) for path in ours):
            raise ValueError(f"{self.args.model} is part of the run that --overwrite would replace; choose another "
                             "--output")
        if self.args.resume and self.record.is_file():
            begun_with = {**defaults, **self._read_record()["settings"]}
            for key, value in self.settings.items():
                if begun_with[key] != value:
                    raise ValueError(f"{self.output} was begun with --{key.replace('_', '-')} {begun_with[key]}, not "
                                     f"{value}; a resumed run keeps its settings")

    def _files(self) -> list[Path]:
        """What a run has left in the output directory."""
        named = [self.output / name for name in ("run.json", "metrics.jsonl", "tensorboard", "final")]
        return [path for path in named if path.exists()] + checkpoint.checkpoints(self.output)

    def _read_record(self) -> dict:
        """run.json: {"settings": what the run was begun with, as strings, "data_digest": that of its token ids}."""
        try:
            record = read_json(self.record)
            return {"settings": dict(record["settings"]), "data_digest": str(record["data_digest"])}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.record} is damaged ({error!r}); --overwrite begins anew") from None

    def is_finished(self) -> bool:
        """Whether the run that --resume asks for has ended. As rank 0 sees it."""
        return distributed.all_gather_object(self.args.resume and (self.output / "final").is_dir())[0]

    def claim(self, data_digest: str, eval_digest: str | None) -> None:
        """Make the output directory this run's, and write down its settings. Every rank calls.

        The digests are those of the token ids of --data and --eval-data.
        """

        def write() -> None:
            if data_digest == eval_digest:
                raise ValueError(f"{self.args.eval_data} holds the rows of {self.args.data}: --eval-data is for rows "
                                 "that are not trained on")
            if self.args.resume and self.record.is_file() and self._read_record()["data_digest"] != data_digest:
                raise ValueError(f"{self.args.data} or the tokenizer has changed since the run in {self.output} was "
                                 "begun")
            self.output.mkdir(parents=True, exist_ok=True)
            if self.args.overwrite:
                for path in self._files():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            checkpoint.remove_leftovers(self.output)
            write_json(self.record, {"settings": self.settings, "data_digest": data_digest})

        distributed.run_on_ranks(distributed.rank() == 0, write)

    def begin(self, model, optimizer, tokenizer, held_out: Callable[[], dict[str, float]] | None) -> None:
        """Load the newest checkpoint, if --resume asks for it and there is one. Every rank calls.

        held_out: measures the current weights on --eval-data: eval_chosen_logp and, of pairs, eval_rejected_logp
        and eval_margin; None without such data.
        """
        self.model, self.optimizer, self.tokenizer, self.held_out = model, optimizer, tokenizer, held_out
        self.state = {
            "step": 0, "skipped": 0, "skipped_in_a_row": 0, "collapse": new_history(),
            "best_step": None, "best_margin": None, "held_out_start": None,
        }
        if self.args.resume and (newest := checkpoint.newest_checkpoint(self.output)):
            self.state.update(checkpoint.load_checkpoint(newest, model, optimizer))
        path, step = self.output / "metrics.jsonl", self.state["step"]
        self.log = distributed.run_on_ranks(distributed.rank() == 0, lambda: MetricsLog(path, step))
        show = self.args.tensorboard and distributed.rank() == 0
        self.events = distributed.run_on_ranks(show, lambda: EventFiles(self.output / "tensorboard", step))
        if held_out and self.state["held_out_start"] is None:
            values = self._measure()
            if step == 0:
                self._write_log({"step": 0, **values})

    def steps(self, total_steps: int, make_batch: Callable[[int], object]) -> Iterator[tuple[int, object]]:
        """(step from 0, make_batch(step)) of the steps still to do. Batches are made in a thread one step ahead,
        while the device is at work. Meanwhile SIGTERM and SIGINT end the run after the step under way."""
        self.total_steps, first = total_steps, self.state["step"]
        bar = tqdm(range(first, total_steps), self.args.method, total_steps, initial=first, unit="step",
                   disable=distributed.hide_bar())
        with catching_signals() as self.signals, ThreadPoolExecutor(1) as pool:
            coming = None
            for step in bar:
                self.started = time.perf_counter()
                ready = coming or pool.submit(make_batch, step)
                coming = pool.submit(make_batch, step + 1) if step + 1 < total_steps else None
                yield step, ready.result()

    def after_step(self, step: int, epoch: int, metrics: dict[str, float], lines, updated: bool) -> None:
        """All that follows an update: the log, the watch over skipped updates and collapse, held-out values, a
        checkpoint, and the end of the run where it was asked for. Every rank calls.

        step: from 1; metrics: by name, "tokens" among them; lines: those of the batch in --data;
        updated: False where a loss or gradient was not finite and the update was skipped.
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
        saving = bool(args.save_every) and step % args.save_every == 0
        if self.held_out and (step % args.eval_every == 0 or step == self.total_steps):
            values = self._measure()
            metrics |= values
            if saving:
                self._consider_best(values)
        metrics = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._write_log(metrics)
        if step == 1 or step % args.log_every == 0:
            print_rank0("  ".join(f"{key} {metrics[key]:.5g}" for key in SHOWN if metrics.get(key) is not None))
        if not updated:
            self._report_skipped(lines)
        collapsing = watch(state["collapse"], metrics, args.collapse_threshold)
        if collapsing:
            remedies = ["a smaller --lr", *(f"another {knob}" for knob in self.knobs)]
            print_rank0(f"{collapsing}; {' or '.join(remedies)} may help")
        ending = collapsing and args.stop_on_collapse
        stopping = distributed.any_rank(bool(self.signals))
        if saving or stopping or ending:
            self._save()
        if ending:
            raise ValueError(f"stopped after step {step}, as --stop-on-collapse asks")
        if stopping:
            how = "" if args.resume else " with --resume"
            print_rank0(f"stopped after step {step} of {self.total_steps}: run the same command{how} to continue")
            raise SystemExit(128 + (self.signals[0] if self.signals else signal.SIGTERM))

    def finish(self) -> None:
        """Write OUTPUT/final. Every rank calls."""
        print_rank0(f"wrote {checkpoint.save_final(self.output, self.model, self.tokenizer, DTYPES[self.args.dtype])}")

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

    def _measure(self) -> dict[str, float]:
        values = self.held_out()
        if self.state["held_out_start"] is None:
            self.state["held_out_start"] = values["eval_chosen_logp"]
        return values

    def _consider_best(self, values: dict[str, float]) -> None:
        """The best checkpoint has the largest held-out margin (SFT: the likeliest responses) among those whose
        chosen LogPS has lost no more than --collapse-threshold: margins alone prefer models that have collapsed."""
        state, step = self.state, self.state["step"]
        name = "eval_margin" if "eval_margin" in values else "eval_chosen_logp"
        change, threshold = values["eval_chosen_logp"] - state["held_out_start"], self.args.collapse_threshold
        about = f"step {step}: held-out {name.removeprefix('eval_')} {values[name]:.4f}, chosen LogPS {change:+.3f}"
        if not change >= -threshold:
            print_rank0(f"{about} since the start, a loss of more than {threshold:g}: not a candidate for the best "
                        "checkpoint")
        elif state["best_step"] is None or values[name] > state["best_margin"]:
            state.update(best_step=step, best_margin=values[name])
            print_rank0(f"{about} since the start: the best checkpoint so far")

    def _save(self) -> None:
        """Commit a checkpoint, then let go of the oldest, but never of the best on held-out rows.

        Where it cannot be written, say so and train on; the next one is tried again.
        """
        state, keep = self.state, self.args.keep_checkpoints
        try:
            saved = checkpoint.save_checkpoint(
                self.output, self.model, self.optimizer, self.tokenizer, state, DTYPES[self.args.dtype]
            )
        except OSError as error:
            return print_rank0(f"checkpoint of step {state['step']} not saved, going on without it: {error}")
        if distributed.rank() == 0 and keep:
            # One newer than this was damaged, and passed over at --resume: it does not count.
            good = [path for path in checkpoint.checkpoints(self.output) if path <= saved]
            for path in good[:-keep]:
                if state["best_step"] is None or path.name != checkpoint.step_name(state["best_step"]):
                    shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def catching_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are put into. One that comes a second or more after the first ends the process:
    sooner, it is the same one again, which Slurm sends to torchrun and to its workers, and torchrun passes on."""
    received, (reading, writing) = [], os.pipe()
    os.set_blocking(writing, False)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def watch():  # in a thread, since handlers wait for the end of what the main thread computes
        first = None
        while byte := os.read(reading, 1):
            first = first or time.monotonic()
            if byte[0] in before and time.monotonic() - first >= 1:
                os._exit(128 + byte[0])

    for number in before:
        signal.signal(number, lambda number, frame: received.append(number))
    woken_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield received
    finally:
        signal.set_wakeup_fd(woken_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writing)  # which ends the thread


class MetricsLog:
    """metrics.jsonl: one line a step, no gap and no repeat. For one process to write."""

    def __init__(self, path: Path, steps_done: int):
        """Keep the lines of the first steps_done steps; drop what an interrupted run logged after its checkpoint,
        step 0 too where there is none: it is measured again. Raises ValueError naming file and line where the steps
        do not rise."""
        self.path, self.waiting = path, []
        drop_partial_line(path)
        kept, last = [], -1
        for line, row in read_jsonl(path) if path.exists() else ():
            step = row.get("step")
            if type(step) is not int or step <= last:
                raise ValueError(f"{path}, line {line}: step {step!r} after step {last}; mend the file, or move it "
                                 "away to go on without its lines")
            last = step
            if steps_done and step <= steps_done:
                kept.append(row)
        missing = steps_done - sum(row["step"] > 0 for row in kept)  # step 0 holds held-out values only
        if missing > 0:
            print(f"{path} lacks the lines of {missing} of the {steps_done} steps done")
        with write_atomically(path) as file:
            file.writelines(map(json_line, kept))

    def write(self, metrics: dict) -> None:
        """Append a line. One that cannot be written (a full disk) is said once, kept, and tried again with
        the next."""
        self.waiting.append(metrics)
        try:
            while self.waiting:
                append_row(self.path, self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if len(self.waiting) == 1:
                print(f"{self.path} cannot be written ({error}); its lines are kept and tried again at each step")


def peak_memory() -> float:
    """GiB: of this rank's GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def event_writer_class():
    """torch.utils.tensorboard.SummaryWriter. Raises ValueError where the package that it needs is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs a package that is not installed: pip install tensorboard") from None
    return SummaryWriter


class EventFiles:
    """For one process to write."""

    def __init__(self, directory: Path, steps_done: int):
        """TensorBoard drops the points after the first steps_done steps, which an interrupted run left behind: they
        are measured again, as step 0 is where none is done."""
        self.directory = directory
        self.writer = event_writer_class()(directory, purge_step=steps_done + 1 if steps_done else 0)

    def write(self, metrics: dict) -> None:
        """Add each number of a line of metrics.jsonl by its name, at its step. Where that cannot be written (a full
        disk), say so and write no more."""
        if self.writer is None:
            return
        try:
            for name, value in metrics.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, metrics["step"])
            self.writer.flush()
        except OSError as error:
            self.writer = None
            print(f"{self.directory} cannot be written ({error}): going on without it")


def new_history() -> dict:
    """What `watch` remembers between steps, ready for JSON: it is saved with a checkpoint."""
    return {"first": None, "recent": [], "warned": False}


def watch(history: dict, metrics: dict, threshold: float) -> str | None:
    """The collapse monitor: does training on wrong traces take the correct ones down with it? Returns a warning, once.

    Pushing rejected responses away also lowers the chosen ones, a little where it works, without end where it
    collapses (paper, Section 4). The chosen LogPS (log-prob per token) tells the two apart. In the embedded
    example, over seeds 10 to 14, α = 0.8 at a rate of 1.5e-4 loses at most 1.05 nats, and the symmetric
    objective at 3e-4, which collapses, 5.3 to 8.1. So the rule is: the mean of the last WINDOW steps more than
    `threshold` nats below the first step. At the default of 1.5 nats the correct tokens' (geometric mean) probability
    is 4.5 times smaller than it was; the collapsing runs get there between step 48 and 68 of 150.

    Args: threshold in nats per token. Steps whose numbers are not finite (None) are passed over, and so is SFT,
    which pushes nothing away.
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
