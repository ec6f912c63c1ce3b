"""The fault campaign: kills, full disks and damaged inputs over the three commands, and a table of what was lost.

    python tests/bench/faults.py --seed 0              60 kills, 20 full disks, 440 damaged inputs
    python tests/bench/faults.py --seed 0 --kills 0 --disk-full 0 --kinds config weights

Each command first runs undisturbed. Then, in a folder of its own, each try disturbs it:
  kill      kill -9, either before a file operation chosen at random among all that the run makes (an audit hook
            counts them) or after a random time; of all ranks or of one; up to three times in a row. Then the
            same command again (training with --resume) until it ends.
  disk      the folder is a small tmpfs, filled to the last random few pages before a random file operation and,
            perhaps, freed before a later one. What fails then is run again with space.
  mutation  one input or state file is damaged: bits, bytes, lines, values of its JSON, or one of the hostile
            contents listed below. The command must refuse it in one sentence that names it, or end with the
            result that an independent reading of the damaged file asks for.
A run is a forked process that executes the script as __main__, so that torch is imported once. A byte changed
inside a text or a weight of a model directory makes another valid input: that is no damage which can be told.
"""

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", PYTHONPATH=str(ROOT))

import pytest
import safetensors.torch
import torch

import evaluate
import prepare_data
import train  # noqa: F401  imported once, here, for every forked run
from redi.hub import weights as pretrained
from redi.answer_checker import extract_answer, is_correct
from redi.tokenizer import CHATML_TEMPLATE
from tests import tiny

try:
    import pyarrow
    import pyarrow.parquet
except ModuleNotFoundError:
    pyarrow = None

SECONDS, GIB = 240, 3  # what a run may take: wall time on a busy machine, memory above that of the parent
UNTIMED = ("seconds", "tokens_per_second", "peak_memory_gib")
COLUMNS = ("tries", "survived", "final weights differ", "gaps or repeats in metrics", "samples lost or doubled",
           "wrong results")


@dataclass
class Job:
    """A command, relative to the folder of the try; `again` is what a rerun adds."""

    script: str
    words: str
    again: str = ""
    ranks: int = 1

    @property
    def kind(self) -> str:
        return {"train.py": f"training, {self.ranks} process" + "es" * (self.ranks > 1), "evaluate.py": "evaluation",
                "prepare_data.py": "preparation"}[self.script]


TRAIN = "--model model --output out --steps 5 --batch-size 4 --lr 1e-3 --save-every 1 --log-every 1 "
PAIRS = TRAIN + "--data pairs.jsonl "
EVALUATE = "--model model --problems problems.jsonl --output out --samples 4 --max-new-tokens 24 --rows 3"
JOBS = {
    "sft": Job("train.py", f"sft {TRAIN} --data positives.jsonl", "--resume"),
    "redi": Job("train.py", f"redi {PAIRS} --eval-data held_out.jsonl", "--resume"),
    "dpo": Job("train.py", f"dpo {PAIRS}", "--resume"),
    "redi x2": Job("train.py", f"redi {PAIRS}", "--resume", ranks=2),
    "sft x2": Job("train.py", f"sft {TRAIN} --data positives.jsonl", "--resume", ranks=2),
    "evaluate": Job("evaluate.py", EVALUATE),
    "evaluate x2": Job("evaluate.py", EVALUATE, ranks=2),
    "score": Job("evaluate.py", "--score samples.jsonl --problems problems.jsonl --output out"),
    "traces": Job("prepare_data.py", "traces --input traces.jsonl --output out --processes 1 --tokenizer model",
                  "--overwrite"),
    "openr1": Job("prepare_data.py", "openr1 --input openr1.jsonl --output out --processes 2", "--overwrite"),
    "parquet": Job("prepare_data.py", "openr1 --input openr1.parquet --output out --processes 1", "--overwrite"),
    "decontaminate": Job(
        "prepare_data.py", "decontaminate --input positives.jsonl --against problems.jsonl --output out", "--overwrite"
    ),
    # Two steps from a sharded model, for damaged inputs.
    "short": Job("train.py", f"redi {PAIRS} --steps 2"),
    "short sft": Job("train.py", f"sft {TRAIN} --data positives.jsonl --steps 2"),
    "sharded": Job("train.py", f"redi {PAIRS} --model sharded --steps 1"),
    "decode": Job("evaluate.py", EVALUATE.replace("--samples 4", "--samples 1")),
}
KILLED = ("redi", "redi x2", "evaluate", "traces", "sft", "sft x2", "evaluate x2", "redi", "redi x2", "openr1",
          "dpo", "evaluate", "decontaminate", "sft", "redi x2")
FILLED = ("redi", "evaluate", "redi", "traces", "sft", "redi x2", "dpo", "openr1", "redi", "evaluate x2")


# Inputs, and one process or two that run a command


