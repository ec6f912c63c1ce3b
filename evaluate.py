"""Sample answers to benchmark problems and score them: pass@1 with its standard errors, and pass@k.

    python evaluate.py --model out/redi/final --problems math500.jsonl aime24.jsonl --output out/eval
    torchrun --nproc-per-node 8 evaluate.py …              # the samples are spread over the processes
    python evaluate.py --score samples.jsonl --problems math500.jsonl

Each finished sample is appended to OUTPUT/MODEL/BENCHMARK/samples.jsonl at once; the same command continues
after an interruption, with any number of processes. The table goes to the screen and to OUTPUT/results.json.

pass@1 is the mean over problems and samples. `± runs` (`sem` in results.json) is its standard error over the
samples of these problems, as in the paper; `± problems` (`sem_problems`) that over problems like these.
`boxed` is the share of responses with an answer in a box, `truncated` of those that a limit ended.
"""

import argparse
import contextlib
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

from redi.cli import Parser, not_negative, number, positive_int, run_command
from redi.distributed import hide_bar, init_process_group, local_rank, rank, world_size
from redi.evaluation.generation import Request, generate
from redi.evaluation.sample_store import SampleStore, read_responses, scored
from redi.evaluation.sampling import sample_key
from redi.evaluation.scoring import report, summarise
from redi.files import file_digest, resolve_directory
from redi.hub.config import load_config
from redi.hub.weights import DTYPES, MODEL_FILES, check_weights, load_pretrained, weights_digest
from redi.model import CausalLM
from redi.problems import PROMPT_TEMPLATES, Benchmark, read_benchmark, user_message
from redi.tokenizer import PREFILL, TOKENIZER_FILES, Tokenizer

SECONDS_BETWEEN_LINES = 30  # where there is no terminal


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    benchmarks = [read_benchmark(path, args.limit) for path in args.problems]
    refuse_equal_names([benchmark.name for benchmark in benchmarks], args.problems)
    if args.score:
        return report(score(args, benchmarks), args.output)
    refuse_equal_names([storage_name(path) for path in args.model], args.model)
    joined_here, threads = not dist.is_initialized(), torch.get_num_threads()
    device = init_process_group()
    torch.set_num_threads(args.threads)
    try:
        # Gloo, because ranks wait here for the longest response, and NCCL gives up after ten minutes.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        models = [Model(path, benchmarks, args, device) for path in args.model]  # before hours are spent on the first
        table = [row for model in models for row in evaluate(model, args, device, group)]
        if rank() == 0:
            report(table, args.output)
        wait_for_all(group)
    finally:
        torch.set_num_threads(threads)
        if joined_here:
            dist.destroy_process_group()


class Model:
    """What must be known of a model before its weights are loaded, its prompts, and where its samples go."""

    def __init__(self, path: str, benchmarks: list[Benchmark], args: argparse.Namespace, device: torch.device):
        """Raises ValueError for an unusable model, prompts that do not fit, and samples of other settings there."""
        self.path, self.name = path, storage_name(path)
        self.directory = resolve_directory(path, MODEL_FILES)
        self.tokenizer = Tokenizer.from_pretrained(self.directory)
        self.config = load_config(self.directory, self.tokenizer)
        with torch.device("meta"):
            check_weights(CausalLM(self.config), self.directory)
        self.dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
        settings = {"model_digest": model_digest(self.directory), "dtype": self.dtype}
        settings |= {key: getattr(args, key) for key in (
            "system_prompt", "prompt_template", "prefill", "temperature", "top_p", "max_new_tokens", "seed"
        )}  # fmt: skip
        self.stores, self.prompts = [], []  # by benchmark; prompts: problem id -> token ids
        for benchmark in benchmarks:
            folder = Path(args.output) / self.name / benchmark.name
            self.stores.append(SampleStore(folder, {**settings, "data_digest": benchmark.digest}, benchmark))
            self.prompts.append({})
            for id, problem in benchmark.problems.items():
                message = user_message(problem, args.prompt_template)
                ids = self.tokenizer.encode_prompt([message], args.system_prompt, args.prefill)
                context = self.config.max_position_embeddings
                if not 0 < len(ids) < context:
                    raise ValueError(f"{benchmark.name}, problem {id!r}: the prompt has {len(ids)} tokens; expected "
                                     f"from 1 to {context - 1}, as {path} has a context of {context}")
                self.prompts[-1][id] = ids


