"""Sample answers to benchmark problems and score them: pass@1 ± SEM and pass@k.

    python evaluate.py --model out/redi/final --problems math500.jsonl aime24.jsonl --output out/eval
    torchrun --nproc-per-node 8 evaluate.py …              # the samples are spread over the processes
    python evaluate.py --score samples.jsonl --problems math500.jsonl

Each finished sample is appended to OUTPUT/MODEL/BENCHMARK/samples.jsonl at once; the same command continues
after an interruption, with any number of processes. The table goes to the screen and to OUTPUT/results.json.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from redi import answer_checker
from redi.answer_checker import extract_answer, is_correct
from redi.checkpoint import check_weights, file_digest, load_config, load_pretrained, weights_digest
from redi.data import read_jsonl, write_atomically
from redi.distributed import init_process_group
from redi.generation import Request, generate, sample_key
from redi.metrics import append_row, drop_partial_line, json_line, pass_at_1, pass_at_k
from redi.model import DTYPES, CausalLM
from redi.tokenizer import PROMPT_TEMPLATES, Tokenizer, resolve_directory, user_message

MODEL_FILES = ["*.json", "*.safetensors", "chat_template.jinja"]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass
class Benchmark:
    name: str  # of the file, without its suffix
    problems: dict[str, str]  # by id, in the file's order; the first --limit
    answers: dict[str, list[str]]  # by id, for all of the file: any of them is right
    digest: str  # SHA-256 of the file


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarks = [read_benchmark(path, args.limit) for path in args.problems]
    refuse_equal_names([benchmark.name for benchmark in benchmarks], args.problems)
    if args.score:
        report(score(args, benchmarks), args.output)
        return
    refuse_equal_names([storage_name(path) for path in args.model], args.model)
    joined_here, threads = not dist.is_initialized(), torch.get_num_threads()
    device = init_process_group()
    torch.set_num_threads(args.threads)
    try:
        # Gloo, because ranks wait here for the longest response, and NCCL gives up after ten minutes.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        models = [Model(path, args, device) for path in args.model]
        for model in models:  # all of them before hours are spent on the first
            for benchmark in benchmarks:
                model.check(benchmark)
        table = [row for model in models for row in evaluate(model, benchmarks, args, device, group)]
        if dist.get_rank() == 0:
            report(table, args.output)
        wait_for_all(group)
    finally:
        torch.set_num_threads(threads)
        if joined_here:
            dist.destroy_process_group()


class Model:
    """What must be known of a model before its weights are loaded, and where its samples go."""

    def __init__(self, path: str, args: argparse.Namespace, device: torch.device):
        self.path, self.args = path, args
        self.name = storage_name(path)
        self.directory = resolve_directory(path, MODEL_FILES)
        self.config = load_config(self.directory)
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        if self.tokenizer.vocab_size > self.config.vocab_size:
            ids = self.tokenizer.vocab_size
            raise ValueError(f"{path}: the tokenizer has {ids} ids, the model only {self.config.vocab_size}")
        with torch.device("meta"):
            check_weights(CausalLM(self.config), self.directory)
        digest = hashlib.sha256(weights_digest(self.directory).encode())
        for name in TOKENIZER_FILES:
            if (self.directory / name).is_file():
                digest.update(f"{name} {file_digest(self.directory / name)}".encode())
        self.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        # What a sample depends on, besides the problem. Samples of other settings never mix with these.
        self.settings = {
            "model_digest": digest.hexdigest(),
            "dtype": self.dtype,
            "system_prompt": args.system_prompt,
            "prompt_template": args.prompt_template,
            "prefill": args.prefill,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "max_new_tokens": args.max_new_tokens,
            "seed": args.seed,
        }

    def folder(self, benchmark: Benchmark) -> Path:
        return Path(self.args.output) / self.name / benchmark.name

    def settings_on(self, benchmark: Benchmark) -> dict:
        return {**self.settings, "data_digest": benchmark.digest}

    def check(self, benchmark: Benchmark) -> None:
        """Raises ValueError for prompts that do not fit and for samples of other settings in the folder."""
        check_settings(self.folder(benchmark), self.settings_on(benchmark))
        context = self.config.max_position_embeddings
        for id, prompt_ids in self.prompts(benchmark).items():
            if not 0 < len(prompt_ids) < context:
                raise ValueError(
                    f"{benchmark.name}, problem {id!r}: the prompt has {len(prompt_ids)} tokens; expected from 1 "
                    f"to {context - 1}, as {self.path} has a context of {context}"
                )

    def prompts(self, benchmark: Benchmark) -> dict[str, list[int]]:
        encode, args = self.tokenizer.encode_prompt, self.args
        return {
            id: encode([user_message(problem, args.prompt_template)], args.system_prompt, args.prefill)
            for id, problem in benchmark.problems.items()
        }


def evaluate(model: Model, benchmarks: list[Benchmark], args, device: torch.device, group) -> list[dict]:
    """Draw and score the samples that are missing. Returns a row of results a benchmark (on rank 0)."""
    with contextlib.ExitStack() as locks:
        if dist.get_rank() == 0:
            for benchmark in benchmarks:
                folder = model.folder(benchmark)
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(locked(folder))
                start_folder(folder, model.settings_on(benchmark), benchmark)
        wait_for_all(group)
        draw_missing(model, benchmarks, args, device, group)
        wait_for_all(group)
        if dist.get_rank() != 0:
            return []
        table = []
        for benchmark in benchmarks:
            samples = merge_samples(model.folder(benchmark), benchmark)
            row = summarise(benchmark, samples, args.samples, model.settings_on(benchmark))
            table.append({"model": model.name, "path": model.path, **row})
        return table


def draw_missing(model: Model, benchmarks: list[Benchmark], args, device: torch.device, group) -> None:
    """Find the samples that no run has finished yet, and draw this rank's share of them."""
    rank, ranks, context = dist.get_rank(), dist.get_world_size(), model.config.max_position_embeddings
    todo, requests = [], []  # todo[i] = (benchmark, id, sample) of requests[i]
    for benchmark in benchmarks:
        done = {key for key, _ in read_samples(samples_file(model.folder(benchmark), 0), benchmark)}
        for id, prompt_ids in model.prompts(benchmark).items():
            limit = min(args.max_new_tokens, context - len(prompt_ids))
            for sample in range(args.samples):
                if (id, sample) not in done:
                    todo.append((benchmark, id, sample))
                    requests.append(Request(prompt_ids, sample_key(args.seed, id, sample), limit))
    wait_for_all(group)  # nobody appends before everybody has read
    if rank == 0 and any(request.max_new_tokens < args.max_new_tokens for request in requests):
        print(
            f"{model.name}: the context of {context} tokens ends some responses before --max-new-tokens "
            f"{args.max_new_tokens}",
            file=sys.stderr,
        )
    # One by one to the ranks: every rank gets as many, of every problem.
    draw(model, todo[rank::ranks], requests[rank::ranks], args, device, rank)