def write_inputs(place: Path) -> None:
    """Everything that the jobs read, small."""
    place.mkdir(parents=True)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    tiny.write_model(place / "model", vocab_size=300, **shape)
    tiny.write_rows(place, examples=8, seed=1)
    (place / "pairs.jsonl").rename(place / "held_out.jsonl")
    tiny.write_rows(place, examples=12)
    limit, pretrained.SHARD_BYTES = pretrained.SHARD_BYTES, 20_000
    tiny.write_model(place / "sharded", vocab_size=300, **shape)
    pretrained.SHARD_BYTES = limit
    assert (place / "sharded" / "model.safetensors.index.json").is_file()
    problems = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(4)]
    write_jsonl(place / "problems.jsonl", problems)
    traces, openr1 = [], []
    for i in range(40):
        right, wrong = (f"<think>\nAdd {i}.\n</think>\nIt is \\boxed{{{n}}}." for n in (i + 1, i + 2))
        row = {"problem": f"What is {i} + 1?", "source": "test", "generations": [wrong, right][:: 1 - 2 * (i % 2)]}
        traces.append({**row, "answer": str(i + 1)})
        verdicts = [text is right for text in row["generations"]]
        openr1.append({**row, "problem_is_valid": "Yes",
                       "correctness": {"llama_verification": verdicts, "math_verify_reparsed_answer": verdicts}})
    write_jsonl(place / "traces.jsonl", traces)
    thrice = [{**row, "problem": f"{k}. {row['problem']}"} for k in range(3) for row in openr1]  # for two processes
    write_jsonl(place / "openr1.jsonl", thrice)
    if pyarrow:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(openr1), place / "openr1.parquet")
    samples = [{"id": row["id"], "response": f"So \\boxed{{{n}}}"} for row in problems for n in (row["answer"], 7)]
    write_jsonl(place / "samples.jsonl", samples)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Run:
    codes: list[int]  # exit status of each rank, negative for a signal
    out: str
    err: str
    seconds: float
    gib: float  # the largest resident set
    late: bool

    @property
    def ended_well(self) -> bool:
        return not any(self.codes)

    @property
    def refused(self) -> bool:
        """One sentence of each rank that failed, and exit status 1; others may have been ended."""
        errors = [line for line in self.err.splitlines() if line.startswith("error: ") and "has ended" not in line]
        codes = {1} <= set(self.codes) <= {1, -signal.SIGTERM, 128 + signal.SIGTERM}
        return codes and 1 <= len(set(errors)) <= len(self.codes) and "Traceback" not in self.err + self.out


class Running:
    """A command under way in forked processes, one for each rank."""

    def __init__(self, job: Job, place: Path, again: bool = False, hooks: dict | None = None):
        self.logs = place.parent  # not in the place, whose disk may be full
        words = job.words.split() + (job.again.split() if again else [])
        port = tiny.free_port() if job.ranks > 1 else 0
        self.started, self.codes, self.gib, self.late = time.monotonic(), {}, 0.0, False
        sys.stdout.flush(), sys.stderr.flush()
        self.pids = []
        for rank in range(job.ranks):
            if (pid := os.fork()) == 0:
                try:
                    _become(job, place, rank, port, words, (hooks or {}).get(rank))
                finally:
                    os._exit(99)
            self.pids.append(pid)

    def poll(self) -> bool:
        """Whether every rank has ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                found, status, usage = os.wait4(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
                    self.gib = max(self.gib, usage.ru_maxrss / 2**20)
        return len(self.codes) == len(self.pids)

    def kill(self, rank: int, number: int = signal.SIGKILL) -> None:
        if rank not in self.codes:
            os.kill(self.pids[rank], number)

    def wait(self, seconds: float = SECONDS) -> bool:
        """Wait until the end, for so many seconds; as torchrun does, end the ranks that a dead one leaves."""
        deadline = time.monotonic() + seconds
        alone = None
        while not self.poll():
            now = time.monotonic()
            if any(self.codes.values()):
                alone = alone or now
                for rank in range(len(self.pids)):
                    self.kill(rank, signal.SIGKILL if now > alone + 3 else signal.SIGTERM)
            if now > deadline:
                return False
            time.sleep(0.02 if alone else 0.003)
        return True

    def result(self) -> Run:
        if not self.wait():
            self.late = True
            for rank in range(len(self.pids)):
                self.kill(rank)
            self.wait()
        text = {stream: "".join((self.logs / f"{stream}-{rank}").read_text(errors="replace")
                                for rank in range(len(self.pids))) for stream in ("out", "err")}
        codes = [self.codes[rank] for rank in range(len(self.pids))]
        return Run(codes, text["out"], text["err"], time.monotonic() - self.started, self.gib, self.late)


def _become(job: Job, place: Path, rank: int, port: int, words: list[str], hook) -> None:
    """In the child: run the script as `python script words` would."""
    os.setpgid(0, 0)
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(place.parent / f"{stream}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + GIB * 2**30,) * 2)
    if job.ranks > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks), MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(job.ranks))
    os.chdir(place)
    sys.argv = [str(ROOT / job.script), *words]
    if hook:
        sys.addaudithook(FileOperations(place, hook))
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


class FileOperations:
    """An audit hook that calls hook(n) before the n-th operation that can change files in the try's folder."""

    EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.copyfile")

    def __init__(self, place: Path, hook):
        self.place, self.hook, self.count, self.inside = str(place), hook, 0, False

    def __call__(self, event: str, arguments: tuple) -> None:
        if event not in self.EVENTS or self.inside:
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if not path or (os.path.isabs(path) and not path.startswith(self.place)):
            return
        reading = event == "open" and isinstance(arguments[1], str) and not set(arguments[1]) & set("wax+")
        if reading:
            return
        self.count += 1
        self.inside = True
        self.hook(self.count)
        self.inside = False