def model_digest(directory: Path) -> str:
    """SHA-256 over all files of a model directory that a sample depends on."""
    digest = hashlib.sha256(weights_digest(directory).encode())
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            digest.update(f"{name} {file_digest(directory / name)}".encode())
    return digest.hexdigest()


def evaluate(model: Model, args: argparse.Namespace, device: torch.device, group) -> list[dict]:
    """Draw the samples that are missing. Returns a row of results a benchmark, on rank 0."""
    with contextlib.ExitStack() as open_stores:
        if rank() == 0:
            for store in model.stores:
                open_stores.enter_context(store.opened())
                store.merge(rescore=True)
        wait_for_all(group)
        draw_missing(model, args, device, group)
        wait_for_all(group)
        if rank() > 0:
            return []
        about = {"model": model.name, "path": model.path}
        return [
            {**about, **summarise(store.benchmark, store.merge(), args.samples, store.settings)}
            for store in model.stores
        ]


def draw_missing(model: Model, args: argparse.Namespace, device: torch.device, group) -> None:
    """Find the samples that no run has finished yet, and draw this rank's share of them."""
    missing = []
    for store, prompts in zip(model.stores, model.prompts):
        done = store.done()
        for id, prompt_ids in prompts.items():
            limit = min(args.max_new_tokens, model.config.max_position_embeddings - len(prompt_ids))
            for sample in range(args.samples):
                if (id, sample) not in done:
                    request = Request(prompt_ids, sample_key(args.seed, id, sample), limit)
                    missing.append((store, id, sample, request))
    wait_for_all(group)  # nobody appends before everybody has read
    if rank() == 0 and any(request.max_new_tokens < args.max_new_tokens for *_, request in missing):
        print(f"{model.name}: the context of {model.config.max_position_embeddings} tokens ends some responses before "
              f"--max-new-tokens {args.max_new_tokens}", file=sys.stderr)
    try:
        draw(model, missing[rank() :: world_size()], args, device)  # one by one: as many to each, of every problem
    except (ValueError, OSError) as error:
        if local_rank() > 0:  # run_command lets the first rank speak for all, but this may have met one alone
            print(f"error: {error}", file=sys.stderr)
        raise


def draw(model: Model, missing: list[tuple[SampleStore, str, int, Request]], args: argparse.Namespace, device) -> None:
    """Generate these samples (store, problem id, number, request), and append each with its verdict as it finishes."""
    if not missing:
        return
    weights = load_pretrained(model.directory, device, DTYPES[model.dtype]).eval()
    rows = args.rows or (64 if device.type == "cuda" else 16)
    progress = Progress(model.name, len(missing))
    generated = generate(weights, [request for *_, request in missing], model.tokenizer.stop_ids, args.temperature,
                         args.top_p, rows, progress.count_tokens)
    with progress.bar:
        for index, ids, finish_reason in generated:
            store, id, sample, _ = missing[index]
            row = {
                "id": id,
                "sample": sample,
                "response": args.prefill + model.tokenizer.decode(ids[:-1] if finish_reason == "stop" else ids),
                "finish_reason": finish_reason,
                "tokens": len(ids),
            }
            store.append(scored(row, store.benchmark), rank())
            progress.count_sample()


