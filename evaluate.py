"""Sample answers to benchmark problems and score them: pass@1 with its standard errors, and pass@k.

    python evaluate.py --model out/redi/final --problems math500.jsonl aime24.jsonl --output out/eval
    torchrun --nproc-per-node 8 evaluate.py …              # the samples are distributed over the processes
    python evaluate.py --score samples.jsonl --problems math500.jsonl

Each finished sample is appended to OUTPUT/MODEL/BENCHMARK/samples.jsonl at once; the same command resumes after an
interruption, with any number of processes. The table is printed and written to OUTPUT/results.json.

pass@1 is the mean over problems and samples. `± runs` (`sem` in results.json) is its standard error over the samples
of these problems, as in the paper; `± problems` (`sem_problems`) that over problems like these. `boxed` is the share
of responses with an answer in a box, `truncated` of those that reached a limit.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

from redi import cli

cli.prepare_process()

import torch
import torch.distributed as dist
from tqdm import tqdm

from redi.cli import Parser, handle_signals, not_negative, number, positive_int, run_command
from redi.distributed import (
    agree, agree_on_flags, init_process_group, leave_process_group, local_rank, lock_output, print_rank0, rank,
    run_on_ranks, world_size,
)  # fmt: skip
from redi.evaluation.generation import DECODE_TILE, Request, generate
from redi.evaluation.sample_store import SampleStore, read_responses, scored
from redi.evaluation.sampling import sample_key
from redi.evaluation.scoring import report, summarise
from redi.files import code_digest, file_digest, resolve_directory
from redi.hub.config import load_config
from redi.hub.weights import DTYPES, MODEL_FILES, check_weights, load_pretrained, weights_digest
from redi.problems import PROMPT_TEMPLATES, Benchmark, opens_thought, read_benchmark, user_message
from redi.tokenizer import PREFILL, TOKENIZER_FILES, Tokenizer

SECONDS_BETWEEN_LINES = 30  # of progress in the log of a batch job
# The code that makes a sample. Its verdict is computed again at each run.
SAMPLING_CODE = (
    "evaluate.py", "redi/attention.py", "redi/evaluation/generation.py", "redi/evaluation/sampling.py",
    "redi/hub/config.py", "redi/hub/weights.py", "redi/kernels.py", "redi/model.py", "redi/problems.py",
    "redi/tokenizer.py",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    if args.score:
        return report(score(args, read_benchmarks(args)), args.output)
    refuse_equal_names([storage_name(path) for path in args.model], args.model)
    device, threads = init_process_group(), torch.get_num_threads()
    agree_on_flags(args, ("model", "problems", "output"))
    benchmarks = run_on_ranks(True, lambda: read_benchmarks(args))
    agree({f"--problems {Path(path).name} (SHA-256)": file_digest(path) for path in args.problems})
    torch.set_num_threads(args.threads)
    try:
        # Gloo, because ranks wait here for the longest response, and NCCL times out after ten minutes.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        models = run_on_ranks(True, lambda: [Model(path, benchmarks, args, device) for path in args.model])
        agree({f"--model {model.name} (SHA-256)": model.digest for model in models})
        table = [row for model in models for row in evaluate(model, args, device, group)]
        if rank() == 0:
            report(table, args.output)
        wait_for_all(group)
    finally:
        torch.set_num_threads(threads)


def read_benchmarks(args: argparse.Namespace) -> list[Benchmark]:
    benchmarks = [read_benchmark(path, args.limit) for path in args.problems]
    refuse_equal_names([benchmark.name for benchmark in benchmarks], args.problems)
    return benchmarks


class Model:
    """A model before its weights are loaded: its tokenizer, prompts, and sample stores."""

    def __init__(self, path: str, benchmarks: list[Benchmark], args: argparse.Namespace, device: torch.device):
        """Raises ValueError for an invalid model, prompts that do not fit, and samples of other settings or code."""
        self.path, self.name = path, storage_name(path)
        self.directory = resolve_directory(path, MODEL_FILES)
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        for notice in self.tokenizer.notices:
            print_rank0(notice)
        self.config = load_config(self.directory, self.tokenizer)
        check_weights(self.config, self.directory)
        self.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.digest = model_digest(self.directory)
        settings = {"model_digest": self.digest, "dtype": self.dtype}
        settings |= {key: getattr(args, key) for key in (
            "system_prompt", "prompt_template", "prefill", "temperature", "top_p", "max_new_tokens", "seed"
        )}  # fmt: skip
        code = {name: code_digest(Path(__file__).parent / name) for name in SAMPLING_CODE}
        self.stores, self.prompts = [], []  # by benchmark; prompts: problem id -> token ids
        for benchmark in benchmarks:
            self.prompts.append({})
            for id, problem in benchmark.problems.items():
                message = user_message(problem, args.prompt_template)
                ids = self.tokenizer.encode_prompt([message], args.system_prompt, args.prefill)
                context = self.config.max_position_embeddings
                if not 0 < len(ids) < context:
                    raise ValueError(f"{benchmark.name}, problem {id!r}: the prompt has {len(ids)} tokens; expected "
                                     f"from 1 to {context - 1}, as {path} has a context of {context}")
                self.prompts[-1][id] = ids
            opened = not args.prefill and opens_thought(self.tokenizer.render_prompt([message], args.system_prompt))
            self.stores.append(SampleStore(
                Path(args.output) / self.name / benchmark.name, {**settings, "problems_digest": benchmark.digest},
                benchmark, code, args.keep_samples, open_thought_counts=args.open_thought_counts, opened=opened,
            ))  # fmt: skip


def model_digest(directory: Path) -> str:
    """SHA-256 of all files of a model directory that a sample depends on."""
    digest = hashlib.sha256(weights_digest(directory).encode())
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(f"{name} {file_digest(directory / name)}".encode())
    return digest.hexdigest()


def evaluate(model: Model, args: argparse.Namespace, device: torch.device, group) -> list[dict]:
    """Draw the missing samples. Returns one row of results for each benchmark, on rank 0."""
    for store in model.stores:
        lock_output(store.folder)
        if rank() == 0:
            store.open()
            store.merge(rescore=True)
    wait_for_all(group)
    draw_missing(model, args, device, group)
    wait_for_all(group)
    if rank() > 0:
        return []
    about = {"model": model.name, "path": model.path, "open_thought_counts": args.open_thought_counts}
    return [about | summarise(store.benchmark, store.merge(), args.samples, store.settings) for store in model.stores]


def draw_missing(model: Model, args: argparse.Namespace, device: torch.device, group) -> None:
    """Draw this rank's share of the samples that do not exist yet."""
    missing = []
    for store, prompts in zip(model.stores, model.prompts):
        done = store.done()
        for id, prompt_ids in prompts.items():
            limit = min(args.max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))
            for sample in range(args.samples):
                if (id, sample) not in done:
                    request = Request(prompt_ids, sample_key(args.seed, id, sample), limit)
                    missing.append((store, id, sample, request))
    wait_for_all(group)  # all ranks read before any rank appends
    if rank() == 0 and any(request.max_new_tokens < args.max_new_tokens for *_, request in missing):
        print(f"{model.name}: the context of {model.config.max_position_embeddings} tokens ends some responses before "
              f"--max-new-tokens {args.max_new_tokens}", file=sys.stderr)
    try:
        draw(model, missing[rank() :: world_size()], args, device)  # round-robin over the samples of every problem
    except (ValueError, OSError) as error:
        if local_rank() > 0:  # only rank 0 reports its error in run_command
            print(f"error: {error}", file=sys.stderr)
        raise