# What a run leaves, and how it compares with the undisturbed one


@dataclass
class Undisturbed:
    seconds: float
    operations: list[int]  # of files, by rank
    left: dict
    bytes: int


@dataclass
class Result:
    row: str  # of the table
    survived: bool = True
    counts: collections.Counter = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)

    def fault(self, column: str, note: str) -> None:
        self.survived = False
        self.counts[column] = 1
        self.notes.append(f"{column}: {note}")


def what_is_left(job: Job, place: Path) -> dict:
    """The results of a finished run, without what a clock decides."""
    out = place / "out"
    if job.script == "train.py":
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        return {
            "weights": sha256(out / "final" / "model.safetensors"),
            "metrics": [{key: value for key, value in row.items() if key not in UNTIMED} for row in rows],
            "files": {path.name: sha256(path) for path in (out / "final").iterdir()},
        }
    if job.script == "evaluate.py":
        samples = [json.loads(line) for path in sorted(out.rglob("samples*.jsonl")) for line in path.open()]
        results = json.loads((out / "results.json").read_text())
        return {"samples": samples, "results": results}
    report = json.loads((out / "report.json").read_text())
    del report["inputs"]  # their digests, which are others where other bytes mean the same
    files = {path.name: sha256(path) for path in sorted(out.iterdir()) if path.name != "report.json"}
    return {"files": {**files, "report.json": report}}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def compare(job: Job, place: Path, expected: dict, result: Result, ignored: str | None = None) -> None:
    """Note every difference from the undisturbed run, but for one key of metrics.jsonl, and every leftover."""
    try:
        left = what_is_left(job, place)
    except (OSError, ValueError, KeyError) as error:
        return result.fault("wrong results", f"a finished run without its results: {error!r}")
    if "weights" in expected and left["weights"] != expected["weights"]:
        result.fault("final weights differ", "final/model.safetensors")
    if "metrics" in expected:
        if [row["step"] for row in left["metrics"]] != [row["step"] for row in expected["metrics"]]:
            result.fault("gaps or repeats in metrics", str([row["step"] for row in left["metrics"]]))
        elif any({**a, ignored: 0} != {**b, ignored: 0} for a, b in zip(left["metrics"], expected["metrics"])):
            result.fault("wrong results", "metrics.jsonl has other numbers")
    if "samples" in expected:
        found, wanted = ([(row["id"], row["sample"]) for row in one["samples"]] for one in (left, expected))
        if sorted(found) != sorted(wanted):
            result.fault("samples lost or doubled", str(collections.Counter(found) - collections.Counter(wanted)))
        elif left["samples"] != expected["samples"]:
            result.fault("wrong results", "samples.jsonl has other rows, or another order")
        if "results" in expected and left["results"] != expected["results"]:
            result.fault("wrong results", "results.json")
    if "files" in expected and left["files"] != expected["files"]:
        result.fault("wrong results", "other files than those of the undisturbed run")
    output = [path for path in (place / "out").rglob("*") if ".partial" in path.name or ".replaced" in path.name]
    if leftovers := output + list(place.glob("out.*")):
        result.fault("wrong results", f"leftovers: {leftovers}")


def check_checkpoints(place: Path, steps: list[str], result: Result) -> None:
    """Every committed checkpoint named here is whole, by the checksums written in it."""
    for step in steps:
        folder = place / "out" / step / "training_state"
        try:
            digests = json.loads((folder / "state.json").read_text())["sha256"]
            whole = all(sha256(folder / name) == digest for name, digest in digests.items())
        except (OSError, ValueError, KeyError) as error:
            whole = repr(error)
        if whole is not True:
            result.fault("wrong results", f"checkpoint {step} is damaged ({whole})")


def undisturbed(job: Job, inputs: Path, folder: Path) -> Undisturbed:
    place = fresh(inputs, folder)
    counters = folder / "operations"

    def count(rank):
        return lambda n: (counters.parent / f"operations-{rank}").write_text(str(n))

    run = Running(job, place, hooks={rank: count(rank) for rank in range(job.ranks)}).result()
    assert run.ended_well, f"the undisturbed run of {job} failed: {run.err}"
    before = sum(path.stat().st_size for path in inputs.rglob("*") if path.is_file())
    after = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    operations = [int((folder / f"operations-{rank}").read_text()) for rank in range(job.ranks)]
    return Undisturbed(run.seconds, operations, what_is_left(job, place), after - before)


def fresh(inputs: Path, folder: Path) -> Path:
    shutil.rmtree(folder / "place", ignore_errors=True)
    shutil.copytree(inputs, folder / "place")
    return folder / "place"


# Kills


