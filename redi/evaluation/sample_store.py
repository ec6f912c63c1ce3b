"""Storage of samples: appended as they finish, merged, never drawn twice; and reading samples of other engines.

A store is a directory for one model on one benchmark. settings.json has everything that its samples depend on besides
their problems; samples.jsonl has one line for each sample. Rank 0 appends to samples.jsonl, rank N to
samples.rank-N.jsonl, which rank 0 merges when all are done or, after an interruption, when the next run starts.
"""

from collections.abc import Iterator
from pathlib import Path

from redi import answer_checker
from redi.files import (
    append_row, drop_partial_line, error_context, file_digest, json_line, lock_directory, make_directory, read_json,
    read_jsonl, write_atomically, write_json,
)
from redi.problems import Benchmark, judge

Key = tuple[str, int]  # id of the problem, number of the sample from 0
TYPES = {
    "id": (str,), "sample": (int,), "response": (str,), "finish_reason": (str, type(None)),
    "tokens": (int, type(None)), "answer": (str, type(None)), "correct": (bool,),
}  # fmt: skip
FINISH_KEYS = ("finish_reason", "stop_reason", "done_reason")
# How engines name the limit that ended a response. Other reasons are kept as they are.
LENGTH_REASONS = {
    "length", "limit", "max_length", "max_tokens", "max_new_tokens", "max_output_tokens", "max_completion_tokens",
    "model_length", "token_limit", "truncated",
}  # fmt: skip


def scored(row: dict, benchmark: Benchmark, open_thought_counts: bool = False, opened: bool = False) -> dict:
    """A sample with its verdict: `answer`, the content of the last box or None, and `correct`.

    opened: whether the prompt has opened the thought in which the response begins.
    """
    response = "<think>" * opened + row["response"]
    answer, correct = judge(response, benchmark.answers[row["id"]], open_thought_counts)
    return {**row, "answer": answer, "correct": correct}


def checker_version() -> str:
    return f"{answer_checker.VERSION} ({file_digest(answer_checker.__file__)[:16]})"


def in_order(samples: dict[Key, dict], benchmark: Benchmark) -> dict[Key, dict]:
    """Sorted by the position of the problem in the benchmark's file, then by number."""
    place = {id: i for i, id in enumerate(benchmark.answers)}
    return dict(sorted(samples.items(), key=lambda item: (place[item[0][0]], item[0][1])))


class SampleStore:
    def __init__(
        self, folder: Path, settings: dict, benchmark: Benchmark, code: dict[str, str] | None = None,
        keep_samples: bool = False, **scoring: bool,
    ):  # fmt: skip
        """settings: what a sample depends on. Samples of different settings are never mixed.
        code: digests of the code that makes samples, by file; with keep_samples, those of other code are accepted.
        scoring: keyword arguments of `scored`.

        Writes nothing. Raises ValueError where the directory has samples of other settings or other code.
        """
        self.folder, self.settings, self.benchmark = folder, settings, benchmark
        self.code, self.keep_samples, self.scoring = code, keep_samples, scoring
        self._check_settings()

    def _check_settings(self) -> dict | None:
        """The content of settings.json; None for a new directory."""
        path = self.folder / "settings.json"
        if not path.is_file():
            if any(self.folder.glob("samples*.jsonl")):
                raise ValueError(f"{self.folder}: has samples but no settings.json; choose another --output")
            return None
        found = read_json(path)
        if self.code and not self.keep_samples and found.get("code") != self.code:
            before = found.get("code") if isinstance(found.get("code"), dict) else {}
            changed = [name for name, digest in self.code.items() if before.get(name) != digest]
            what = ", ".join(changed) if before else "the code (settings.json has no record of it)"
            raise ValueError(f"{self.folder}: has samples made by another version of {what}; --keep-samples "
                             "continues with them, another --output starts again")
        for key, value in self.settings.items():
            if found.get(key) != value and not (self.keep_samples and key not in found):
                raise ValueError(f"{self.folder}: has samples made with {key} {found.get(key)!r}, now {value!r}; "
                                 "choose another --output or remove that directory")
        return found

    def open(self) -> None:
        """Create and lock the directory, remove temporary files of a killed run, write settings.json. For rank 0."""
        make_directory(self.folder)
        lock_directory(self.folder)
        found, settings = self._check_settings(), {**self.settings, "checker": checker_version()}
        if self.code:
            settings["code"] = self.code
        for leftover in self.folder.glob("*.partial-*"):
            leftover.unlink()
        if found != settings:
            write_json(self.folder / "settings.json", settings)

    def done(self) -> set[Key]:
        """The samples that exist. After a `merge`, for every rank."""
        return {key for key, _ in self._read(self._file(0))}

    def append(self, row: dict, rank: int) -> None:
        """Append a scored sample atomically: where the disk is full, OSError and no part of the line."""
        append_row(self._file(rank), row)

    def merge(self, rescore: bool = False) -> dict[Key, dict]:
        """Merge all ranks' samples into samples.jsonl, in the order of the problems, and return them. For rank 0.

        rescore: compute each verdict again, as the checker or the gold answers may have changed (milliseconds at most).
        It can be killed at any time: the other files are removed only after their rows are merged, and duplicates
        count once. Raises ValueError where two rows of one sample differ.
        """
        others = sorted(self.folder.glob("samples.rank-*.jsonl"))
        samples, stored = {}, []
        for path in [self._file(0), *others]:
            drop_partial_line(path)
            for key, row in self._read(path):
                stored.append(row)
                known = samples.setdefault(key, self.scored(row) if rescore else row)
                if known["response"] != row["response"]:
                    raise ValueError(f"{path}: sample {key[1]} of id {key[0]!r} occurs twice, with different responses")
        ordered = in_order(samples, self.benchmark)
        if others or stored != list(ordered.values()):
            self.replace(ordered)
        for path in others:
            path.unlink()
        return ordered

    def scored(self, row: dict) -> dict:
        return scored(row, self.benchmark, **self.scoring)

    def replace(self, samples: dict[Key, dict]) -> None:
        """Write samples.jsonl atomically."""
        with write_atomically(self._file(0)) as file:
            file.writelines(map(json_line, samples.values()))

    def _file(self, rank: int) -> Path:
        return self.folder / (f"samples.rank-{rank}.jsonl" if rank else "samples.jsonl")

    def _read(self, path: Path) -> Iterator[tuple[Key, dict]]:
        for line, row in read_jsonl(path) if path.exists() else ():
            with error_context(f"{path}, line {line}"):
                for key, types in TYPES.items():
                    if key not in row or type(row[key]) not in types:
                        raise ValueError(f"{key!r} is {str(row.get(key))[:80]!r}; the line is corrupt")
                if row["id"] not in self.benchmark.answers:
                    raise ValueError(f"id {row['id'][:80]!r} is not among the problems")
            yield (row["id"], row["sample"]), row


