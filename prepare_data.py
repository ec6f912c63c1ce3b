r"""Teacher traces in, training data out; also benchmarks, and a check of the one against the other.

    python prepare_data.py openr1 --input open-r1/OpenR1-Math-Raw --output data/openr1 --tokenizer MODEL
    python prepare_data.py traces --input rows.jsonl --output data/own     # our answer checker's verdicts
    python prepare_data.py benchmarks --output data/benchmarks
    python prepare_data.py decontaminate --input data/openr1/p*.jsonl --against data/benchmarks/*.jsonl \
        --output data/clean
    python prepare_data.py toy --output data/toy

rows (parquet or JSONL) -> judge -> select -> positives.jsonl, pairs.jsonl, report.json. Rows stream through
worker processes in their order. An output directory appears under its name when everything in it is written,
or not at all.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shutil
import signal
import sqlite3
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from redi.answer_checker import extract_answer, is_correct
from redi.tokenizer import PROMPT_TEMPLATES, Tokenizer, resolve_directory, user_message

# What becomes of a row, in the order in which it is asked. Every row is counted as read and once more up to
# positives; a positive may give pairs, of which too_long are left out of pairs.jsonl.
OUTCOMES = ("read", "invalid_problem", "excluded_source", "no_problem", "no_answer", "no_generations",
            "mismatched_verdicts", "no_correct", "positives", "pairs", "too_long")
COLUMNS = ("id", "uuid", "unique_id", "problem", "question", "answer", "final_answer", "source",
           "problem_is_valid", "generations", "generation", "response", "correctness", "correctness_llama",
           "correctness_math_verify")
CHUNK_ROWS, CHUNK_CHARACTERS = 64, 1 << 20

# name, hub id, split, number of problems, column of the problem, column of the answer. AMC23 exists twice: 83
# problems of AMC 12 2022 and 2023 (what the paper's evaluator calls AMC23) and 40 of 2023 alone.
BENCHMARKS = (
    ("math500", "HuggingFaceH4/MATH-500", "test", 500, "problem", "answer"),
    ("aime24", "HuggingFaceH4/aime_2024", "train", 30, "problem", "answer"),
    ("amc23", "AI-MO/aimo-validation-amc", "train", 83, "problem", "answer"),
    ("amc23_40", "math-ai/amc23", "test", 40, "question", "answer"),
    ("minerva", "math-ai/minervamath", "test", 272, "question", "answer"),
    ("olympiad_bench", "math-ai/olympiadbench", "test", 675, "question", "final_answer"),
)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    args.command(args)


def prepare(args: argparse.Namespace) -> None:
    """openr1 and traces: positives.jsonl, pairs.jsonl and report.json from rows of generations."""
    if args.tokenizer is not None:  # here for the download and a clear error; the workers load it again
        args.tokenizer = str(Tokenizer.from_pretrained(args.tokenizer).directory)
    files, total = input_files(args.input)
    counts = collections.Counter()
    names = ("positives.jsonl", "pairs.jsonl", "report.json")
    with new_directory(args.output, args.overwrite, names) as directory:
        rows = tqdm(read_rows(files), total=total, unit=" rows", disable=None)
        if args.judge is judge_trace:
            rows = one_row_per_problem(rows, directory)
        prepared = in_parallel(prepare_chunk, args, in_chunks(rows), args.processes)
        with (open(directory / "positives.jsonl", "wb") as positives,
              open(directory / "pairs.jsonl", "wb") as pairs):
            for chunk_counts, positive_lines, pair_lines in prepared:
                positives.write(positive_lines)
                pairs.write(pair_lines)
                counts.update(chunk_counts)
        outcomes = [name for name in OUTCOMES if name != "no_answer" or args.judge is judge_trace]
        report = {name: counts[name] for name in outcomes}
        report["pairs_written"] = counts["pairs"] - counts["too_long"]
        if not counts["positives"]:
            raise ValueError(f"{args.input}: no positive in {counts['read']} rows "
                             f"({', '.join(f'{name} {counts[name]}' for name in outcomes if counts[name])})")
        (directory / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(f"{name:>20} {count:>9,}" for name, count in report.items()))
    print(f"wrote {args.output}")


def prepare_chunk(args: argparse.Namespace, chunk: list[tuple[str, dict]]) -> tuple[dict, bytes, bytes]:
    """Counts by outcome, and the JSONL lines of positives and of pairs, of some rows (each with its place).
    Raises ValueError naming the place."""
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer is not None else None
    counts, positive_lines, pair_lines = collections.Counter(), [], []
    for place, row in chunk:
        counts["read"] += 1
        try:
            judged = args.judge(row, args)
            if isinstance(judged, str):
                counts[judged] += 1
                continue
            selected = select(row["generations"], judged, args, row["problem"])
            if selected is None:
                counts["no_correct"] += 1
                continue
            positive, negatives = selected
            prompt = [user_message(row["problem"], args.prompt_template)]
            if args.system_prompt is not None:
                prompt.insert(0, {"role": "system", "content": args.system_prompt})
            source = row.get("source") or Path(place.rpartition(",")[0]).name
            named = {"id": row_id(row), "source": source}
            positive_lines.append(json_line({"prompt": prompt, "completion": assistant(positive), **named}))
            counts["positives"] += 1
            counts["pairs"] += len(negatives)
            fits = [True] * len(negatives)
            if tokenizer is not None and negatives:
                fits = pairs_fit(tokenizer, prompt, positive, negatives, args)
            counts["too_long"] += fits.count(False)
            for number, negative in enumerate(negatives):
                if fits[number]:
                    named_pair = named if number == 0 else {**named, "id": f"{named['id']}-{number}"}
                    pair_lines.append(json_line({"prompt": prompt, "chosen": assistant(positive),
                                                 "rejected": assistant(negative), **named_pair}))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
    return counts, b"".join(positive_lines), b"".join(pair_lines)


def judge_openr1(row: dict, args: argparse.Namespace) -> str | list[bool]:
    """Which generations are correct by the verdicts that the row carries, or the outcome that excludes it.

    Layouts: OpenR1-Math-Raw (a struct `correctness`), OpenR1-Math-220k (`correctness_llama` and
    `correctness_math_verify`; its problems were all found valid, so that it has no problem_is_valid), and the
    flattened OpenR1-Math-Raw without a Llama verdict. Raises ValueError for a column that is missing or of
    another type."""
    require(row, "problem", "generations", "source")
    if "correctness" in row:
        verdicts = row["correctness"] if row["correctness"] is not None else {}
        if not isinstance(verdicts, dict):
            raise ValueError(f"'correctness' must be a struct of lists, found {type(verdicts).__name__}")
        names = {"llama": "llama_verification", "math_verify": "math_verify_reparsed_answer"}
        missing = [name for name in names.values() if verdicts and name not in verdicts]
    elif "correctness_llama" in row or "correctness_math_verify" in row:
        verdicts, names = row, {"llama": "correctness_llama", "math_verify": "correctness_math_verify"}
        missing = [name for name in names.values() if name not in row]
    else:
        raise ValueError(f"no verdicts: expected a column 'correctness', or 'correctness_llama' and "
                         f"'correctness_math_verify' (found {', '.join(row)}); rows without verdicts are for "
                         "`prepare_data.py traces`")
    wanted = list(names) if args.verdict in ("both", "either") else [args.verdict]
    if lacking := [name for name in wanted if names[name] in missing]:
        other = "math_verify" if lacking == ["llama"] else "llama"
        raise ValueError(f"no column '{names[lacking[0]]}': a generation is correct when Llama's and "
                         f"Math-Verify's verdicts are both true; --verdict {other} takes one verdict alone")
    if "problem_is_valid" in row or "correctness_llama" not in row:
        require(row, "problem_is_valid")
        valid = row["problem_is_valid"]
        if not (isinstance(valid, str) and valid.strip().lower() == "yes"):
            return "invalid_problem"
    if excluded := exclude(row, args):
        return excluded
    lists = [verdicts.get(names[name]) for name in wanted]
    if args.verdict == "either":  # where one judge was not asked (OpenR1-Math-220k), the other decides
        lists = [verdict for verdict in lists if verdict is not None]
    if not lists or any(not isinstance(v, list) or len(v) != len(row["generations"]) for v in lists):
        return "mismatched_verdicts"
    for verdict in itertools.chain(*lists):
        if not (verdict is None or isinstance(verdict, (bool, int, float))):
            raise ValueError(f"a verdict must be true, false or null, found {verdict!r}")
    agree = any if args.verdict == "either" else all
    return [agree(map(bool, of_one)) for of_one in zip(*lists)]  # None, not judged, counts as false


def judge_trace(row: dict, args: argparse.Namespace) -> str | list[bool]:
    """Which generations our answer checker finds correct, or the outcome that excludes the row."""
    require(row, "problem", "answer", "generations")
    if excluded := exclude(row, args):
        return excluded
    gold = answer_text(row["answer"])
    if not gold:
        return "no_answer"
    return [isinstance(text, str) and is_correct(text, gold) for text in row["generations"]]


def exclude(row: dict, args: argparse.Namespace) -> str | None:
    """The outcome of a row that has nothing to select from. Raises ValueError for values of another type."""
    if row.get("source") in args.exclude_sources:
        return "excluded_source"
    problem, generations = row["problem"], row["generations"]
    if not (problem is None or isinstance(problem, str)):
        raise ValueError(f"'problem' must be a string, found {type(problem).__name__}")
    if not (problem and problem.strip()):
        return "no_problem"
    if not (generations is None or isinstance(generations, list)):
        raise ValueError(f"'generations' must be a list of strings, found {type(generations).__name__}")
    if not generations:
        return "no_generations"
    for number, text in enumerate(generations):
        if not (text is None or isinstance(text, str)):
            raise ValueError(f"'generations'[{number}] must be a string, found {type(text).__name__}")
    return None


def select(generations: list, correct: list[bool], args, problem: str) -> tuple[str, list[str]] | None:
    """The first correct generation, and the incorrect ones that it is paired with; None if none is correct.
    A generation without text is neither; one equal to the positive teaches nothing against it."""
    texts = [(text, verdict) for text, verdict in zip(generations, correct) if text and text.strip()]
    if args.truncated == "drop":
        texts = [(text, verdict) for text, verdict in texts if extract_answer(text) is not None]
    positive = next((text for text, verdict in texts if verdict), None)
    if positive is None:
        return None
    negatives = list(dict.fromkeys(text for text, verdict in texts if not verdict and text != positive))
    if args.negatives == "shortest":
        negatives.sort(key=len)
    elif args.negatives == "longest":
        negatives.sort(key=len, reverse=True)
    elif args.negatives == "random":  # a generator of the problem's own: the draw depends on no other row
        random.Random(f"{args.seed} {problem}").shuffle(negatives)
    return positive, negatives[:args.pairs_per_problem]


def pairs_fit(tokenizer: Tokenizer, prompt: list[dict], positive: str, negatives: list, args) -> list[bool]:
    """For each negative, whether its pair is within the limits in tokens: the prompt as the chat template
    renders it, each response with its end of turn."""
    prompt_text = tokenizer.render_prompt(prompt)
    if len(tokenizer.encode(prompt_text)) > args.max_prompt_tokens:
        return [False] * len(negatives)
    responses = [positive, *negatives]
    ids = tokenizer.encode_completions(responses, "<think>\n", [prompt_text] * len(responses))
    positive_fits, *fits = [len(response) + 1 <= args.max_response_tokens for response in ids]
    return [positive_fits and fit for fit in fits]


def decontaminate(args: argparse.Namespace) -> None:
    """Copies JSONL files without rows whose problem shares an n-gram of words with an evaluation problem."""
    from redi.data import read_jsonl  # here, not above: it imports torch, which worker processes do without

    names = [Path(path).name for path in args.input]
    if len({*names, "report.json"}) <= len(names):
        raise ValueError(f"--input: two files of one name, or one named report.json ({', '.join(names)})")
    benchmarks = {}  # n-gram -> {benchmark: id of the first problem that has it}
    for path in args.against:
        rows = 0
        for number, row in read_jsonl(path):
            rows += 1
            problem = row.get("problem", row.get("question"))
            if not isinstance(problem, str):
                raise ValueError(f"{path}, line {number}: no text under 'problem' or 'question'")
            problem_id = str(row.get("id", f"line {number}"))
            for ngram in word_ngrams(problem, args.ngram):
                benchmarks.setdefault(ngram, {}).setdefault(Path(path).stem, problem_id)
        if not rows:
            raise ValueError(f"{path}: no rows")

    report = {"ngram": args.ngram, "files": {}, "examples": []}
    with new_directory(args.output, args.overwrite, (*names, "report.json")) as directory:
        for path, name in zip(args.input, names):
            counts = {"read": 0, "kept": 0, "dropped": 0,
                      "dropped_by_benchmark": {Path(against).stem: 0 for against in args.against}}
            with open(directory / name, "wb") as file:
                for number, row in tqdm(read_jsonl(path), unit=" rows", disable=None, desc=name):
                    counts["read"] += 1
                    try:
                        problem = problem_text(row)
                    except ValueError as error:
                        raise ValueError(f"{path}, line {number}: {error}") from None
                    hits = {}  # benchmark -> (n-gram, id of the evaluation problem)
                    for ngram in word_ngrams(problem, args.ngram):
                        for benchmark, problem_id in benchmarks.get(ngram, {}).items():
                            hits.setdefault(benchmark, (ngram, problem_id))
                    if not hits:
                        counts["kept"] += 1
                        file.write(json_line(row))
                        continue
                    counts["dropped"] += 1
                    for benchmark, (ngram, problem_id) in hits.items():
                        counts["dropped_by_benchmark"][benchmark] += 1
                        if counts["dropped_by_benchmark"][benchmark] <= args.examples:
                            report["examples"].append({
                                "file": name, "line": number, "benchmark": benchmark, "id": problem_id,
                                "ngram": ngram, "problem": problem[:300]})
            if not counts["read"]:
                raise ValueError(f"{path}: no rows")
            report["files"][name] = counts
        (directory / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for name, counts in report["files"].items():
        dropped = ", ".join(f"{benchmark} {n}" for benchmark, n in counts["dropped_by_benchmark"].items())
        print(f"{name}: {counts['kept']:,} of {counts['read']:,} rows kept, {counts['dropped']:,} dropped "
              f"({dropped})")
    for example in report["examples"]:
        print(f"  {example['file']}, line {example['line']} = {example['benchmark']} {example['id']}: "
              f"\"{example['ngram']}\"")
    print(f"wrote {args.output}")


def word_ngrams(text: str, n: int) -> Iterator[str]:
    """Every run of n words, after Unicode normalisation, without case and punctuation; a text that has fewer
    words is one run."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    for start in range(max(len(words) - n + 1, min(len(words), 1))):
        yield " ".join(words[start:start + n])