def try_kill(world: "World", index: int, folder: Path) -> Result:
    rng = random.Random(f"{world.seed} kill {index}")
    name = KILLED[index % len(KILLED)]
    job, calm = JOBS[name], world.undisturbed[name]
    result = Result(f"kill -9, {job.kind}")
    place = fresh(world.inputs, folder)
    wanted, kills, share = rng.choice((1, 1, 2, 3)), 0, 1.0
    while kills < wanted:
        victims = list(range(job.ranks)) if rng.random() < 0.5 else [rng.randrange(job.ranks)]
        hooks, after = {}, None
        if rng.random() < 0.6:
            at = rng.randint(1, max(1, int(calm.operations[victims[0]] * share)))
            hooks = {victims[0]: lambda n: n == at and os.kill(os.getpid(), signal.SIGKILL)}
        else:
            after = rng.uniform(0, calm.seconds * share)
        running = Running(job, place, again=kills > 0, hooks=hooks)
        if after is not None and not running.wait(after):
            for rank in victims:
                running.kill(rank)
        run = running.result()
        if run.late:
            result.fault("wrong results", "hung")
            return result
        if -signal.SIGKILL in run.codes:
            kills += 1
            continue
        if not run.ended_well:
            result.fault("wrong results", f"kill {kills}: failed: {run.codes} {run.err[-600:]}")
            return result
        if kills:  # it ended before the next kill came: good
            break
        share *= 0.7
        place = fresh(world.inputs, folder)
    saved = "in a save" if list(place.glob("out/*.partial")) else ""
    run = Running(job, place, again=True).result()
    if not run.ended_well:
        result.fault("wrong results", f"after {kills} kills the rerun ended with {run.codes}: {run.err[-900:]}")
    else:
        compare(job, place, calm.left, result)
    result.counts["kills"], result.counts["during a save"] = kills, bool(saved)
    return result


# Full disks