def draw(model: Model, missing: list[tuple[SampleStore, str, int, Request]], args: argparse.Namespace, device) -> None:
    """Generate samples (store, problem id, number, request), and append each with its verdict as it finishes."""
    if not missing:
        return
    weights = load_pretrained(model.directory, device, DTYPES[model.dtype]).eval()
    if model_digest(model.directory) != model.digest:
        raise ValueError(f"{model.path} has changed since this evaluation began: run it again")
    max_batch_size = args.rows or (64 if device.type == "cuda" else max(16, args.tile))
    requests = [request for *_, request in missing]
    share = f" (rank 0 of {world_size()})" if world_size() > 1 else ""
    seconds = 0.1 if sys.stderr.isatty() else SECONDS_BETWEEN_LINES
    bar = tqdm(desc=model.name + share, total=len(missing), unit="sample", disable=rank() > 0, smoothing=0,
               mininterval=seconds, miniters=0, delay=seconds)  # fmt: skip
    started, tokens = time.monotonic(), 0

    def count_tokens(count: int) -> None:
        nonlocal tokens
        tokens += count
        bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s", refresh=False)
        bar.update(0)

    generated = generate(weights, requests, model.tokenizer.stop_ids, args.temperature, args.top_p, max_batch_size,
                         count_tokens, args.tile)  # fmt: skip
    with bar:
        for index, ids, finish_reason in generated:
            store, id, sample, _ = missing[index]
            text_ids = ids[:-1] if finish_reason == "stop" else ids
            response = args.prefill + model.tokenizer.decode(text_ids, skip_special_tokens=False)
            row = {"id": id, "sample": sample, "response": response, "finish_reason": finish_reason, "tokens": len(ids)}
            store.append(store.scored(row), rank())
            bar.update()