def problem_text(row: dict) -> str:
    """The problem in a training row: under `problem`, or what the user says in `prompt` or `messages`."""
    value = next((row[key] for key in ("problem", "question", "prompt", "messages") if key in row), None)
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        value = "\n".join(str(message.get("content")) for message in value if message.get("role") == "user")
    if not (isinstance(value, str) and value.strip()):
        raise ValueError("no problem: expected text under 'problem', 'prompt' or 'messages' "
                         f"(found {', '.join(row) or 'an empty object'})")
    return value


def benchmarks(args: argparse.Namespace) -> None:
    """The paper's benchmarks as problems JSONL, from the hub or from a folder laid out as the hub is."""
    chosen = [benchmark for benchmark in BENCHMARKS if args.only is None or benchmark[0] in args.only]
    with new_directory(args.output, args.overwrite, [f"{name}.jsonl" for name, *_ in chosen]) as directory:
        for name, hub_id, split, size, problem_column, answer_column in chosen:
            source = hub_id if args.mirror is None else Path(args.mirror) / hub_id
            patterns = [f"*{split}*.parquet", f"*{split}*.jsonl"]
            found = resolve_directory(source, patterns, "dataset")
            files = sorted(path for pattern in patterns for path in found.rglob(pattern))
            if not files:
                raise ValueError(f"{source}: no parquet or JSONL file of the split '{split}'")
            lines = []
            for place, row in read_rows(files):
                try:
                    require(row, problem_column, answer_column)
                    problem, answer = row[problem_column], answer_text(row[answer_column])
                    if name == "olympiad_bench" and isinstance(answer, list):
                        answer = ", ".join(answer)  # not alternatives: the problem asks for them all
                    if not (isinstance(problem, str) and problem.strip() and answer):
                        raise ValueError("the problem or the answer is empty")
                    problem_id = f"{name}-{len(lines)}"
                    lines.append(json_line({"id": problem_id, "problem": problem, "answer": answer}))
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from None
            if len(lines) != size:
                raise ValueError(f"{source}: {len(lines)} problems where {name} has {size}")
            (directory / f"{name}.jsonl").write_bytes(b"".join(lines))
            print(f"{name:>15} {size:>4} problems from {hub_id}")
    print(f"wrote {args.output}")


