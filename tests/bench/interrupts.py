"""Interrupts of the three commands at random moments, on a busy machine: does each end soon, and can it continue?

    python tests/bench/interrupts.py --tries 60 --seed 0       60 of each command

Each try starts a command in a folder of its own and sends it SIGINT or SIGTERM at a moment drawn from the time that it
takes undisturbed, counted from when it handles signals itself: to the process alone, or to all processes of its session
as a terminal does. `pipe` reads rows from a named pipe that stays open after the last of them, so that it would wait
forever; `rerun` replaces an older output. Meanwhile --load processes keep the cores busy. A process that is still there
after 5 seconds gets the signal again, and is counted: Python drops an exception that a handler raises in a destructor.
A try fails where

- the command has not ended after 10 seconds, or with another status than 128 + the signal's number, as a shell reports
  it (0 where it was just done);
- prepare_data.py leaves part of an output: other files than those of the undisturbed or (`rerun`) the older output;
- a process of its session still lives 5 seconds later;
- it wrote more to standard error than that it was interrupted (a second signal ends it without cleaning up);
- the same command, run again, does not leave what the undisturbed one did, or finds a corrupt checkpoint.
"""

import argparse
import collections
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny

SECONDS = 5
TRAIN = "train.py redi --model model --data pairs.jsonl --batch-size 4 --steps 60 --save-every 7 --resume"
JOBS = {
    "train": TRAIN,
    "train, held out": f"{TRAIN} --eval-data held_out.jsonl --eval-every 5",
    "evaluate": "evaluate.py --model model --problems sums.jsonl --samples 40 --max-new-tokens 30 --rows 4",
    "score": "evaluate.py --score samples.jsonl --problems sums.jsonl",
    "pipe": "prepare_data.py traces --input rows.jsonl --processes 2",
    "files": "prepare_data.py traces --input rows.jsonl --processes 2",
    "one process": "prepare_data.py traces --input rows.jsonl --processes 1",
    "one generation a row": "prepare_data.py traces --input generations.jsonl --processes 2",
    "rerun": "prepare_data.py traces --input rows.jsonl --processes 2 --overwrite",
    "parquet": "prepare_data.py openr1 --input rows.parquet --processes 2",
    "decontaminate": "prepare_data.py decontaminate --input rows.jsonl --against problems.jsonl",
}
UNTIMED = ("seconds", "tokens_per_second", "peak_memory_gib")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tries", type=int, default=60, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="processes that only keep a core busy")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args()
    if importlib.util.find_spec("pyarrow") is None and "parquet" in args.jobs:
        args.jobs.remove("parquet")
    rng = random.Random(args.seed)
    load = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.load)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            failed = run(args, rng, Path(folder))
    finally:
        for process in load:
            process.kill()
    sys.exit(failed > 0)


def run(args, rng: random.Random, folder: Path) -> int:
    """All tries, and the table. Returns how many failed."""
    inputs, undisturbed = folder / "inputs", {}
    write_inputs(inputs, args.rows)
    for job in args.jobs:
        place = make_place(folder / "try", inputs, "files" if job == "pipe" else job)  # samples are stored by its name
        process = start(args.root, job, place)
        wait_for_handlers(process)
        started = time.monotonic()
        assert process.wait() == 0, (place / "err").read_text()
        undisturbed[job] = (time.monotonic() - started, contents(place))
        shutil.rmtree(place)
    rows = collections.defaultdict(list)  # (job, signal) -> [(seconds, status, signals sent, what is wrong)]
    done = collections.Counter()  # by command
    while jobs := [job for job in args.jobs if done[JOBS[job].split()[0]] < args.tries]:
        job, number = rng.choice(jobs), rng.choice((signal.SIGINT, signal.SIGTERM))
        seconds, status, sent, wrong = interrupt(args.root, job, number, rng, folder / "try", inputs, *undisturbed[job])
        if status is None:
            continue  # it had ended before the signal came
        done[JOBS[job].split()[0]] += 1
        rows[job, number.name].append((seconds, status, sent, wrong))
        if wrong:
            print(f"{job}, {number.name}: {'; '.join(wrong)}", flush=True)
    print(f"{'command':22} {'signal':8} {'tries':>5} {'failed':>6} {'twice':>6} {'slowest':>8} s   status: how often")
    for (job, name), tries in sorted(rows.items()):
        statuses = collections.Counter(status for _, status, *_ in tries)
        print(f"{job:22} {name:8} {len(tries):5} {sum(bool(wrong) for *_, wrong in tries):6} "
              f"{sum(sent > 1 for _, _, sent, _ in tries):6} {max(seconds for seconds, *_ in tries):10.2f}   "
              f"{dict(statuses)}")
    failed = sum(bool(wrong) for tries in rows.values() for *_, wrong in tries)
    print(f"{dict(done)} interrupts, {failed} failed")
    return failed