def try_disk(world: "World", index: int, folder: Path) -> Result:
    rng = random.Random(f"{world.seed} disk {index}")
    name = FILLED[index % len(FILLED)]
    job, calm = JOBS[name], world.undisturbed[name]
    result = Result(f"full disk, {job.kind}")
    inputs = sum(path.stat().st_size + 8192 for path in world.inputs.rglob("*"))
    place = folder / "place"
    place.mkdir()
    with tmpfs(place, inputs + 3 * calm.bytes + 2**22):
        shutil.copytree(world.inputs, place, dirs_exist_ok=True)
        victim = rng.randrange(job.ranks)
        full_at = rng.randint(1, calm.operations[victim])
        freed_at = full_at + rng.choice((rng.randint(1, 40), 10**9))
        leave = rng.choice((0, 0, rng.randint(0, 3), rng.randint(0, calm.bytes // 4096))) * 4096

        def hook(n):
            if n == full_at:
                fill(place, leave)
            elif n == freed_at:
                (place / "filler").unlink()

        run = Running(job, place, hooks={victim: hook}).result()
        result.counts["stopped by it"] = not run.ended_well
        result.counts["noticed"] = "No space left" in run.out + run.err
        if run.late:
            result.fault("wrong results", "hung")
        elif not run.ended_well:
            if not run.refused:
                result.fault("wrong results", f"not one sentence: {run.codes} {run.err[-900:]}")
            if "No space left" not in run.err or not ("out" in run.err or ".jsonl" in run.err):
                result.fault("wrong results", f"the sentence does not tell what and why: {run.err}")
            steps = sorted(path.name for path in place.glob("out/step-??????"))
            if job.script == "train.py":
                check_checkpoints(place, steps, result)
            (place / "filler").unlink(missing_ok=True)
            run = Running(job, place, again=True).result()
            if not run.ended_well:
                result.fault("wrong results", f"with space again it ended with {run.codes}: {run.err[-900:]}")
        if run.ended_well:
            compare(job, place, calm.left, result, ignored="best_step")  # of those that the disk had space for
    return result


@contextlib.contextmanager
def tmpfs(mount: Path, size: int):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)


def fill(mount: Path, leave: int) -> None:
    with open(mount / "filler", "wb") as file:
        space = os.statvfs(mount)
        size = max(0, space.f_bavail * space.f_bsize - leave)
        if size:
            os.posix_fallocate(file.fileno(), 0, size)


def why_no_mounts(folder: Path) -> str | None:
    """The reason why disks cannot be filled here, or None."""
    (folder / "probe").mkdir()
    try:
        with tmpfs(folder / "probe", 2**20):
            return None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"no tmpfs can be mounted: {(getattr(error, 'stderr', None) or str(error).encode()).decode().strip()}"


# Damaged inputs. A kind: the job, the file, how to damage it, and what an independent reading of it asks for:
# "refuse", "same" (as undisturbed, if it is taken at all) or "either" (another valid input).


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    data, at = bytearray(data), rng.randrange(len(data))
    length = min(rng.choice((1, 2, 8, 64, 1000)), len(data))
    match rng.randrange(9):
        case 0 | 1:
            for _ in range(rng.choice((1, 1, 4, 32))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 2:
            del data[at:]
        case 3:
            data[at:at] = rng.choice((rng.randbytes(length), bytes(length), b"\xff\xfe", b"\xf0\x28\x8c\x28", b"\r\n"))
        case 4:
            del data[at : at + length]
        case 5:
            data[at : at + length] = bytes(len(data[at : at + length]))
        case 6:
            data[at:at] = data[at : at + length]
        case 7:
            data += rng.choice((rng.randbytes(length), bytes(length), b"\n", b" ", b"}"))
        case 8:
            data = bytearray(rng.choice((b"", b"\n", b"null", b"[]", b"{}", b"\xef\xbb\xbf" + bytes(data))))
    return bytes(data)


ODD_VALUES = (None, True, -1, 0, 1, 3, 7.5, 2**31, 2**63, 10**30, -(10**9), 1e308, float("nan"), float("inf"), "", "x",
              "-1", "0", "\u0000", "\ud800", "\u00e9" * 1000, [], [None], [[[]]], {}, {"": 1}, "../../etc/passwd",
              "/etc/passwd", ".", "..")


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Replace, remove, double or add one value somewhere in the tree."""
    tree = json.loads(data)
    return json.dumps(_mutate_tree(tree, rng)).encode()


def _mutate_tree(tree, rng: random.Random):
    places = []

    def walk(node):
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            places.append((node, key))
            walk(value)

    walk(tree)
    node, key = rng.choice(places[:200] + rng.choices(places, k=20))
    match rng.randrange(6):
        case 0:
            del node[key]
        case 1 if isinstance(node, dict):
            node[f"{key}x"] = node.pop(key)
        case 2 if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
            node[key] = rng.choice((node[key] + 1, node[key] - 1, node[key] * 2, node[key] * 10**6, -node[key]))
        case _:
            node[key] = rng.choice(ODD_VALUES)
    return tree


def mutate_line(data: bytes, rng: random.Random) -> bytes:
    """One line of a JSONL file: a value of it, its bytes, or lines doubled, lost, exchanged, run together."""
    lines = data.splitlines(keepends=True)
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(8):
        case 0 | 1 | 2:
            lines[i] = mutate_json(lines[i], rng) + b"\n"
        case 3 | 4:
            lines[i] = mutate_bytes(lines[i], rng)
        case 5:
            lines[i : i + 1] = rng.choice(([lines[i]] * 2, [], [b"\n", lines[i]]))
        case 6:
            lines[i], lines[j] = lines[j], lines[i]
        case 7:
            lines[i] = lines[i].rstrip(b"\n")
    return b"".join(lines)


def mutate_weights(data: bytes, rng: random.Random) -> bytes:
    """The tensors of a safetensors file: names, shapes, dtypes, values; or its header's text; or bytes of it."""
    choice = rng.randrange(10)
    if choice < 3:
        return mutate_bytes(data, rng)
    if choice < 6:  # the header, with the right length before it
        length = int.from_bytes(data[:8], "little")
        header = rng.choice((mutate_json, mutate_json, mutate_bytes))(data[8 : 8 + length], rng)
        length = rng.choice((len(header),) * 4 + (2**63, 0, len(header) - 1))
        return length.to_bytes(8, "little") + header + data[8 + int.from_bytes(data[:8], "little") :]
    tensors = safetensors.torch.load(data)
    name = rng.choice(sorted(tensors))
    match choice:
        case 6:
            tensors[name] = rng.choice((tensors[name].flatten()[1:].clone(), tensors[name][None], torch.zeros(0),
                                        tensors[name].reshape(-1, 1)))
        case 7:
            tensors[name] = tensors[name].to(rng.choice((torch.int32, torch.bool, torch.uint8, torch.complex64)))
        case 8:
            del tensors[name]
        case 9:
            tensors[rng.choice(("extra", name + ".x", "lm_head", ""))] = torch.zeros(3)
    return safetensors.torch.save(tensors)


HOSTILE = {
    "template": [
        b"{% include '/etc/passwd' %}",
        b"{{ ''.__class__.__mro__[1].__subclasses__() }}", b"{" * 100_000, b"\xff\xfe", b"\0",
        b"{{ cycler.__init__.__globals__.os.system('touch escaped') }}", b"{{ raise_exception('no') }}", b"",
        b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", b"{{ messages[5].content }}", b"{{ 1 / 0 }}",
    ],
    "config": [json.dumps({**tiny.QWEN2, "vocab_size": 300, **changes}).encode() for changes in (
        {"vocab_size": 10**9}, {"hidden_size": 2**40}, {"num_hidden_layers": 10**6}, {"num_hidden_layers": 512,
        "hidden_size": 2**16, "intermediate_size": 2**18}, {"head_dim": 7}, {"max_position_embeddings": 2**62},
        {"num_attention_heads": 0}, {"rms_norm_eps": "nan"}, {"rope_theta": float("nan")}, {"model_type": ["qwen2"]},
    )] + [b"[" * 100_000, b'{"vocab_size": ' + b"9" * 10**6 + b"}", b"\xff", b'"qwen2"'],
    "weights": [b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}", b"\0" * 100, b"\x80\x04pickle", b""],
    "index": [json.dumps({"weight_map": {"model.norm.weight": name}}).encode() for name in (
        "../model/model.safetensors", "/etc/passwd", "..", "", "absent.safetensors", "config.json", "\0")]
        + [b'{"weight_map": []}', b'{"weight_map": {"a": 1}}', b"{}"],
    "pairs": [b"\0" * 1000, b'{"prompt": "' + b"x" * 10**8 + b'"}\n', b'{"a":' * 10**5, b"\xff\xfe{}", b"{}\n" * 3,
              b'{"prompt": "a b", "chosen": "a", "rejected": "a"}\n', b"[1]\n"],
    "problems": [b'{"id": 1, "problem": "a", "answer": "1"}\n' * 2, b'{"id": 1, "problem": "a"}\n',
                 b'{"id": 1, "problem": "a", "answer": []}\n', b'{"problem": "", "answer": "1"}\n', b"\0\0\0\0",
                 json.dumps({"problem": "long " * 2000, "answer": "1"}).encode(), b'{"problem": "a", "answer": null}\n',
                 b'{"problem": "a", "answer": {"x": 1}}\n', b'{"problem": "' + b"x" * 10**8 + b'"}\n'],
    "samples": [b'{"id": "p0", "response": 3}\n', b'{"id": "nobody", "response": "x"}\n', b"\0\n", b"{}\n",
                b'{"id": "p0", "response": "\\\\boxed{' + b"{" * 10**5 + b'}"}\n', b""],
    "traces": [b'{"problem": 3, "answer": "1", "generations": []}\n', b'{"problem": "a", "generations": ["x"]}\n',
               b'{"problem": "a", "answer": "1", "generations": "x"}\n', b"", b"\0" * 50,
               b'{"problem": "' + b"x" * 10**8 + b'"}\n'],
    "tokenizer": [b"{}", b"[]", b"", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}'],
}


@dataclass
class Kind:
    job: str
    file: str
    mutators: tuple
    expect: object  # (the file's path, its bytes before, its bytes after) -> "refuse", "same" or "either"
    start: str = "inputs"  # the folder that the run begins with
    again: bool = False


CONFIG_KEYS = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
               "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rope_theta", "rope_scaling",
               "rope_parameters", "rms_norm_eps", "tie_word_embeddings", "eos_token_id")


def expect_json(keys=None):
    """The same where the values of these keys (all, where None) are the same."""
    def expect(path, before, after):
        try:
            old, new = json.loads(before), json.loads(after)
        except (ValueError, RecursionError):
            return "refuse"
        if not isinstance(new, dict):
            return "refuse"
        same = repr(old) == repr(new) if keys is None else all(repr(old.get(k)) == repr(new.get(k)) for k in keys)
        return "same" if same else "either"

    return expect


def expect_weights(path, before, after):
    try:
        new = safetensors.torch.load(after)
    except Exception:  # whatever the library raises: it cannot be read
        return "refuse"
    old = safetensors.torch.load(before)
    if old.keys() - {"lm_head.weight"} != new.keys() - {"lm_head.weight"}:
        return "refuse"
    if any(old[k].shape != new[k].shape or not new[k].is_floating_point() for k in old):
        return "refuse"
    return "same" if all(torch.equal(old[k].float(), new[k].float()) for k in old) else "either"


def expect_rows(*keys):
    """Rows that JSON can read and that have these keys."""
    def expect(path, before, after):
        try:
            old, new = ([json.loads(line) for line in text.split(b"\n") if line.strip()] for text in (before, after))
        except (ValueError, RecursionError):
            return "refuse"
        if not new or not all(isinstance(row, dict) for row in new) or not all(k in row for row in new for k in keys):
            return "refuse"
        return "same" if repr(old) == repr(new) else "either"

    return expect


def expect_our_samples(path, before, after):
    """What stands after the last line end is the rest of a killed run's line, and cut off."""
    return expect_rows("id", "sample", "response")(path, before, after[: after.rfind(b"\n") + 1] or b"{}")


def always(what):
    return lambda path, before, after: what


def expect_parquet(path, before, after):
    try:
        old, new = (pyarrow.parquet.read_table(pyarrow.BufferReader(text)).to_pylist() for text in (before, after))
    except Exception:  # pyarrow has many
        return "refuse"
    return "same" if old == new else "either"


CHECKPOINT = "out/step-000003/"
JSON, LINES = (mutate_json, mutate_json, mutate_bytes), (mutate_line,)
TENSORS = (mutate_weights, mutate_bytes)
KINDS = {
    "config": Kind("short", "model/config.json", JSON, expect_json(CONFIG_KEYS)),
    "weights": Kind("short", "model/model.safetensors", (mutate_weights,), expect_weights),
    "index": Kind("sharded", "sharded/model.safetensors.index.json", JSON, expect_json(("weight_map",))),
    "tokenizer": Kind("short", "model/tokenizer.json", JSON, always("either")),
    "tokenizer config": Kind("decode", "model/tokenizer_config.json", JSON, expect_json()),
    "generation config": Kind("short", "model/generation_config.json", JSON, expect_json()),
    "template": Kind("short", "model/chat_template.jinja", (mutate_bytes,), always("either")),
    "pairs": Kind("short", "pairs.jsonl", LINES, expect_rows("prompt", "chosen", "rejected")),
    "positives": Kind("short sft", "positives.jsonl", LINES, expect_rows("prompt", "completion")),
    "problems": Kind("decode", "problems.jsonl", LINES, expect_rows("id", "problem", "answer")),
    "samples": Kind("score", "samples.jsonl", LINES, expect_rows("id", "response")),
    "traces": Kind("traces", "traces.jsonl", LINES, expect_rows("problem", "answer", "generations")),
    "openr1": Kind("openr1", "openr1.jsonl", LINES, expect_rows("problem", "generations", "correctness")),
    "parquet": Kind("parquet", "openr1.parquet", (mutate_bytes,), expect_parquet),
    "state.json": Kind("redi", CHECKPOINT + "training_state/state.json", JSON, always("same"), "half redi/place", True),
    "rank file": Kind("redi", CHECKPOINT + "training_state/rank-00000-of-00001.safetensors", TENSORS, always("same"),
                      "half redi/place", True),
    "run.json": Kind("redi", "out/run.json", JSON, always("same"), "half redi/place", True),
    "metrics.jsonl": Kind("redi", "out/metrics.jsonl", LINES, always("same"), "half redi/place", True),
    "token cache": Kind("redi", "pairs.jsonl.tokens-*", TENSORS, always("same"), "half redi/place", True),
    "reference cache": Kind("dpo", "pairs.jsonl.reference-*", TENSORS, always("same"), "half dpo/place", True),
    "our samples": Kind("evaluate", "out/*/problems/samples.jsonl", LINES, expect_our_samples,
                        "half evaluate/place", True),
    "settings.json": Kind("evaluate", "out/*/problems/settings.json", JSON, expect_json(), "half evaluate/place", True),
}


def write_half(job: Job, inputs: Path, folder: Path) -> None:
    """A folder as if a run had been killed half way, with the checkpoints of the steps 1 to 3."""
    place = fresh(inputs, folder)
    if job.script == "train.py":
        job = replace(job, words=job.words + " --keep-checkpoints 0")
    run = Running(job, place).result()
    assert run.ended_well, run.err
    out = place / "out"
    if job.script == "train.py":
        for name in ("final", "step-000004", "step-000005"):
            shutil.rmtree(out / name)
        lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
        (out / "metrics.jsonl").write_text("".join(lines[:4]))
    else:
        (out / "results.json").unlink()
        path = next(out.glob("*/problems/samples.jsonl"))
        path.write_text("".join(path.read_text().splitlines(keepends=True)[::2]))


def try_mutation(world: "World", index: int, folder: Path) -> Result:
    rng = random.Random(f"{world.seed} mutation {index}")
    name = world.kinds[index % len(world.kinds)]
    round = index // len(world.kinds)
    kind = KINDS[name]
    job, calm = JOBS[kind.job], world.undisturbed[kind.job]
    result = Result("damaged input")
    place = fresh(world.root / kind.start, folder)
    path = next(place.glob(kind.file), place / kind.file)
    before = CHATML_TEMPLATE.encode() if name == "template" else path.read_bytes()
    hostile = HOSTILE.get(name, [])
    if round % 2 and round // 2 < len(hostile):
        after = hostile[round // 2]
    else:
        after = before
        while after == before:
            after = rng.choice(kind.mutators)(before, rng)
    path.write_bytes(after)
    expected = kind.expect(path, before, after)
    run = Running(job, place, again=kind.again).result()
    about = f"{name} {index} ({folder}), {expected}, {run.codes}, {run.err[-300:]!r}"
    if run.late or run.gib > GIB:
        result.fault("wrong results", f"{'hung' if run.late else f'{run.gib:.1f} GiB'}: {about}")
    elif run.ended_well:
        result.counts["unharmed"] = 1
        if expected == "refuse":
            result.fault("wrong results", f"taken although it cannot be read: {about}")
        elif expected == "same":
            # A key that nothing depends on is passed on to final/config.json, and counts as no damage.
            # Nor do other bytes with the same meaning, but the digest of that file in results.json is another.
            skipped = {"train.py": {"files"}, "evaluate.py": set() if kind.again else {"results"}}.get(job.script, ())
            left = {key: value for key, value in calm.left.items() if key not in skipped}
            if name == "metrics.jsonl":  # its numbers are not checked, its steps are
                left.pop("metrics")
                check_other_run(place, calm, run.out, result)
            compare(job, place, left, result)
            damaged = kind.file.startswith(CHECKPOINT) and not same_content(before, after)
            if damaged and "is corrupt and skipped" not in run.out:
                result.fault("wrong results", f"damage not named: {about}")
        elif job.script == "evaluate.py":
            check_samples(place, job, result)
        elif job.script == "train.py":
            check_other_run(place, calm, run.out, result)
        if result.notes:
            result.notes.append(about)
    elif not run.refused:
        result.fault("wrong results", f"not one sentence: {about} {run.err[-1500:]}")
    else:
        result.counts["refused"] = 1
        names = {path.stem, str(path.parent.relative_to(place)).split("/")[0]} - {"."}
        if name == "template":  # what is wrong with it may show only in what it makes of a row
            names.add("pairs.jsonl, line")
        if not any(one in run.err for one in names) or len(run.err) > 1500:
            result.fault("wrong results", f"the sentence does not name the file: {about}")
    if (place / "escaped").exists():
        result.fault("wrong results", f"a template escaped its sandbox: {about}")
    return result


def same_content(before: bytes, after: bytes) -> bool:
    """Whether only the white space of a JSON file has changed."""
    try:
        return repr(json.loads(before)) == repr(json.loads(after))
    except (ValueError, RecursionError):
        return False


def check_samples(place: Path, job: Job, result: Result) -> None:
    """Another valid input: the samples must still be complete, without repeats, and scored as they should be."""
    answers = {str(row["id"]): row for row in map(json.loads, filter(str.strip, (place / "problems.jsonl").open()))
               if row.get("id") is not None}
    if job is JOBS["score"]:
        return
    rows = what_is_left(job, place)["samples"]
    keys = [(row["id"], row["sample"]) for row in rows]
    samples = int(job.words.partition("--samples ")[2].split()[0])
    wanted = {(id, k) for id in answers for k in range(samples)}
    if len(set(keys)) < len(keys) or not wanted <= set(keys):
        result.fault("samples lost or doubled", f"{keys}")
    for row in rows:
        answer = answers.get(row["id"], {}).get("answer")
        if not isinstance(answer, str):
            continue
        if (row["answer"], row["correct"]) != (extract_answer(row["response"]), is_correct(row["response"], answer)):
            result.fault("wrong results", f"a sample with another score than its response has: {row}")


def check_other_run(place: Path, calm: Undisturbed, said: str, result: Result) -> None:
    """Another valid input: every step is in the log, or it is said that it lacks some."""
    left = what_is_left(JOBS["short"], place)
    steps = [row["step"] for row in left["metrics"]]
    if steps != [row["step"] for row in calm.left["metrics"]] and not (steps == sorted(set(steps)) and "lacks" in said):
        result.fault("gaps or repeats in metrics", str(steps))
    numbers = [row.get(key, 0) for row in left["metrics"] for key in ("loss", "grad_norm")]
    if None in numbers and not any(row.get("skipped") for row in left["metrics"]):
        result.fault("wrong results", "numbers that are not finite, and no step was skipped")


# The campaign


@dataclass
class World:
    seed: int
    root: Path
    undisturbed: dict
    kinds: list[str]

    @property
    def inputs(self) -> Path:
        return self.root / "inputs"


TRIES = {"kill": try_kill, "disk": try_disk, "mutation": try_mutation}
_world: World | None = None  # set before the workers are forked, which inherit it


def one_try(task: tuple[str, int]) -> Result:
    what, index = task
    folder = _world.root / f"{what}-{index}"
    folder.mkdir()
    try:
        result = TRIES[what](_world, index, folder)
    except Exception:
        result = Result(what)
        result.fault("wrong results", f"{what} {index}: the campaign itself failed: {traceback.format_exc()}")
    if result.survived:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        result.notes = [f"[{what} {index}] {note}" for note in result.notes]
    return result


def campaign(root: Path, seed: int, tries: dict[str, int], kinds: list[str], jobs: int, say=print) -> list[Result]:
    """Run so many tries of each sort. Returns their results; folders of failed ones stay below root."""
    global _world
    write_inputs(root / "inputs")
    if not pyarrow:
        say("parquet files are left out: pyarrow is not installed")
        kinds = [kind for kind in kinds if kind != "parquet"]
    if tries["disk"] and (reason := why_no_mounts(root)):
        say(f"full disks are left out: {reason}")
        tries = {**tries, "disk": 0}
    names = set(KILLED[: tries["kill"]]) | set(FILLED[: tries["disk"]])
    names |= {KINDS[kind].job for kind in kinds[: tries["mutation"]]}
    calm = {}
    for name in sorted(names):
        (root / name).mkdir()
        calm[name] = undisturbed(JOBS[name], root / "inputs", root / name)
        say(f"undisturbed {name}: {calm[name].seconds:.1f} s, file operations {calm[name].operations}")
        if f"half {name}/place" in {KINDS[kind].start for kind in kinds}:
            write_half(JOBS[name], root / "inputs", root / f"half {name}")
    _world = World(seed, root, calm, kinds)
    tasks = [(what, index) for what, count in tries.items() for index in range(count)]
    results = []
    started = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        for result in pool.map(one_try, tasks):
            results.append(result)
            for note in result.notes:
                say(f"  {note}")
            if len(results) % 20 == 0:
                say(f"{len(results)} of {len(tasks)} tries, {time.monotonic() - started:.0f} s")
    return results


def table(results: list[Result]) -> str:
    rows = collections.defaultdict(collections.Counter)
    for result in results:
        rows[result.row].update({"tries": 1, "survived": int(result.survived), **result.counts})
    total = sum(rows.values(), collections.Counter())
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, counts in [*sorted(rows.items()), ("all", total)]:
        lines.append(f"| {name} | " + " | ".join(str(counts[column]) for column in COLUMNS) + " |")
    return "\n".join(lines) + (
        f"\n{total['kills']} kills in all, {total['during a save']} tries ended in a save; {total['noticed']} runs "
        f"met the full disk, {total['stopped by it']} ended for it; {total['refused']} damaged inputs refused, "
        f"{total['unharmed']} taken"
    )


@pytest.mark.slow
def test_a_small_campaign(tmp_path):
    results = campaign(tmp_path, 1, {"kill": 15, "disk": 10, "mutation": 44}, list(KINDS), jobs=2)
    print(table(results))
    assert all(result.survived for result in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--disk-full", type=int, default=20)
    parser.add_argument("--mutations", type=int, default=440)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), help="of damaged files")
    parser.add_argument("--jobs", type=int, default=2, help="tries side by side")
    parser.add_argument("--keep", type=Path, help="an empty directory for the folders of the tries")
    args = parser.parse_args()
    started = time.monotonic()
    root = args.keep or Path(tempfile.mkdtemp(prefix="faults-"))
    tries = {"kill": args.kills, "disk": args.disk_full, "mutation": args.mutations}
    results = campaign(root, args.seed, tries, args.kinds, args.jobs, lambda text: print(text, flush=True))
    print(table(results))
    print(f"{time.monotonic() - started:.0f} s, seed {args.seed}")
    if all(result.survived for result in results):
        shutil.rmtree(root)
    else:
        sys.exit(f"folders of the tries that failed: {root}")


if __name__ == "__main__":
    main()