def draw(model: Model, todo: list, requests: list[Request], args, device: torch.device, rank: int) -> None:
    """Generate these samples, and append each with its score as it finishes."""
    if not requests:
        return
    weights = load_pretrained(model.directory, device, DTYPES[model.dtype]).eval()
    rows = args.rows or (64 if device.type == "cuda" else 16)
    samples = generate(weights, requests, model.tokenizer.stop_ids, args.temperature, args.top_p, rows)
    progress = tqdm(samples, model.name, len(requests), unit="sample", disable=rank != 0 or None, smoothing=0)
    for index, ids, finish_reason in progress:
        benchmark, id, sample = todo[index]
        text_ids = ids[:-1] if finish_reason == "stop" else ids
        row = {
            "id": id,
            "sample": sample,
            "response": args.prefill + model.tokenizer.decode(text_ids),
            "finish_reason": finish_reason,
            "tokens": len(ids),
        }
        append_row(samples_file(model.folder(benchmark), rank), scored(row, benchmark))


def scored(row: dict, benchmark: Benchmark) -> dict:
    response, answers = row["response"], benchmark.answers[row["id"]]
    return {**row, "answer": extract_answer(response), "correct": is_correct(response, answers)}


def samples_file(folder: Path, rank: int) -> Path:
    """Rank 0 appends to samples.jsonl. It takes over the other ranks' files when all are done or, after an
    interruption, when the next run starts."""
    return folder / (f"samples.rank-{rank}.jsonl" if rank else "samples.jsonl")