def wait_for_all(group) -> None:
    """A barrier. Raises ValueError where another process has ended; its own error says why."""
    try:
        with handle_signals(None):  # the others are awaited in C++
            dist.barrier(group)
    except RuntimeError:  # all that gloo has for a lost connection
        raise ValueError("another process of this evaluation has ended") from None


def score(args: argparse.Namespace, benchmarks: list[Benchmark]) -> list[dict]:
    """Score the responses in --score, of another engine. Returns one row of results for each benchmark.

    Raises ValueError where a problem has no response, or fewer than another.
    """
    responses = read_responses(args.score, benchmarks)
    counts = [args.samples or max((sample + 1 for _, sample in found), default=1) for found in responses]
    for benchmark, found, k in zip(benchmarks, responses, counts):
        for id in benchmark.problems:
            for sample in range(k):
                if (id, sample) not in found:
                    raise ValueError(f"{args.score}: problem {id!r} of {benchmark.name} lacks sample {sample} of {k}; "
                                     "every problem needs the same number (--samples takes fewer of them)")
    table, name = [], storage_name(str(Path(args.score).with_suffix("")))
    for benchmark, found, k in zip(benchmarks, responses, counts):
        settings = {"samples_digest": file_digest(args.score), "problems_digest": benchmark.digest}
        store = args.output and SampleStore(Path(args.output) / name / benchmark.name, settings, benchmark)
        bar = tqdm(found.items(), benchmark.name, unit="sample", disable=None)
        samples = {key: scored(row, benchmark, args.open_thought_counts) for key, row in bar}
        if store:
            store.open()
            store.replace(samples)
        about = {"model": name, "path": args.score, "open_thought_counts": args.open_thought_counts}
        table.append(about | summarise(benchmark, samples, k, settings))
    return table


def storage_name(path: str) -> str:
    """The last two parts of a path or hub id, since many models have the same last one (final, step-000100)."""
    full = Path(os.path.abspath(path)) if Path(path).exists() else Path(path)
    return "-".join(part for part in full.parts[-2:] if part != full.anchor)


def refuse_equal_names(names: list[str], paths: list[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{paths[names.index(name)]} and {paths[i]} would both be stored as {name!r}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("model").add_argument
    add("--model", nargs="+", metavar="DIR", help="model directories or hub ids")
    add("--dtype", choices=list(DTYPES), help="of the computation (default: bfloat16 on a GPU, float32 on a CPU)")
    add = parser.add_argument_group("data").add_argument
    add("--problems", nargs="+", metavar="FILE", required=True, help="benchmarks, JSONL: id, problem, answer")
    add("--limit", type=positive_int, help="number of problems of each file, from its start (default: all)")
    add("--system-prompt", help="replaces the chat template's own")
    add("--prompt-template", choices=sorted(PROMPT_TEMPLATES), default="none", help="text around the problem")
    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=positive_int, help="samples for each problem (default: 16; with --score all there are)")
    add("--temperature", type=not_negative, default=0.6, help="0 is greedy")
    add("--top-p", type=number(float, "a share above 0 and at most 1", low=math.ulp(0), below=math.nextafter(1, 2)),
        default=0.95, help="probability mass kept")
    add("--max-new-tokens", type=positive_int, default=32768, help="maximum length of a response without the prefill")
    add("--prefill", default=PREFILL.replace("\n", r"\n"), help=r"forced start of each response; \n is a newline")
    add("--seed", type=int, default=0, help="of the random numbers")
    add = parser.add_argument_group("scoring").add_argument
    add("--score", metavar="FILE", help="score these samples (JSONL: id, response) instead of drawing any")
    add("--open-thought-counts", action="store_true", help="read a box in a thought that never ends (<think> without "
        "</think>) as the answer")
    add = parser.add_argument_group("memory and speed").add_argument
    add("--rows", type=positive_int, help="responses in a batch (default: 64 on a GPU; 16 or --tile on a CPU)")
    add("--tile", type=positive_int, default=DECODE_TILE, help="CPU: responses in one call of the model; 64 is faster "
        "with large models and many problems, and rounds differently")
    add("--threads", type=positive_int, default=1, help="CPU threads of each process. Samples of another number can "
        "differ by rounding; for more cores prefer torchrun")
    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="directory for samples and results.json")
    add("--keep-samples", action="store_true", help="continue with samples made by another version of the code")
    args = parser.parse_args(argv)
    args.prefill = args.prefill.replace("\\n", "\n")
    if args.score and args.model:
        raise ValueError("--score scores existing samples: give it without --model")
    if not args.score and not (args.model and args.output):
        raise ValueError("give --model and --output to draw samples, or --score to score a file of them")
    if not args.score:
        args.samples = args.samples or 16
    return args


if __name__ == "__main__":
    run_command(main, "interrupted; the same command resumes", leave_process_group)