def read_responses(path: str | Path, benchmarks: list[Benchmark]) -> list[dict[Key, dict]]:
    """Samples of another engine, for each of the benchmarks, without verdicts.

    A row has `id` and `response` (a text, or a list of them), or `outputs` as vLLM writes them. `finish_reason` and
    `tokens` are None where it lacks them; `sample` counts up. Raises ValueError naming file and line.
    """
    owners = {}  # problem id -> index of its benchmark
    for i, benchmark in enumerate(benchmarks):
        for id in benchmark.answers:
            if owners.setdefault(id, i) != i:
                names = f"{benchmarks[owners[id]].name} and {benchmark.name}"
                raise ValueError(f"problem id {id!r} occurs in both {names}; score them separately")
    samples = [{} for _ in benchmarks]
    for line, row in read_jsonl(path):
        with error_context(f"{path}, line {line}"):
            id = sample_id(row)
            if id not in owners:
                raise ValueError(f"id {id!r} is not among the problems")
            found = samples[owners[id]]
            for output in sample_outputs(row):
                if output["sample"] is None:
                    output["sample"] = next(i for i in range(len(found) + 1) if (id, i) not in found)
                key = id, output["sample"]
                if key in found:
                    raise ValueError(f"sample {key[1]} of id {id!r} occurs twice")
                found[key] = {"id": id, **output}
    if not any(samples):
        raise ValueError(f"{path}: no samples in this file")
    return [in_order(found, benchmark) for found, benchmark in zip(samples, benchmarks)]


def sample_id(row: dict) -> str:
    if row.get("id") is None:
        raise ValueError(f"no key 'id', the id of a problem (found {', '.join(row) or 'no keys'})")
    return str(row["id"])


def sample_outputs(row: dict) -> Iterator[dict]:
    """The responses in one row: sample, response, finish_reason, tokens. Raises ValueError."""
    responses = next((row[key] for key in ("response", "responses", "outputs") if row.get(key) is not None), None)
    for output in responses if isinstance(responses, list) else [row | {"text": responses}]:
        fields = output if isinstance(output, dict) else {"text": output}
        sample, text, token_ids = (fields.get(key) for key in ("sample", "text", "token_ids"))
        if not isinstance(text, str):
            raise ValueError("expected 'response' (a text, or a list of them) or vLLM's 'outputs'")
        if sample is not None and not (type(sample) is int and sample >= 0):
            raise ValueError(f"'sample' is {str(sample)[:80]!r}; expected a whole number from 0 up")
        tokens = len(token_ids) if isinstance(token_ids, list) else fields.get("tokens")
        reason = finish_reason(next((fields[key] for key in FINISH_KEYS if fields.get(key)), None))
        tokens = tokens if type(tokens) is int else None
        yield {"sample": sample, "response": text, "finish_reason": reason, "tokens": tokens}


def finish_reason(reason) -> str | None:
    """The reason that an engine gives for the end of a response, "length" for every name of a limit."""
    if isinstance(reason, dict):  # SGLang: {"type": "length", "length": 32768}
        reason = reason.get("type")
    if not isinstance(reason, str):
        return None
    return "length" if reason.rpartition(".")[2].lower() in LENGTH_REASONS else reason  # "FinishReason.MAX_TOKENS"