SAMPLE_TYPES = {
    "id": (str,), "sample": (int,), "response": (str,), "finish_reason": (str, type(None)),
    "tokens": (int, type(None)), "answer": (str, type(None)), "correct": (bool,),
}  # fmt: skip


def read_samples(path: Path, benchmark: Benchmark) -> Iterator[tuple[tuple[str, int], dict]]:
    """((id, sample), row) of each line of a samples file of ours, which may not exist yet."""
    for line, row in read_jsonl(path) if path.exists() else ():
        for key, types in SAMPLE_TYPES.items():
            if key not in row or type(row[key]) not in types:
                raise ValueError(f"{path}, line {line}: {key!r} is {str(row.get(key))[:80]!r}; the line is damaged")
        if row["id"] not in benchmark.answers:
            raise ValueError(f"{path}, line {line}: id {row['id'][:80]!r} is not among the problems")
        yield (row["id"], row["sample"]), row


def merge_samples(folder: Path, benchmark: Benchmark, rescore: bool = False) -> dict[tuple[str, int], dict]:
    """Bring all ranks' samples into samples.jsonl, in the order of the problems, and return them by (id,
    sample).

    Killed at any moment it loses nothing: the other files go only after their rows are in place, and a row
    met twice counts once. Raises ValueError where two rows of one sample differ.
    """
    main, others = samples_file(folder, 0), sorted(folder.glob("samples.rank-*.jsonl"))
    samples, rows_read, changed = {}, 0, False
    for path in [main, *others]:
        drop_partial_line(path)
        for key, row in read_samples(path, benchmark):
            rows_read += 1
            known = samples.setdefault(key, scored(row, benchmark) if rescore else row)
            changed |= known != row
            if known["response"] != row["response"]:
                raise ValueError(f"{path}: sample {key[1]} of id {key[0]!r} is there twice, with two responses")
    keys = in_order(samples, benchmark)
    if changed or others or keys != list(samples) or rows_read > len(samples):
        with write_atomically(main) as file:
            file.writelines(json_line(samples[key]) for key in keys)
    for path in others:
        path.unlink()
    return samples


def in_order(samples: dict[tuple[str, int], dict], benchmark: Benchmark) -> list[tuple[str, int]]:
    order = {id: i for i, id in enumerate(benchmark.answers)}
    return sorted(samples, key=lambda key: (order[key[0]], key[1]))


def check_settings(folder: Path, settings: dict) -> dict | None:
    """The folder's settings.json (None for a new folder). Raises ValueError where it differs from
    `settings`."""
    path = folder / "settings.json"
    if not path.is_file():
        if any(folder.glob("samples*.jsonl")):
            raise ValueError(f"{folder}: holds samples but no settings.json; choose another --output")
        return None
    found = read_json(path)
    for key, value in settings.items():
        if found.get(key) != value:
            raise ValueError(
                f"{folder}: holds samples made with {key} {found.get(key)!r}, now asked for {value!r}; "
                "choose another --output or remove that folder"
            )
    return found


def start_folder(folder: Path, settings: dict, benchmark: Benchmark) -> None:
    """Make a folder ready to be appended to: settings written, what an interrupted run left tidied up, and
    samples scored anew (milliseconds each, at most): the checker, or the file, may have changed since."""
    found, settings = check_settings(folder, settings), {**settings, "checker": checker_version()}
    for leftover in folder.glob("*.partial-*"):
        leftover.unlink()
    if found is not None:
        merge_samples(folder, benchmark, rescore=True)
    if found != settings:
        with write_atomically(folder / "settings.json") as file:
            json.dump(settings, file, indent=2)