def toy(args: argparse.Namespace) -> None:
    """The data of the embedded example: what `train.py` makes for itself when it is run without arguments."""
    import redi.toy

    names = ("teacher.jsonl", "positives.jsonl", "pairs.jsonl", "problems.jsonl")
    with new_directory(args.output, args.overwrite, names) as directory:
        redi.toy.write_data(directory, args.seed)
    print(f"wrote {args.output}")


def input_files(path_or_hub_id: str) -> tuple[list[Path], int | None]:
    """The files behind --input, and how many rows they hold where that is known beforehand (parquet).

    A file; or a directory or dataset on the hub: the parquet files in it, else the JSONL files, and of a
    repository that keeps several configurations the default one, which lies in data/. Every parquet file is
    opened, so that a broken shard is found before the work begins. Raises ValueError."""
    path = Path(path_or_hub_id)
    if path.exists() and not path.is_dir():
        files = [path]
    else:
        for patterns in (["data/*.parquet", "data/*.jsonl"], ["*.parquet", "*.jsonl"]):
            directory = resolve_directory(path_or_hub_id, patterns, "dataset")
            directory = directory / "data" if (directory / "data").is_dir() else directory
            files = sorted(directory.rglob("*.parquet")) or sorted(directory.rglob("*.jsonl"))
            if files:
                break
        else:
            raise ValueError(f"{path_or_hub_id}: no .parquet or .jsonl file in it")
    total = 0
    for file in files:
        if file.suffix == ".parquet":
            with open_parquet(file) as parquet:
                total += parquet.metadata.num_rows
                if not parquet.metadata.num_rows:
                    raise ValueError(f"{file}: no rows")
        elif file.suffix != ".jsonl":
            raise ValueError(f"{file}: expected a .parquet or .jsonl file")
    return files, total or None


