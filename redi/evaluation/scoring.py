"""Results: one row for each model and benchmark, the printed table, and results.json, which has these rows."""

import math
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

from redi.evaluation.sample_store import Key, checker_version
from redi.files import read_json, write_json
from redi.problems import Benchmark, opens_thought, warn_if_none_correct

MANY_OPEN = 0.9  # share of thoughts that never end, above which the prompt rather than a limit is the reason


def summarise(benchmark: Benchmark, samples: dict[Key, dict], k: int, settings: dict) -> dict:
    """One row of results over samples 0 to k-1 of every problem.

    sem, sem_problems: see `pass_at_1`. Shares of responses: boxed, with an answer in a box; truncated, that reached a
    limit; open_thoughts, with a thought that never ends. None where samples of another engine lack the information.
    """
    rows = [samples[id, sample] for id in benchmark.problems for sample in range(k)]
    correct = np.array([row["correct"] for row in rows]).reshape(-1, k)
    mean, sem, sem_problems = pass_at_1(correct)
    reasons, tokens = ([row[key] for row in rows] for key in ("finish_reason", "tokens"))
    waits = sum(row["response"].count("Wait") for row in rows)  # paper, Figure 8
    total = None if None in tokens else sum(tokens)
    return {
        "benchmark": benchmark.name,
        "problems": len(correct),
        "samples": k,
        "pass@1": mean,
        "sem": sem,
        "sem_problems": sem_problems,
        "pass@k": {str(i): pass_at_k(correct, i) for i in sorted({*(2**j for j in range(k.bit_length())), k})},
        "boxed": sum(row["answer"] is not None for row in rows) / len(rows),
        "truncated": None if None in reasons else reasons.count("length") / len(rows),
        "open_thoughts": sum(opens_thought(row["response"]) for row in rows) / len(rows),
        "mean_tokens": None if total is None else total / len(rows),
        "waits_per_response": waits / len(rows),
        "waits_per_token": waits / total if total else None,
        "settings": settings,
        "versions": {"checker": checker_version()}
        | {package: version(package) for package in ("torch", "tokenizers", "jinja2")},
    }


def report(table: list[dict], output: str | None) -> None:
    """Print the rows and write them to OUTPUT/results.json beside those of other models and benchmarks."""
    lines = [("benchmark", "model", "n", "pass@1", "± runs", "± problems", "pass@k", "boxed", "truncated", "tokens")]
    for row in sorted(table, key=lambda row: row["benchmark"]):
        k, tokens = str(row["samples"]), row["mean_tokens"]
        lines.append((
            row["benchmark"], row["model"], str(row["problems"]),
            *(_percent(row[key]) for key in ("pass@1", "sem", "sem_problems")),
            f"{_percent(row['pass@k'][k])} (k = {k})",
            *(_percent(row[key], " %") for key in ("boxed", "truncated")),
            "-" if tokens is None else f"{tokens:.0f}",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for row in table:
        name, count = f"{row['benchmark']}, {row['model']}", row["problems"] * row["samples"]
        warn_if_none_correct(name, round(row["pass@1"] * count), count)
        if row["open_thoughts"] >= MANY_OPEN and not row["open_thought_counts"]:
            open_thoughts = round(row["open_thoughts"] * count)
            print(f"warning: {name}: {open_thoughts} of {count} responses never close the thought that the prefill "
                  "opens, which counts as no answer; --prefill ''?", file=sys.stderr)
    if not output:
        return
    path = Path(output) / "results.json"
    before = read_results(path) if path.exists() else []
    rows = {(row["benchmark"], row["model"]): row for row in [*before, *table]}
    for leftover in path.parent.glob(f"{path.name}.partial-*"):  # of a killed run
        leftover.unlink()
    write_json(path, {"results": [rows[key] for key in sorted(rows)]})


def read_results(path: Path) -> list[dict]:
    """The rows of a results.json. Raises ValueError naming an invalid file."""
    rows = read_json(path).get("results")
    texts, numbers = ("benchmark", "model", "path"), ("pass@1", "sem")
    for row in rows if isinstance(rows, list) else [None]:
        if not (isinstance(row, dict) and all(isinstance(row.get(key), str) for key in texts) and {*numbers} <= {*row}):
            raise ValueError(f"{path}: expected 'results', a list of rows with {', '.join(texts + numbers)}")
    return rows


def _percent(share: float | None, unit: str = "") -> str:
    return "-" if share is None else f"{100 * share:.1f}{unit}"


def pass_at_1(correct: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean of correct (n problems, k samples) bool, its standard error over runs, and its standard error over problems.

    Over runs, as in the paper (Appendix C.5): each of the k columns is one run over the benchmark with its own
    accuracy; the error describes other samples of the same problems. None for k = 1.
    Over problems: each of the n rows is one problem with its own accuracy; the error describes the same number of
    other problems of this kind, with their samples. None for n = 1.
    """
    runs, problems = correct.mean(axis=0), correct.mean(axis=1)
    return float(runs.mean()), _standard_error(runs), _standard_error(problems)


def _standard_error(values: np.ndarray) -> float | None:
    """Standard error of the mean of n values: their sample standard deviation (ddof 1) / √n; None for one value."""
    n = len(values)
    return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else None


def pass_at_k(correct: np.ndarray, k: int) -> float:
    """Probability that k of a problem's n samples, drawn without replacement, include a correct one: the mean.

    1 - C(n - c, k) / C(n, k) for c correct of n (Chen et al. 2021, Eq. 1). correct: (problems, n), k <= n.
    """
    n = correct.shape[1]
    assert 1 <= k <= n
    return float(np.mean([1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(axis=1).tolist()]))
