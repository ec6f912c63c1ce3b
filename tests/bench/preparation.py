"""Throughput and memory of prepare_data.py on generated corpora with responses of realistic length.

    python tests/bench/preparation.py --rows 5000 20000 --processes 1 2 --directory /tmp/corpora

Two generations per row, lengths log-normal with a median of 4,000 tokens and at most 20,000, half of them correct;
parquet shards with row groups of 1,000 if pyarrow is installed, else JSONL. `openr1` reads the verdicts in the corpus,
`traces` runs the answer checker; both count tokens. Memory is the sum of the resident sizes of all processes, sampled
every 0.1 s (shared pages count once per process). A peak counts if two consecutive samples reach it, because a forked
process briefly appears as a second copy of its parent.
"""
import argparse
import importlib.util
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS_IN_ALL = 516_000  # of OpenR1-Math-Raw
MEDIAN_TOKENS, SPREAD, LONGEST_TOKENS = 4000, 0.7, 20000
SENTENCES = (
    "Wait, let me check {a} again: if x = {b}, then \\frac{{{a}x + {c}}}{{{b}}} gives {a}{c}, no. ",
    "So the discriminant is {b}^2 - 4\\cdot {a}\\cdot {c} = {a}{b}, and therefore the roots are real. ",
    "Alternatively, we could try substituting y = x + {c} in order to make the equation symmetric.\n\n",
    "Hmm, that seems too easy; maybe I should consider the case where n is divisible by {a} separately. ",
    "By the Cauchy-Schwarz inequality, (a^2 + b^2)({c} + {b}) \\geq (a\\sqrt{{{c}}} + b\\sqrt{{{b}}})^2.\n",
    "Therefore the number of ways is \\binom{{{a}}}{{{c}}} \\times {b}! = {c}{a}{b}. ",
)
ANSWERS = ("\\frac{{{n}}}{{2}}", "{n}", "({n}, {m})", "{n}\\sqrt{{3}}", "x^2 - {n}x + {m}",
           "\\text{{{n} cm}}", "{n}.5")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rows", type=int, nargs="+", default=[5000, 20000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--commands", nargs="+", default=["openr1", "traces"])
    parser.add_argument("--directory", type=Path, required=True, help="for the corpora and the outputs")
    args = parser.parse_args()
    tokenizer = write_tokenizer(args.directory / "tokenizer")
    print("command   rows processes   seconds   CPU s   rows/s   peak MB   hours for 516,000 rows")
    for rows in args.rows:
        corpus = write_corpus(args.directory / f"corpus-{rows}", rows, tokenizer)
        for command in args.commands:
            for processes in args.processes:
                output = args.directory / "output"
                shutil.rmtree(output, ignore_errors=True)
                seconds, cpu, peak = measure([
                    sys.executable, ROOT / "prepare_data.py", command, "--input", corpus, "--output", output,
                    "--tokenizer", tokenizer, "--processes", str(processes)])
                print(f"{command:7} {rows:6} {processes:9} {seconds:9.1f} {cpu:7.1f} {rows / seconds:8.1f} "
                      f"{peak / 1e6:9.0f} {ROWS_IN_ALL / rows * seconds / 3600:10.2f}", flush=True)
        report = json.loads((output / "report.json").read_text())
        print(f"        pairs {report['pairs']}, of which too long {report['too_long']}", flush=True)


def reasoning(rng: random.Random, characters: int) -> str:
    numbers = {"a": rng.randint(2, 99), "b": rng.randint(2, 99), "c": rng.randint(2, 99)}
    sentences = [sentence.format(**numbers) for sentence in SENTENCES]
    mean = sum(map(len, sentences)) / len(sentences)
    return "".join(rng.choices(sentences, k=max(1, round(characters / mean))))


def write_tokenizer(directory: Path) -> Path:
    """Write a byte-level BPE of 2,000 entries to a directory without a chat template (so ChatML is used)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, show_progress=False,
                                  special_tokens=["<|endoftext|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    rng = random.Random(0)
    bpe.train_from_iterator((reasoning(rng, 300) for _ in range(2000)), trainer)
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / "tokenizer.json"))
    return directory


def write_corpus(directory: Path, rows: int, tokenizer: Path) -> Path:
    """Write shards of 2,500 rows, unless they exist."""
    from tokenizers import Tokenizer

    if directory.exists():
        return directory
    rng = random.Random(rows)
    sample = reasoning(rng, 100_000)
    ids = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).encode(sample).ids
    characters_per_token = len(sample) / len(ids)
    partial = directory.with_name(directory.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, rows, 2500)):
        numbers = range(start, min(rows, start + 2500))
        made = [corpus_row(rng, number, characters_per_token) for number in numbers]
        if importlib.util.find_spec("pyarrow") is None:
            (partial / f"train-{shard:05}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
        else:
            import pyarrow
            import pyarrow.parquet

            table = pyarrow.Table.from_pylist(made)
            pyarrow.parquet.write_table(table, partial / f"train-{shard:05}.parquet", row_group_size=1000)
    partial.rename(directory)
    return directory


def corpus_row(rng: random.Random, number: int, characters_per_token: float) -> dict:
    n, m, answer = rng.randint(2, 999), rng.randint(2, 99), rng.choice(ANSWERS)
    generations, verdicts = [], []
    for _ in range(2):
        tokens = min(LONGEST_TOKENS, rng.lognormvariate(math.log(MEDIAN_TOKENS), SPREAD))
        right = rng.random() < 0.5
        box = answer.format(n=n if right else n + 1, m=m)
        thoughts = reasoning(rng, tokens * characters_per_token)
        generations.append(f"<think>\n{thoughts}\n</think>\n\n\\boxed{{{box}}}")
        verdicts.append(right)
    return {"problem": f"Problem {number}. {reasoning(rng, 300)}", "answer": answer.format(n=n, m=m),
            "source": "olympiads", "problem_is_valid": "Yes", "generations": generations,
            "solution": reasoning(rng, 1000),
            "correctness": {"llama_verification": verdicts, "math_verify_reparsed_answer": verdicts}}


def measure(command: list) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds, and the peak of the summed resident sizes of all processes in bytes."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = previous = 0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        now = sum(resident(pid) for pid in tree(process.pid))
        peak, previous = max(peak, min(previous, now)), now
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{command} failed with exit status {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.monotonic() - started, cpu, peak


def tree(pid: int) -> list[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # the process has exited
        return []
    return [pid, *(one for child in children for one in tree(int(child)))]


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    main()
