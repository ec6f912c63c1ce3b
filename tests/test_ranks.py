"""Several processes in one run, and several runs in one directory: what they must agree in is compared before anything
is written. Processes are forked from one that has imported torch; two ranks with folders of their own stand for two
machines."""

import ctypes
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from redi import distributed
from tests import tiny
from tests.test_train import metrics, wait_for_lines

ROOT = Path(__file__).resolve().parent.parent
CLONE_NEWUSER, CLONE_NEWNET, SKIP = 0x10000000, 0x40000000, 77
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train", "evaluate", "tests.test_ranks"])
TRAIN = ["redi", "--model", "model", "--data", "pairs.jsonl", "--output", "out", "--batch-size", "4", "--lr", "1e-3",
         "--steps", "4", "--save-every", "2"]
EVALUATE = ["--model", "model", "--problems", "problems.jsonl", "--output", "out", "--samples", "1",
            "--max-new-tokens", "8"]
WORDS = {"train": TRAIN, "evaluate": EVALUATE}


class Command:
    """A script in a process of its own, as `python script words` in a folder with these environment variables."""

    def __init__(self, folder: Path, script: str, *words, **env: str):
        folder.mkdir(exist_ok=True)
        self.log = folder / f"log-{time.monotonic_ns()}"
        self.process = FORK.Process(target=run_script, args=(folder, script, list(map(str, words)), env, self.log),
                                    daemon=True)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    def end(self, seconds: float = 100) -> tuple[int, str]:
        """(status, output)"""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode, self.log.read_text() if self.log.exists() else ""

    def communicate(self) -> str:
        return self.log.read_text()


def run_script(folder: Path, script: str, words: list[str], env: dict[str, str], log: Path) -> None:
    os.environ.update(OMP_NUM_THREADS="1", **env)
    os.chdir(folder)
    output = os.open(env.get("STDOUT", log), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    if "NO_NETWORK" in env and ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET):
        os._exit(SKIP)
    distributed.SECONDS_TO_SHOW = 1
    sys.argv = [str(ROOT / script), *words]
    runpy.run_path(sys.argv[0], run_name="__main__")


def two_machines(place: Path, script: str, words: list, changes: tuple = ()) -> list[tuple[int, str]]:
    """Outcomes of one command on two machines; the second has `changes` to the command line too."""
    env = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    ranks = [Command(home(place, rank), script, *words, *changes * rank, RANK=str(rank), **env) for rank in (0, 1)]
    return [rank.end() for rank in ranks]


def home(place: Path, rank: int) -> Path:
    return place / f"machine-{rank}" / "home"