def wait_for_all(group) -> None:
    """A barrier. Raises ValueError where another process has ended, which then has said why."""
    try:
        dist.barrier(group)
    except RuntimeError:  # all that gloo has for a lost connection
        raise ValueError("another process of this evaluation has ended") from None


@contextlib.contextmanager
def locked(folder: Path):
    """Keep other runs out of a folder. Raises ValueError when one is still there after some seconds (the
    processes of a killed torchrun need a moment to notice)."""
    handle, deadline = os.open(folder, os.O_RDONLY), time.monotonic() + 10
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ValueError(f"{folder}: another evaluation is writing here") from None
                time.sleep(0.2)
            except OSError:  # a file system without locks: two runs at a time are up to the user
                break
        yield
    finally:
        os.close(handle)


def score(args: argparse.Namespace, benchmarks: list[Benchmark]) -> list[dict]:
    """Score the responses in --score. A row holds `id` and `response` (a text, or a list of them), or
    `outputs` as vLLM writes them. Raises ValueError where a problem has no response, or fewer than
    another."""
    owners = {}
    for benchmark in benchmarks:
        for id in benchmark.answers:
            if owners.setdefault(id, benchmark) is not benchmark:
                names = f"{owners[id].name} and {benchmark.name}"
                raise ValueError(f"problem id {id!r} stands in both {names}; score them apart")
    samples = {benchmark.name: {} for benchmark in benchmarks}
    for line, row in read_jsonl(args.score):
        where, id = f"{args.score}, line {line}", str(row.get("id"))
        if id not in owners:
            raise ValueError(f"{where}: id {row.get('id')!r} is not among the problems")
        found = samples[owners[id].name]
        for output in outputs_of(row, where):
            sample = output["sample"]
            if sample is None:
                sample = next(i for i in range(len(found) + 1) if (id, i) not in found)
            if (id, sample) in found:
                raise ValueError(f"{where}: sample {sample} of id {id!r} is there twice")
            found[id, sample] = {"id": id, **output, "sample": sample}
    table, name = [], storage_name(str(Path(args.score).with_suffix("")))
    for benchmark in benchmarks:
        found = samples[benchmark.name]
        k = args.samples or max((sample + 1 for _, sample in found), default=1)
        for id in benchmark.problems:
            for sample in range(k):
                if (id, sample) not in found:
                    raise ValueError(
                        f"{args.score}: problem {id!r} of {benchmark.name} lacks sample {sample} of {k}; "
                        "every problem needs the same number (--samples takes fewer of them)"
                    )
        keys = tqdm(in_order(found, benchmark), benchmark.name, unit="sample", disable=None)
        found = {key: scored(found[key], benchmark) for key in keys}
        settings = {"samples_digest": file_digest(Path(args.score)), "data_digest": benchmark.digest}
        if args.output:
            folder = Path(args.output) / name / benchmark.name
            folder.mkdir(parents=True, exist_ok=True)
            start_folder(folder, settings, benchmark)
            with write_atomically(folder / "samples.jsonl") as file:
                file.writelines(map(json_line, found.values()))
        table.append({"model": name, "path": args.score, **summarise(benchmark, found, k, settings)})
    return table


def outputs_of(row: dict, where: str) -> Iterator[dict]:
    """The responses in one row: sample, response, finish_reason, tokens; None where the row does not say."""
    responses = next((row[key] for key in ("response", "responses", "outputs") if key in row), None)
    outputs = responses if isinstance(responses, list) else [row | {"text": responses}]
    for output in outputs:
        fields = output if isinstance(output, dict) else {"text": output}
        sample, text, token_ids = fields.get("sample"), fields.get("text"), fields.get("token_ids")
        if not isinstance(text, str):
            raise ValueError(f"{where}: expected 'response' (a text, or a list of them) or vLLM's 'outputs'")
        if sample is not None and not isinstance(sample, int):
            raise ValueError(f"{where}: 'sample' is {sample!r}; expected a whole number")
        tokens = len(token_ids) if isinstance(token_ids, list) else fields.get("tokens")
        yield {
            "sample": sample,
            "response": text,
            "finish_reason": fields.get("finish_reason"),
            "tokens": tokens if isinstance(tokens, int) else None,
        }