def read_rows(files: list[Path]) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row; a place is "FILE, row N" or "FILE, line N". Raises ValueError naming it."""
    from redi.data import read_jsonl  # here, not above: it imports torch, which worker processes do without

    for file in files:
        rows = 0
        if file.suffix == ".parquet":
            for rows, row in enumerate(read_parquet(file), start=1):
                yield f"{file}, row {rows}", row
        else:
            for rows, (number, row) in enumerate(read_jsonl(file), start=1):
                yield f"{file}, line {number}", row
        if not rows:
            raise ValueError(f"{file}: no rows")


def open_parquet(file: Path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise ValueError(f"{file}: reading parquet needs pyarrow (pip install pyarrow)") from None
    try:
        return pyarrow.parquet.ParquetFile(file, pre_buffer=False)  # whole row groups ahead take memory
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a whole parquet file ({one_line(error)})") from None


def read_parquet(file: Path) -> Iterator[dict]:
    """Rows with those of COLUMNS that the file has, a few at a time."""
    import pyarrow

    with open_parquet(file) as parquet:
        found = parquet.schema_arrow.names
        columns = [name for name in found if name in COLUMNS]
        if not columns:
            raise ValueError(f"{file}: no column that is known here (found {', '.join(found)})")
        try:
            for batch in parquet.iter_batches(batch_size=CHUNK_ROWS, columns=columns):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: damaged, or text that is not UTF-8 ({one_line(error)})") from None


def one_row_per_problem(rows: Iterator[tuple[str, dict]], directory: Path) -> Iterator[tuple[str, dict]]:
    """Rows of one generation each, brought together by problem and answer, in the order in which the problems
    first appear; rows that have `generations` pass as they are. They wait in a file, not in memory."""
    rows = iter(rows)
    first = next(rows)
    rows = itertools.chain([first], rows)
    key = next((key for key in ("generation", "response") if key in first[1]), None)
    if "generations" in first[1] or key is None:
        yield from rows
        return
    path = directory / "rows.sqlite"
    database = sqlite3.connect(path, isolation_level=None)
    try:
        database.executescript("PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                               "CREATE TABLE rows (number INTEGER PRIMARY KEY, problem, place, row);")
        database.execute("BEGIN")
        for place, row in rows:
            try:
                require(row, "problem", "answer", key)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from None
            problem = digest(json.dumps([row["problem"], row["answer"]]))
            row = json.dumps({name: value for name, value in row.items() if name in COLUMNS})
            database.execute("INSERT INTO rows (problem, place, row) VALUES (?, ?, ?)", (problem, place, row))
        database.execute("CREATE INDEX by_problem ON rows (problem, number)")
        database.execute("COMMIT")
        problems = database.execute("SELECT problem, MIN(number) FROM rows GROUP BY problem ORDER BY 2")
        for problem, _ in problems:
            same = database.execute("SELECT place, row FROM rows WHERE problem = ? ORDER BY number",
                                    [problem])
            (place, row), *others = ((place, json.loads(row)) for place, row in same)
            yield place, {**row, "generations": [row.get(key), *(other.get(key) for _, other in others)]}
    except sqlite3.Error as error:
        raise ValueError(f"{path}: {error}") from None
    finally:
        database.close()
        path.unlink(missing_ok=True)


def in_chunks(rows: Iterator[tuple[str, dict]]) -> Iterator[list[tuple[str, dict]]]:
    """Lists of rows bounded in number and in text, so that memory depends on neither corpus nor length."""
    chunk, characters = [], 0
    for place, row in rows:
        generations = row.get("generations")
        chunk.append((place, row))
        if isinstance(generations, list):
            characters += sum(len(text) for text in generations if isinstance(text, str))
        if len(chunk) == CHUNK_ROWS or characters > CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def in_parallel(function: Callable, args: argparse.Namespace, chunks: Iterable, processes: int) -> Iterator:
    """function(args, chunk) for every chunk, in order, by `processes`; few chunks are held at a time."""
    chunks = iter(chunks)
    first = list(itertools.islice(chunks, 2))
    chunks = itertools.chain(first, chunks)
    if processes == 1 or len(first) < 2:
        yield from map(functools.partial(function, args), chunks)
        return
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(processes, spawn, end_with_parent)
    pending = collections.deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(function, args, chunk))
            if len(pending) > 2 * processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        raise ValueError("a worker process died (killed, or out of memory); nothing was written") from None
    finally:
        pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """In a worker: end when the parent is killed, instead of waiting for work for ever."""
    def watch():
        multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=watch, daemon=True).start()


@functools.cache
def load_tokenizer(directory: str) -> Tokenizer:
    return Tokenizer.from_pretrained(directory)


@contextlib.contextmanager
def new_directory(output: str, overwrite: bool, names: Iterable[str]) -> Iterator[Path]:
    """A hidden directory beside `output` that takes its name when the block ends well, and else is removed.

    `names`: the files that the block writes, which `overwrite` may replace. Raises ValueError when output
    holds something else, or another run is writing it."""
    output = Path(output).absolute()
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output}: expected a directory, found a file")
    present = sorted(path.name for path in output.iterdir()) if output.exists() else []
    if present and not overwrite:
        raise ValueError(f"{output} already holds {present[0]}: choose another --output, or --overwrite it")
    if foreign := [name for name in present if name not in names]:
        raise ValueError(f"{output} holds {foreign[0]}, which is not this command's: choose another --output")
    partial = output.with_name(f".{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {output}") from None
        for leftover in partial.iterdir():  # of a run that was killed
            leftover.unlink()
        try:
            yield partial
            for path in partial.iterdir():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            os.fsync(lock)
            if present:
                replaced = output.with_name(f".{output.name}.replaced")
                shutil.rmtree(replaced, ignore_errors=True)
                output.rename(replaced)
            partial.rename(output)
            if present:
                shutil.rmtree(replaced)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.filename is None:  # a write: the disk is full, say
                raise ValueError(f"{output}: {error.strerror}; nothing was written") from None
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def require(row: dict, *names: str) -> None:
    for name in names:
        if name not in row:
            raise ValueError(f"no column '{name}' (found {', '.join(row) or 'none'})")


def row_id(row: dict) -> str:
    """The row's own id, else one made of its problem."""
    own = next((row[name] for name in ("id", "uuid", "unique_id") if row.get(name) not in (None, "")), None)
    return str(own) if own is not None else digest(row["problem"])


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def answer_text(answer) -> str | list[str]:
    """A gold answer as text, or several as a list of texts; "" or [] for none. Raises ValueError."""
    if isinstance(answer, list):
        texts = [answer_text(one) for one in answer]
        return texts[0] if len(texts) == 1 else [text for text in texts if text]
    if isinstance(answer, float) and answer.is_integer():  # AMC's answers are floats in the file: 142.0
        answer = int(answer)
    if answer is not None and not isinstance(answer, (str, int, float)):
        raise ValueError(f"'answer' must be a string or a list of strings, found {type(answer).__name__}")
    return "" if answer is None else str(answer).strip()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def json_line(row: dict) -> bytes:
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text that UTF-8 cannot hold ({error.reason})") from None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name, function, **defaults):
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary,
                                      formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(command=function, **defaults)
        command.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
        command.add_argument("--overwrite", action="store_true", help="replace what this command wrote there")
        return command

    openr1 = add("openr1", prepare, judge=judge_openr1)
    openr1.add_argument("--verdict", choices=("both", "math_verify", "llama", "either"), default="both",
                        help="whose verdicts make a generation correct (the paper: both)")
    traces = add("traces", prepare, judge=judge_trace)
    for command, excluded in ((openr1, ["cn_k12"]), (traces, [])):
        command.add_argument("--input", required=True, metavar="PATH",
                             help="rows: a .parquet or .jsonl file, a directory of them, or a hub id")
        command.add_argument("--exclude-sources", nargs="*", default=excluded, metavar="SOURCE",
                             help="sources left out")
        command.add_argument("--pairs-per-problem", type=positive_int, default=1, metavar="N",
                             help="pairs at most, each of the positive and another negative")
        command.add_argument("--negatives", choices=("first", "shortest", "longest", "random"),
                             default="first", help="which incorrect generations (lengths in characters)")
        command.add_argument("--truncated", choices=("incorrect", "drop"), default="incorrect",
                             help="a generation without a closed \\boxed{}: incorrect, or left out")
        command.add_argument("--seed", type=int, default=0, help="of --negatives random")
        command.add_argument("--prompt-template", choices=tuple(PROMPT_TEMPLATES), default="none",
                             help="what the problem is wrapped in")
        command.add_argument("--system-prompt", metavar="TEXT", help="a system message before every problem")
        command.add_argument("--tokenizer", metavar="PATH",
                             help="model directory or hub id: pairs over the limits below are left out")
        command.add_argument("--max-prompt-tokens", type=positive_int, default=800, metavar="TOKENS",
                             help="of a pair's prompt, as the chat template renders it")
        command.add_argument("--max-response-tokens", type=positive_int, default=19000, metavar="TOKENS",
                             help="of each response, with its end of turn")
        command.add_argument("--processes", type=positive_int, default=os.cpu_count(), metavar="N",
                             help="processes that judge and tokenise")

    command = add("decontaminate", decontaminate)
    command.add_argument("--input", required=True, nargs="+", metavar="FILE", help="training JSONL files")
    command.add_argument("--against", required=True, nargs="+", metavar="FILE", help="problems JSONL files")
    command.add_argument("--ngram", type=positive_int, default=8, metavar="WORDS", help="words in a row")
    command.add_argument("--examples", type=int, default=3, metavar="N", help="shown per file and benchmark")

    command = add("benchmarks", benchmarks)
    command.add_argument("--only", nargs="+", choices=[name for name, *_ in BENCHMARKS], help="these alone")
    command.add_argument("--mirror", metavar="DIR", help="read DIR/HuggingFaceH4/MATH-500/…, not the hub")

    command = add("toy", toy)
    command.add_argument("--seed", type=int, default=0, help="of the problems and the teacher's traces")
    return parser.parse_args(argv)


def positive_int(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores belong to the worker processes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished output is removed
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