@pytest.fixture
def machines(tmp_path):
    """Two folders with the same model, pairs and problems, and one output directory that both see."""
    (tmp_path / "shared").mkdir()
    first = home(tmp_path, 0)
    tiny.write_model(first / "model", num_hidden_layers=1)
    tiny.write_rows(first, examples=12)
    problems = [{"id": f"p{i}", "problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(4)]
    (first / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    (first / "out").symlink_to(tmp_path / "shared")
    shutil.copytree(first, home(tmp_path, 1), symlinks=True)
    return tmp_path


def other_rows(machine: Path) -> None:
    tiny.write_rows(machine, examples=12, seed=5)


def fewer_rows(machine: Path) -> None:
    rows = (machine / "pairs.jsonl").read_text().splitlines(keepends=True)
    (machine / "pairs.jsonl").write_text("".join(rows[:-1]))


def other_weights(machine: Path) -> None:
    tiny.write_model(machine / "model", num_hidden_layers=1, seed=7)


def no_rows(machine: Path) -> None:
    (machine / "pairs.jsonl").unlink()


def no_weights(machine: Path) -> None:
    shutil.rmtree(machine / "model")


def no_problems(machine: Path) -> None:
    (machine / "problems.jsonl").unlink()


def other_problems(machine: Path) -> None:
    path = machine / "problems.jsonl"
    path.write_text(path.read_text().replace("p3", "p9"))


def other_tokenizer(machine: Path) -> None:
    path = machine / "model" / "chat_template.jinja"
    path.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")


DIFFERENCES = [  # command, what is other on the second machine, what the sentence names
    ("train", ["--lr", "1e-2"], "rank 1 has --lr 0.01, rank 0 0.001"),
    ("train", ["--resume"], "rank 1 has --resume True, rank 0 False"),
    ("train", ["--eval-data", "positives.jsonl"], "rank 1 has --eval-data True, rank 0 False"),
    ("train", other_rows, "rank 1 has --data (SHA-256) "),
    ("train", fewer_rows, "rank 1 has --data (SHA-256) "),
    ("train", no_rows, "pairs.jsonl: no such data file"),
    ("train", no_weights, "model: no such directory"),
    ("evaluate", no_weights, "model: no such directory"),
    ("evaluate", no_problems, "problems.jsonl cannot be read"),
    ("train", other_weights, "rank 1 has --model (SHA-256) "),
    ("evaluate", ["--temperature", "0.5"], "rank 1 has --temperature 0.5, rank 0 0.6"),
    ("evaluate", other_weights, "rank 1 has --model home-model (SHA-256) "),
    ("evaluate", other_tokenizer, "rank 1 has --model home-model (SHA-256) "),
    ("evaluate", other_problems, "rank 1 has --problems problems.jsonl (SHA-256) "),
]


@pytest.mark.parametrize("command, change, message", DIFFERENCES, ids=lambda value: getattr(value, "__name__", None))
def test_what_ranks_must_agree_in_is_compared_before_anything_is_written(machines, command, change, message):
    if callable(change):
        change(home(machines, 1))
        change = []
    for status, output in two_machines(machines, f"{command}.py", WORDS[command], tuple(change)):
        assert status == 1 and f"error: {message}" in output and "Traceback" not in output
    assert set(os.listdir(machines / "shared")) <= {".lock"}


def test_ranks_with_other_code_are_named(monkeypatch):
    import argparse

    monkeypatch.setattr(distributed, "all_gather_object", lambda value: [value, {**value, "code (SHA-256)": "1234"}])
    with pytest.raises(ValueError, match="rank 1 has code .* 1234, rank 0 "):
        distributed.agree_on_flags(argparse.Namespace(lr=1.0), ())


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_an_output_that_the_other_machine_does_not_see_is_noticed_at_the_start(machines, command):
    (home(machines, 1) / "out").unlink()
    for status, output in two_machines(machines, f"{command}.py", WORDS[command]):
        assert status == 1 and f"rank 1 on {socket.gethostname()}" in output and "Traceback" not in output
    assert not list(machines.rglob("metrics.jsonl")) + list(machines.rglob("samples*.jsonl"))


def test_two_machines_train_one_run(machines):
    assert [status for status, _ in two_machines(machines, "train.py", TRAIN)] == [0, 0]
    assert (machines / "shared" / "final").is_dir() and len(metrics(machines / "shared")) == 4


def test_cached_reference_log_probs_that_one_machine_lacks_are_computed_again(machines):
    dpo = ["dpo", *TRAIN[1:]]
    assert Command(home(machines, 0), "train.py", *dpo, "--output", "alone").end()[0] == 0
    assert [status for status, _ in two_machines(machines, "train.py", dpo)] == [0, 0]
    assert len(list(machines.rglob("pairs.jsonl.reference-*"))) == 2


def test_a_second_run_in_one_directory_is_refused_by_the_name_of_the_first(machines):
    words = [*TRAIN, "--steps", "3000"]
    first = Command(home(machines, 0), "train.py", *words)
    wait_for_lines(machines / "shared" / "metrics.jsonl", 3, first)
    os.kill(first.process.pid, signal.SIGSTOP)
    others = [Command(home(machines, 1), "train.py", *words, *flags)
              for flags in (["--resume"], ["--overwrite"], [])]
    for other in others:
        status, output = other.end()
        assert status == 1
        assert f"is in use by process {first.process.pid} on {socket.gethostname()}" in output
    before = (machines / "shared" / "run.json").read_text()
    os.kill(first.process.pid, signal.SIGKILL)
    first.end()
    status, output = Command(home(machines, 1), "train.py", *TRAIN, "--resume").end()
    assert status == 1 and "--steps 3000, not 4" in output  # the lock has gone with its owner
    assert before == (machines / "shared" / "run.json").read_text()


def test_two_examples_in_one_directory(tmp_path):
    first = Command(tmp_path, "train.py", "example", "--output", "out")
    wait_for_lines(tmp_path / "out" / ".lock", 0, first)
    os.kill(first.process.pid, signal.SIGSTOP)
    status, output = Command(tmp_path, "train.py", "example", "--output", "out").end()
    first.process.kill()
    assert status == 1 and f"out is in use by process {first.process.pid} on" in output


def test_two_evaluations_in_one_directory(machines):
    words = [*EVALUATE, "--samples", "4000"]
    first = Command(home(machines, 0), "evaluate.py", *words)
    while not list((machines / "shared").rglob("samples.jsonl")):
        assert first.poll() is None
        time.sleep(0.05)
    os.kill(first.process.pid, signal.SIGSTOP)
    status, output = Command(home(machines, 0), "evaluate.py", *words).end()
    first.process.kill()
    assert status == 1 and f"is in use by process {first.process.pid} on {socket.gethostname()}" in output


def test_tasks_of_slurm_are_told_to_use_torchrun(machines):
    env = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    status, output = Command(home(machines, 0), "train.py", *TRAIN, **env).end()
    assert status == 1 and "torchrun" in output and os.listdir(machines / "shared") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_ends_a_process_that_waits_for_the_others(machines, number):
    env = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    process = Command(home(machines, 0), "train.py", *TRAIN, **env)
    wait_for_port(int(env["MASTER_PORT"]), process)
    os.kill(process.process.pid, number)
    status, output = process.end(10)
    assert status == -number and "Traceback" not in output


def wait_for_port(port: int, process: Command) -> None:
    deadline = time.monotonic() + 60
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_the_end_of_a_session_saves_a_checkpoint(machines):
    process = Command(home(machines, 0), "train.py", *TRAIN, "--steps", "3000", "--save-every", "0")
    wait_for_lines(machines / "shared" / "metrics.jsonl", 3, process)
    os.kill(process.process.pid, signal.SIGHUP)
    status, output = process.end()
    assert status == 128 + signal.SIGHUP and "run the same command with --resume to continue" in output
    assert len(list((machines / "shared").glob("step-*"))) == 1


def test_a_full_disk_under_the_log_does_not_end_a_run(machines):
    words = [*TRAIN, "--log-every", "1"]
    assert Command(home(machines, 0), "train.py", *words, STDOUT="/dev/full").end()[0] == 0
    assert (machines / "shared" / "final").is_dir() and len(metrics(machines / "shared")) == 4


def test_one_process_without_a_network_is_told_what_it_needs(machines):
    status, output = Command(home(machines, 0), "train.py", *TRAIN, NO_NETWORK="1").end()
    if status == SKIP:
        pytest.skip("needs user namespaces")
    assert status == 1 and "ip link set lo up" in output and "Traceback" not in output