def interrupt(root, job, number, rng, place, inputs, seconds, whole):
    """(seconds until the end, status as a shell reports it, signals sent, what is wrong) of one try; status None where
    the command had ended before the signal came."""
    make_place(place, inputs, job)
    before = contents(place)
    process = start(root, job, place)
    feeder = feed(place / "rows.jsonl", inputs / "rows.jsonl") if job == "pipe" else None
    wait_for_handlers(process)
    time.sleep(rng.uniform(0, seconds))
    if process.poll() is not None:
        shutil.rmtree(place)
        return None, None, 0, []
    to_all = rng.random() < 0.5
    started, sent, wrong = time.monotonic(), 0, []
    while process.poll() is None:
        if time.monotonic() - started > 4 * SECONDS:
            wrong.append("it hangs")
            process.kill()
            process.wait()
        elif time.monotonic() - started > SECONDS * sent:
            os.killpg(process.pid, number) if to_all else process.send_signal(number)
            sent += 1
        time.sleep(0.01)
    took = time.monotonic() - started
    if feeder:
        os.killpg(feeder.pid, signal.SIGKILL)
        feeder.wait()
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if took > 2 * SECONDS:
        wrong.append(f"it took {took:.1f} s")
    if status not in (128 + number, 0):
        wrong.append(f"status {status}")
    if JOBS[job].startswith("prepare_data.py") and contents(place) not in ({}, before, whole):
        wrong.append(f"part of an output: {sorted(contents(place))}")
    while members(process.pid) and time.monotonic() < started + took + SECONDS:
        time.sleep(0.05)
    if left := members(process.pid):
        wrong.append(f"left running: {left}")
        os.killpg(process.pid, signal.SIGKILL)
    errors = [line for line in (place / "err").read_text().splitlines() if not line.startswith("interrupted")]
    if errors and status and sent == 1:
        wrong.append(f"it wrote {errors[-3:]}")
    if job == "pipe":
        (place / "rows.jsonl").unlink()
        shutil.copy(inputs / "rows.jsonl", place)
    if status and not start(root, job, place).wait() == 0:
        wrong.append(f"run again it failed: {(place / 'err').read_text()[-300:]}")
    left = contents(place)
    if others := [name for name in {**left, **whole} if left.get(name) != whole.get(name)]:
        wrong.append(f"run again it left other files: {others}")
    if "corrupt" in (place / "out.txt").read_text():
        wrong.append("run again it found a corrupt checkpoint")
    shutil.rmtree(place)
    return took, status, sent, wrong


def start(root: Path, job: str, place: Path) -> subprocess.Popen:
    script, *words = JOBS[job].split()
    with open(place / "err", "w") as errors, open(place / "out.txt", "w") as output:
        return subprocess.Popen([sys.executable, root / script, *words, "--output", "out"], cwd=place,
                                stdout=output, stderr=errors, start_new_session=True, preexec_fn=restore_signals,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def restore_signals() -> None:
    """A shell starts background jobs with SIGINT ignored, which the commands would respect."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_handlers(process: subprocess.Popen) -> None:
    while process.poll() is None and not catches_sigterm(process.pid):
        time.sleep(0.01)


def feed(pipe: Path, rows: Path) -> subprocess.Popen:
    """Write rows into a named pipe, and keep it open."""
    command = 'exec 3<>"$0"; cat "$1" >&3; sleep 1000'  # <>: without waiting for a reader, or ending with it
    return subprocess.Popen(["sh", "-c", command, pipe, rows], start_new_session=True)


def members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def catches_sigterm(pid: int) -> bool:
    caught = Path(f"/proc/{pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def contents(place: Path) -> dict[str, object]:
    """What a user sees of the output, without what a clock decides and what another run only reads."""
    found = {}
    for path in sorted((place / "out").rglob("*")):
        name = str(path.relative_to(place))
        if path.name == "metrics.jsonl":
            rows = map(json.loads, path.read_text().splitlines())
            found[name] = [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows]
        elif path.is_file() and path.name != ".lock" and "/step-" not in name:
            found[name] = path.read_bytes()
    return found


def make_place(place: Path, inputs: Path, job: str) -> Path:
    shutil.copytree(inputs, place)
    if job == "pipe":
        (place / "rows.jsonl").unlink()
        os.mkfifo(place / "rows.jsonl")
    if job == "rerun":
        (place / "out").mkdir()
        (place / "out" / "pairs.jsonl").write_text("older\n")
    return place


def write_inputs(inputs: Path, number: int) -> None:
    """All that the commands read."""
    inputs.mkdir()
    tiny.write_model(inputs / "model", num_hidden_layers=1)
    tiny.write_rows(inputs, examples=12, seed=1)
    (inputs / "pairs.jsonl").rename(inputs / "held_out.jsonl")
    tiny.write_rows(inputs, examples=24)
    sums = [{"id": f"s{n}", "problem": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(10)]
    samples = [{"id": row["id"], "response": f"\\boxed{{{k}}}"} for row in sums for k in range(400)]
    rows, generations = [], []
    for n in range(number):
        texts = [f"<think>\n{'Let me see. ' * 200}\n</think>\n\\boxed{{{answer}}}" for answer in (n + 2, n + 1)]
        verdicts = {"llama_verification": [False, True], "math_verify_reparsed_answer": [False, True]}
        row = {"problem": f"What is {n} + 1?", "answer": str(n + 1), "source": "own"}
        rows.append({**row, "generations": texts, "problem_is_valid": "Yes", "correctness": verdicts})
        generations += [{**row, "generation": text} for text in texts]
    problems = [{"id": str(n), "problem": f"What is {n} + 1?"} for n in range(0, number, 3)]
    files = {"rows": rows, "generations": generations, "problems": problems, "sums": sums, "samples": samples}
    for name, content in files.items():
        (inputs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), inputs / "rows.parquet", row_group_size=200)


if __name__ == "__main__":
    main()