def summarise(benchmark: Benchmark, samples: dict[tuple[str, int], dict], k: int, settings: dict) -> dict:
    """One row of results over samples 0 to k-1 of every problem."""
    rows = [[samples[id, sample] for sample in range(k)] for id in benchmark.problems]
    correct = np.array([[row["correct"] for row in of_problem] for of_problem in rows])
    mean, sem = pass_at_1(correct)
    flat = [row for of_problem in rows for row in of_problem]
    tokens = [row["tokens"] for row in flat]
    reasons = [row["finish_reason"] for row in flat]
    waits = sum(row["response"].count("Wait") for row in flat)  # paper, Figure 8
    total = None if None in tokens else sum(tokens)
    ks = sorted({*(2**j for j in range(k.bit_length())), k})
    return {
        "benchmark": benchmark.name,
        "problems": len(rows),
        "samples": k,
        "pass@1": mean,
        "sem": sem,
        "pass@k": {str(i): pass_at_k(correct, i) for i in ks},
        "truncated": None if None in reasons else reasons.count("length") / len(flat),
        "mean_tokens": None if total is None else total / len(flat),
        "waits_per_response": waits / len(flat),
        "waits_per_token": waits / total if total else None,
        "settings": settings,
        "versions": {
            "checker": checker_version(),
            **{package: version(package) for package in ("torch", "tokenizers", "jinja2")},
        },
    }


def report(table: list[dict], output: str | None) -> None:
    """Print the table, and put its rows into OUTPUT/results.json beside those of other models and
    benchmarks."""
    lines = [("benchmark", "model", "n", "pass@1", "pass@k", "truncated", "tokens")]
    for row in sorted(table, key=lambda row: row["benchmark"]):
        k = str(row["samples"])
        pass_1 = f"{100 * row['pass@1']:.1f}" + ("" if row["sem"] is None else f" ± {100 * row['sem']:.1f}")
        pass_k = f"{100 * row['pass@k'][k]:.1f} (k = {k})"
        truncated = "-" if row["truncated"] is None else f"{100 * row['truncated']:.1f} %"
        tokens = "-" if row["mean_tokens"] is None else f"{row['mean_tokens']:.0f}"
        name, n = (row["benchmark"], row["model"]), str(row["problems"])
        lines.append((*name, n, pass_1, pass_k, truncated, tokens))
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    if not output:
        return
    path = Path(output) / "results.json"
    kept = read_json(path).get("results", []) if path.exists() else []
    fresh = {(row["benchmark"], row["model"]) for row in table}
    rows = table + [row for row in kept if (row["benchmark"], row["model"]) not in fresh]
    for leftover in path.parent.glob(f"{path.name}.partial-*"):  # of a run killed just here
        leftover.unlink()
    with write_atomically(path) as file:
        json.dump({"results": sorted(rows, key=lambda row: (row["benchmark"], row["model"]))}, file, indent=2)


def checker_version() -> str:
    return f"{answer_checker.VERSION} ({file_digest(Path(answer_checker.__file__))[:16]})"


