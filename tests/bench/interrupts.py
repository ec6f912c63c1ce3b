"""Interrupts of prepare_data.py at random moments, on a busy machine: does every one end, soon, with nothing half done?

    python tests/bench/interrupts.py --tries 100 --seed 0

Each try starts a command in a folder of its own, and sends it SIGINT or SIGTERM at a moment drawn from the time that
it takes undisturbed, counted from when it handles signals itself (Python has its own way before): to the process
alone, or to all processes of its session as a terminal does. `pipe` reads rows from a named pipe that stays open after
the last of them, so that it would wait for ever; `rerun` replaces an older output. Meanwhile --load processes keep the
cores busy. A try fails where

- the command has not ended after 5 seconds, or with another status than 128 + the signal's number, as a shell reports
  it (0 where it was just done);
- the output is there, but not whole: the undisturbed run's files, or with `rerun` the older ones, to the byte;
- a process of its session still lives 5 seconds later;
- it wrote more than that it was interrupted.
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
SECONDS = 5
JOBS = {
    "pipe": "traces --input rows.jsonl --processes 2",
    "files": "traces --input rows.jsonl --processes 2",
    "one process": "traces --input rows.jsonl --processes 1",
    "one generation a row": "traces --input generations.jsonl --processes 2",
    "rerun": "traces --input rows.jsonl --processes 2 --overwrite",
    "parquet": "openr1 --input rows.parquet --processes 2",
    "decontaminate": "decontaminate --input rows.jsonl --against problems.jsonl",
}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--tries", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--load", type=int, default=os.cpu_count(), help="processes that only keep a core busy")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--script", type=Path, default=ROOT / "prepare_data.py", help="another version of the command")
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
        started = time.monotonic()
        place = make_place(folder / "undisturbed", inputs, "files" if job == "pipe" else job)
        start(args.script, job, place).wait()
        undisturbed[job] = (time.monotonic() - started, contents(place))
        assert undisturbed[job][1], f"{job}: the undisturbed run left no output: {(place / 'err').read_text()}"
        shutil.rmtree(place)
    rows = collections.defaultdict(list)  # (job, signal) -> [(seconds, status, what is wrong)]
    done = 0
    while done < args.tries:
        job, number = rng.choice(args.jobs), rng.choice((signal.SIGINT, signal.SIGTERM))
        seconds, status, wrong = interrupt(args.script, job, number, rng, folder / "try", inputs, *undisturbed[job])
        if status is None:
            continue  # it had ended before the signal came
        done += 1
        rows[job, number.name].append((seconds, status, wrong))
        if wrong:
            print(f"try {done}, {job}, {number.name}: {'; '.join(wrong)}", flush=True)
    print(f"{'command':22} {'signal':8} {'tries':>5} {'failed':>6} {'slowest':>8} s   status: how often")
    for (job, name), tries in sorted(rows.items()):
        statuses = collections.Counter(status for _, status, _ in tries)
        print(f"{job:22} {name:8} {len(tries):5} {sum(bool(wrong) for *_, wrong in tries):6} "
              f"{max(seconds for seconds, *_ in tries):10.2f}   {dict(statuses)}")
    failed = sum(bool(wrong) for tries in rows.values() for *_, wrong in tries)
    print(f"{done} interrupts, {failed} failed")
    return failed


def interrupt(script, job, number, rng, place, inputs, seconds, whole):
    """(seconds until the end, status as a shell reports it, what is wrong) of one try; status None where the command
    had ended before the signal came."""
    make_place(place, inputs, job)
    before = contents(place)
    process = start(script, job, place)
    feeder = feed(place / "rows.jsonl", inputs / "rows.jsonl") if job == "pipe" else None
    while process.poll() is None and not catches_sigterm(process.pid):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, seconds))
    if process.poll() is not None:
        shutil.rmtree(place)
        return None, None, []
    to_all = rng.random() < 0.5
    started = time.monotonic()
    os.killpg(process.pid, number) if to_all else process.send_signal(number)
    wrong = []
    try:
        process.wait(4 * SECONDS)
    except subprocess.TimeoutExpired:
        wrong.append("it hangs")
        process.kill()
        process.wait()
    took = time.monotonic() - started
    if feeder:
        os.killpg(feeder.pid, signal.SIGKILL)
        feeder.wait()
    status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    if took > SECONDS:
        wrong.append(f"it took {took:.1f} s")
    if status not in (128 + number, 0):
        wrong.append(f"status {status}")
    if contents(place) not in ({}, before, whole) or (status == 0 and contents(place) != whole):
        wrong.append(f"half an output: {sorted(contents(place))}")
    while members(process.pid) and time.monotonic() < started + took + SECONDS:
        time.sleep(0.05)
    if left := members(process.pid):
        wrong.append(f"left running: {left}")
        os.killpg(process.pid, signal.SIGKILL)
    errors = (place / "err").read_text()
    if errors not in ("interrupted\n", ""):
        wrong.append(f"it wrote {errors[-300:]!r}")
    shutil.rmtree(place)
    return took, status, wrong


def start(script: Path, job: str, place: Path) -> subprocess.Popen:
    with open(place / "err", "w") as errors:
        return subprocess.Popen([sys.executable, script, *JOBS[job].split(), "--output", "out"], cwd=place,
                                stdout=subprocess.DEVNULL, stderr=errors, start_new_session=True)


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


def contents(place: Path) -> dict[str, bytes]:
    """What a user sees of the output."""
    return {str(path.relative_to(place)): path.read_bytes() for path in sorted(place.glob("[!.]*/*"))}


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
    """rows.jsonl, generations.jsonl, rows.parquet and problems.jsonl."""
    inputs.mkdir()
    rows, generations = [], []
    for n in range(number):
        texts = [f"<think>\n{'Let me see. ' * 200}\n</think>\n\\boxed{{{answer}}}" for answer in (n + 2, n + 1)]
        verdicts = {"llama_verification": [False, True], "math_verify_reparsed_answer": [False, True]}
        row = {"problem": f"What is {n} + 1?", "answer": str(n + 1), "source": "own"}
        rows.append({**row, "generations": texts, "problem_is_valid": "Yes", "correctness": verdicts})
        generations += [{**row, "generation": text} for text in texts]
    problems = [{"id": str(n), "problem": f"What is {n} + 1?"} for n in range(0, number, 3)]
    for name, content in (("rows", rows), ("generations", generations), ("problems", problems)):
        (inputs / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    if importlib.util.find_spec("pyarrow") is not None:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), inputs / "rows.parquet", row_group_size=200)


if __name__ == "__main__":
    main()