class Progress:
    """Of rank 0's share of the samples: a bar on a terminal; elsewhere, in the log of a batch job say, now and then
    a line."""

    def __init__(self, name: str, total: int):
        self.bar = tqdm(desc=name, total=total, unit="sample", disable=hide_bar(), smoothing=0)
        self.name, self.total, self.samples, self.tokens = name, total, 0, 0
        self.started = self.last_line = time.monotonic()

    def count_sample(self) -> None:
        self.samples += 1
        self.bar.update()

    def count_tokens(self, count: int) -> None:
        self.tokens += count
        now = time.monotonic()
        if rank() == 0 and self.bar.disable and now - self.last_line >= SECONDS_BETWEEN_LINES:
            self.last_line = now
            whose = f" of the first of {world_size()} processes" if world_size() > 1 else ""
            print(f"{self.name}: {self.samples} of {self.total} samples{whose}, "
                  f"{self.tokens / (now - self.started):.0f} tokens/s", file=sys.stderr, flush=True)


def wait_for_all(group) -> None:
    """A barrier. Raises ValueError where another process has ended, which then has said why."""
    try:
        dist.barrier(group)
    except RuntimeError:  # all that gloo has for a lost connection
        raise ValueError("another process of this evaluation has ended") from None


def score(args: argparse.Namespace, benchmarks: list[Benchmark]) -> list[dict]:
    """Score the responses in --score, made elsewhere. Returns a row of results a benchmark.

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
        settings = {"samples_digest": file_digest(args.score), "data_digest": benchmark.digest}
        store = args.output and SampleStore(Path(args.output) / name / benchmark.name, settings, benchmark)
        bar = tqdm(found.items(), benchmark.name, unit="sample", disable=None)
        samples = {key: scored(row, benchmark) for key, row in bar}
        if store:
            with store.opened():
                store.replace(samples)
        table.append({"model": name, "path": args.score, **summarise(benchmark, samples, k, settings)})
    return table


def storage_name(path: str) -> str:
    """The last two parts of a path or hub id, since the last one may be common (final, step-000100)."""
    full = Path(os.path.abspath(path)) if Path(path).exists() else Path(path)
    return "-".join(part for part in full.parts[-2:] if part != full.anchor)


def refuse_equal_names(names: list[str], paths: list[str]) -> None:
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ValueError(f"{paths[names.index(name)]} and {paths[i]} would both be stored as {name!r}")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help="model directories or hub ids")
    add("--problems", nargs="+", metavar="FILE", required=True, help="benchmarks, JSONL: id, problem, answer")
    add("--score", metavar="FILE", help="score these samples (JSONL: id, response) instead of drawing any")
    add("--output", metavar="DIR", help="where samples and results.json go")
    add("--samples", type=positive_int, help="samples a problem (default: 16; with --score all there are)")
    add("--limit", type=positive_int, help="problems of each file to use, from its start (default: all)")
    add("--temperature", type=not_negative, default=0.6, help="0 takes the likeliest token")
    add("--top-p", type=number(float, "a share above 0 and at most 1", low=math.ulp(0), below=math.nextafter(1, 2)),
        default=0.95, help="probability mass kept")
    add("--max-new-tokens", type=positive_int, default=32768, help="tokens of a response at most, without the prefill")
    add("--seed", type=int, default=0, help="of the random numbers")
    add("--prefill", default=PREFILL.replace("\n", r"\n"), help=r"what each response is made to begin with; \n is a "
        "line end")
    add("--system-prompt", help="in place of the chat template's own")
    add("--prompt-template", choices=sorted(PROMPT_TEMPLATES), default="none", help="text around the problem")
    add("--rows", type=positive_int, help="responses decoded side by side (default: 64 on a GPU, 16 on a CPU)")
    add("--dtype", choices=list(DTYPES), help="of the computation (default: bfloat16 on a GPU, float32 on a CPU)")
    add("--threads", type=positive_int, default=1, help="CPU threads of each process. Samples of runs with another "
        "number can differ: rounding does. For more cores rather use torchrun")
    args = parser.parse_args(argv)
    args.prefill = args.prefill.replace("\\n", "\n")
    if args.score and args.model:
        raise ValueError("--score takes samples as they are: give it without --model")
    if not args.score and not (args.model and args.output):
        raise ValueError("give --model and --output to draw samples, or --score to score a file of them")
    if not args.score:
        args.samples = args.samples or 16
    return args


if __name__ == "__main__":
    run_command(main, "interrupted; the same command continues where it stopped")