def read_benchmark(path: str, limit: int | None) -> Benchmark:
    """Read problems: `problem` or `question`; `answer` or `final_answer` (a text, a number, or a list of
    acceptable ones), or a `solution` with a box; `id` or `unique_id`, or else NAME-0, NAME-1, ….

    Raises ValueError naming file and line.
    """
    name, problems, answers, lines = Path(path).stem, {}, {}, {}
    for line, row in read_jsonl(path):
        where, id = f"{path}, line {line}", first_of(row, "id", "unique_id")
        id = f"{name}-{len(lines)}" if id is None else str(id)
        problem = first_of(row, "problem", "question")
        if not isinstance(problem, str) or not problem.strip():
            raise ValueError(f"{where}: expected a text under 'problem' or 'question'")
        if id in lines:
            raise ValueError(f"{where}: id {id!r} is already that of line {lines[id]}")
        lines[id], problems[id], answers[id] = line, problem, acceptable_answers(row, where)
    if not problems:
        raise ValueError(f"{path}: holds no problems")
    kept = {id: problems[id] for id in list(problems)[:limit]}
    return Benchmark(name, kept, answers, file_digest(Path(path)))


def acceptable_answers(row: dict, where: str) -> list[str]:
    found = first_of(row, "answer", "final_answer")
    if found is None and isinstance(row.get("solution"), str):
        found = extract_answer(row["solution"])
    answers = []
    for answer in found if isinstance(found, list) else [found]:
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)
        if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
            raise ValueError(
                f"{where}: expected an answer (a text, a number, or a list of them) under 'answer' or "
                f"'final_answer', or a 'solution' with a box; found {answer!r}"
            )
        answers.append(str(answer))
    if not answers:
        raise ValueError(f"{where}: the list of answers is empty")
    return answers


def first_of(row: dict, *keys: str):
    return next((row[key] for key in keys if row.get(key) is not None), None)


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def storage_name(path: str) -> str:
    """The last two parts of a path or hub id, since the last one may be common (final, step-000100)."""
    full = Path(os.path.abspath(path)) if Path(path).exists() else Path(path)
    return "-".join(part for part in full.parts[-2:] if part != full.anchor)


def refuse_equal_names(names: list[str], paths: list[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{paths[names.index(name)]} and {paths[i]} would both be stored as {name!r}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help="model directories or hub ids")
    add("--problems", nargs="+", metavar="FILE", required=True, help="benchmarks, JSONL: id, problem, answer")
    add("--score", metavar="FILE", help="score these samples (JSONL: id, response) instead of drawing any")
    add("--output", metavar="DIR", help="where samples and results.json go")
    add("--samples", type=int, help="samples a problem (default 16; with --score all there are)")
    add("--limit", type=int, help="problems of each file to use, from its start (default all)")
    add("--temperature", type=float, default=0.6, help="0 takes the likeliest token (default %(default)s)")
    add("--top-p", type=float, default=0.95, help="probability mass kept (default %(default)s)")
    add("--max-new-tokens", type=int, default=32768,
        help="tokens of a response at most, the prefill not counted (default %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random numbers (default %(default)s)")
    add("--prefill", default="<think>\n",
        help=r"what each response is made to begin with; \n is a line end (default <think>\n)")  # fmt: skip
    add("--system-prompt", help="in place of the chat template's own")
    add("--prompt-template", choices=sorted(PROMPT_TEMPLATES), default="none",
        help="text around the problem (default %(default)s)")  # fmt: skip
    add("--rows", type=int, help="responses decoded side by side (default 16 on CPU, 64 on CUDA)")
    add("--dtype", choices=list(DTYPES),
        help="of the computation (default: bfloat16 on a GPU, float32 on a CPU)")  # fmt: skip
    add("--threads", type=int, default=1,
        help="CPU threads of each process. Samples of runs with another number can differ: rounding does. For "
        "more cores rather use torchrun (default %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    args.prefill = args.prefill.replace("\\n", "\n")
    if args.score and args.model:
        raise ValueError("--score takes samples as they are: give it without --model")
    if not args.score:
        if not (args.model and args.output):
            raise ValueError("give --model and --output to draw samples, or --score to score a file of them")
        args.samples = 16 if args.samples is None else args.samples
    for flag in ("samples", "limit", "max_new_tokens", "rows", "threads"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}; expected at least 1")
    if not 0 <= args.temperature < math.inf:
        raise ValueError(f"--temperature is {args.temperature}; expected a number from 0 up")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p is {args.top_p}; expected more than 0 and at most 1")
    return args


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues where it stopped")
