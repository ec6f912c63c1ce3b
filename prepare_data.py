r"""Make training data from teacher traces; download benchmarks, and decontaminate the one against the other.

    python prepare_data.py openr1 --input open-r1/OpenR1-Math-Raw --output data/openr1 --tokenizer MODEL
    python prepare_data.py traces --input rows.jsonl --output data/own     # verdicts of our checker
    python prepare_data.py traces --input samples.jsonl --problems train.jsonl --output data/own   # own samples
    python prepare_data.py benchmarks --output data/benchmarks
    python prepare_data.py decontaminate --input data/openr1/p*.jsonl --against data/benchmarks/*.jsonl \
        --output data/clean
    python prepare_data.py toy --output data/toy

rows (parquet or JSONL) -> judge -> select -> positives.jsonl, pairs.jsonl, report.json. Rows stream through
worker processes in order. An output directory is written under a temporary name and renamed when complete.
Every report.json has the settings and the SHA-256 of each input.
"""

import argparse
import collections
import contextlib
import functools
import os
from pathlib import Path

from tqdm import tqdm

from redi import problems
from redi.cli import Parser, count, positive_int, run_command
from redi.files import error_context, json_line, new_directory, write_json
from redi.preparation import corpus, decontamination
from redi.preparation.traces import GENERATIONS, OUTCOMES, SkipRow, final_answers, openr1_verdicts, own_verdicts, select
from redi.rows import Example, TokenSettings, encode
from redi.tokenizer import PREFILL, TOKENIZER_FILES, Tokenizer

load_tokenizer = functools.cache(Tokenizer.from_pretrained)

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
    args.function(args)
    print(f"wrote {args.output}")


def prepare(args: argparse.Namespace) -> None:
    """openr1 and traces: positives.jsonl, pairs.jsonl and report.json from rows of generations."""
    files = corpus.input_files(args.input)
    total = corpus.count_rows(files.values())
    inputs, tokenizer_directory, benchmark = corpus.digests(files), None, None
    if args.command == "traces" and args.problems:
        benchmark = problems.read_benchmark(args.problems)
        inputs |= corpus.digests({args.problems: Path(args.problems)})
    if args.tokenizer is not None:  # here for the download and a clear error; the workers load it again
        tokenizer_directory = Tokenizer.from_pretrained(args.tokenizer).directory
        paths = {f"{args.tokenizer}/{name}": tokenizer_directory / name for name in (*TOKENIZER_FILES, "config.json")}
        inputs |= corpus.digests({name: path for name, path in paths.items() if path.is_file()})
    outputs = ["positives.jsonl", "pairs.jsonl"]
    reported = [name for name in OUTCOMES if name != "no_answer"]
    if args.command == "traces":
        outputs, reported = [*outputs, "verdicts.jsonl"], [*OUTCOMES, *GENERATIONS]
    counts = collections.Counter()
    with new_directory(args.output, args.overwrite, [*outputs, "report.json"]) as directory:
        rows = tqdm(corpus.read_rows(files.values()), total=total, unit=" rows", disable=None)
        if benchmark:
            rows = corpus.with_problems(rows, benchmark)
        if args.command == "traces":
            rows = corpus.one_row_per_problem(rows, directory / "rows.sqlite")
        function = functools.partial(prepare_chunk, args, tokenizer_directory)
        with contextlib.ExitStack() as stack:
            written = {name: stack.enter_context(open(directory / name, "wb")) for name in outputs}
            prepared = corpus.in_parallel(function, corpus.in_chunks(rows), args.processes)
            for chunk_counts, lines in stack.enter_context(contextlib.closing(prepared)):
                counts.update(chunk_counts)
                for name, file in written.items():
                    file.writelines(lines[name])
        report = {name: counts[name] for name in reported}
        for file in files.values():
            problems.warn_if_none_correct(str(file), counts["correct", str(file)], counts["judged", str(file)])
        if not counts["positives"]:
            found = ", ".join(f"{name} {number}" for name, number in report.items() if number)
            raise ValueError(f"{args.input}: no positive in {counts['read']} rows ({found})")
        write_report(directory, report, args, inputs)
    print("\n".join(f"{name:>22} {number:>9,}" for name, number in report.items()))


def prepare_chunk(
    args: argparse.Namespace, tokenizer_directory: Path | None, chunk: list[tuple[str, dict]]
) -> tuple[collections.Counter, dict[str, list[bytes]]]:
    """Counts, and the lines of each JSONL file by its name, from some rows, each with its place ("FILE, line N"). Runs
    in a worker process. Raises ValueError naming the place."""
    counts, lines = collections.Counter(), {"positives.jsonl": [], "pairs.jsonl": [], "verdicts.jsonl": []}
    for place, row in chunk:
        counts["read"] += 1
        file = place.rpartition(",")[0]
        with error_context(place):
            try:
                if args.command == "openr1":
                    correct = openr1_verdicts(row, args.verdict, args.exclude_sources)
                    answers = row["generations"]
                    if args.truncated == "drop":
                        answers, _ = final_answers(row, args.open_thought_counts, read_unboxed=False)
                else:
                    answers, correct, forms = own_verdicts(
                        row, args.exclude_sources, args.open_thought_counts, args.read_unboxed)  # fmt: skip
                    counts.update(forms)
                    for number, (answer, verdict) in enumerate(zip(answers, correct)):
                        kind = "unboxed" if answer is None else "correct" if verdict else "incorrect"
                        counts.update([f"{kind}_generations", (kind, file), ("judged", file)])
                        named = {"id": corpus.row_id(row), "generation": number}
                        judged = {"answer": answer, "correct": verdict, "unboxed": answer is None}
                        lines["verdicts.jsonl"].append(json_line({**named, **judged}))
                usable = [args.truncated == "incorrect" or answer is not None for answer in answers]
                seed = f"{args.seed} {row['problem']}"  # the problem's own: the draw depends on no other row
                chosen, negatives = select(
                    row["generations"], correct, usable, args.negatives, args.pairs_per_problem, seed)  # fmt: skip
            except SkipRow as outcome:
                counts[str(outcome)] += 1
                continue
            prompt = [problems.user_message(row["problem"], args.prompt_template)]
            if args.system_prompt is not None:
                prompt.insert(0, {"role": "system", "content": args.system_prompt})
            named = {"id": corpus.row_id(row), "source": row.get("source") or Path(file).name}
            positive = {"prompt": prompt, "completion": [problems.assistant_message(chosen)], **named}
            lines["positives.jsonl"].append(json_line(positive, errors="strict"))
            counts["positives"] += 1
            counts["pairs"] += len(negatives)
            outcomes = ["pairs_written"] * len(negatives)
            if tokenizer_directory is not None and negatives:
                outcomes = pair_outcomes(load_tokenizer(tokenizer_directory), prompt, chosen, negatives, args)
            counts.update(outcomes)
            for number, (rejected, outcome) in enumerate(zip(negatives, outcomes)):
                if outcome == "pairs_written":
                    pair = {"prompt": prompt, "chosen": [problems.assistant_message(chosen)],
                            "rejected": [problems.assistant_message(rejected)], **named}  # fmt: skip
                    if number:
                        pair["id"] = f"{named['id']}-{number}"
                    lines["pairs.jsonl"].append(json_line(pair, errors="strict"))
    return counts, lines


def pair_outcomes(tokenizer: Tokenizer, prompt: list[dict], chosen: str, negatives: list[str], args) -> list[str]:
    """The outcome of each negative's pair, with its texts encoded as in training: "pairs_written", "too_long", or
    "same_ids", which train.py would refuse."""
    limits = TokenSettings(
        pairs=False,  # one prompt and any number of responses
        max_prompt=args.max_prompt_tokens,
        max_response=args.max_response_tokens,
        max_total=args.max_prompt_tokens + args.max_response_tokens,
        prefill=args.prefill,
    )
    [[prompt_ids, chosen_ids, *negatives_ids]] = encode([Example(0, prompt, (chosen, *negatives))], tokenizer, limits)
    outcomes = [("too_long", "pairs_written")[limits.fit(prompt_ids, chosen_ids, ids)] for ids in negatives_ids]
    return ["same_ids" if ids == chosen_ids else outcome for ids, outcome in zip(negatives_ids, outcomes)]


def decontaminate_files(args: argparse.Namespace) -> None:
    """Copy JSONL files without the rows whose problem shares an n-gram of words with an evaluation problem."""
    paths, against = [Path(path) for path in args.input], [Path(path) for path in args.against]
    names = [path.name for path in paths]
    if len({*names, "report.json"}) <= len(names):
        raise ValueError(f"--input: two files have the same name, or one is named report.json ({', '.join(names)})")
    with new_directory(args.output, args.overwrite, [*names, "report.json"]) as directory:
        report = decontamination.decontaminate(paths, against, args.ngram, args.examples, directory)
        write_report(directory, report, args, corpus.digests({str(path): path for path in (*paths, *against)}))
    for name, counts in report["files"].items():
        dropped = ", ".join(f"{benchmark} {number}" for benchmark, number in counts["dropped_by_benchmark"].items())
        print(f"{name}: {counts['kept']:,} of {counts['read']:,} rows kept, {counts['dropped']:,} dropped ({dropped})")
    for one in report["examples"]:
        print(f"  {one['file']}, line {one['line']} = {one['benchmark']} {one['id']}: \"{one['ngram']}\"")


def benchmarks(args: argparse.Namespace) -> None:
    """The paper's benchmarks as problems JSONL, from the hub or from a directory with the hub's layout."""
    chosen = [benchmark for benchmark in BENCHMARKS if args.only is None or benchmark[0] in args.only]
    names = [f"{name}.jsonl" for name, *_ in chosen]
    inputs = {}
    with new_directory(args.output, args.overwrite, [*names, "report.json"]) as directory:
        for name, hub_id, split, size, problem_column, answer_column in chosen:
            source = hub_id if args.mirror is None else Path(args.mirror) / hub_id
            files, _ = corpus.find_files(source, lambda names: [
                one for one in names if split in one and one.endswith((".parquet", ".jsonl"))])  # fmt: skip
            if not files:
                raise ValueError(f"{source}: no parquet or JSONL file of the split '{split}'")
            inputs |= corpus.digests(files)
            lines = []
            for place, row in corpus.read_rows(files.values()):
                with error_context(place):
                    corpus.require(row, problem_column, answer_column)
                    problem, answers = row[problem_column], problems.gold_texts(row[answer_column])
                    problems.gold_answers(answers)  # readable
                    if not (isinstance(problem, str) and problem.strip() and answers):
                        raise ValueError("the problem or the answer is empty")
                    answer = answers[0] if len(answers) == 1 else answers
                    if name == "olympiad_bench":
                        answer = ", ".join(answers)  # not alternatives: the problem asks for all of them
                    benchmark_row = {"id": f"{name}-{len(lines)}", "problem": problem, "answer": answer}
                    lines.append(json_line(benchmark_row, errors="strict"))
            if len(lines) != size:
                raise ValueError(f"{source}: {len(lines)} problems where {name} has {size}")
            (directory / f"{name}.jsonl").write_bytes(b"".join(lines))
            print(f"{name:>15} {size:>4} problems from {hub_id}")
        write_report(directory, {"problems": {name: size for name, _, _, size, *_ in chosen}}, args, inputs)


def toy(args: argparse.Namespace) -> None:
    """The data of the embedded example: what `train.py` makes for itself when it is run without arguments."""
    from redi.example import water_tank  # here, because it imports torch, which every worker process would load

    names = ("teacher.jsonl", "positives.jsonl", "pairs.jsonl", "problems.jsonl", "report.json")
    with new_directory(args.output, args.overwrite, names) as directory:
        water_tank.write_data(directory, args.seed)
        write_report(directory, {}, args, inputs={})


def write_report(directory: Path, report: dict, args: argparse.Namespace, inputs: dict[str, str | None]) -> None:
    """report.json: the counts, every setting that decides the output, and the SHA-256 of every input file."""
    others = ("function", "output", "overwrite", "processes")
    settings = {name: value for name, value in vars(args).items() if name not in others}
    write_json(directory / "report.json", {**report, "settings": settings, "inputs": inputs})


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest="command", metavar="command")

    def add(name, function):
        summary = function.__doc__.splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(function=function)
        output = command.add_argument_group("output")
        output.add_argument("--output", required=True, metavar="DIR", help="a new or empty directory")
        output.add_argument("--overwrite", action="store_true", help="replace what this command wrote there")
        return command

    for name, excluded, truncated in (("openr1", ["cn_k12"], "incorrect"), ("traces", [], "drop")):
        command = add(name, prepare)
        flag = command.add_argument_group("input").add_argument
        flag("--input", required=True, metavar="PATH",
             help="rows: a .parquet (needs pyarrow) or .jsonl file, a directory of them, or a hub id; the train split, "
             "where file names have it")
        if name == "traces":
            flag("--problems", metavar="FILE", help="JSONL: id, problem, answer. The input then has samples of these "
                 "problems, as evaluate.py's samples.jsonl")
        flag("--exclude-sources", nargs="*", default=excluded, metavar="SOURCE", help="skip rows of these sources")
        flag("--processes", type=positive_int, default=os.cpu_count(), metavar="N", help="worker processes")
        flag = command.add_argument_group("verdicts").add_argument
        if name == "openr1":
            flag("--verdict", choices=("both", "math_verify", "llama", "either"), default="both",
                 help="whose verdicts make a generation correct (the paper: both)")
        else:
            flag("--read-unboxed", action="store_true", help="where there is no box, also read the answer after '####',"
                 " in 'The answer is ...' at the end, or in the last $...$")
        flag("--open-thought-counts", action="store_true",
             help="read a box in a thought that never ends (<think> without </think>) as the answer")
        flag("--truncated", choices=("incorrect", "drop"), default=truncated,
             help="a generation without a readable answer is incorrect, or neither correct nor incorrect")
        flag = command.add_argument_group("pairs").add_argument
        flag("--pairs-per-problem", type=positive_int, default=1, metavar="N",
             help="maximum; all have the same chosen response")
        flag("--negatives", choices=("first", "shortest", "longest", "random"), default="first",
             help="which incorrect generations (lengths in characters)")
        flag("--seed", type=int, default=0, help="of --negatives random")
        flag = command.add_argument_group("prompt").add_argument
        flag("--prompt-template", choices=tuple(problems.PROMPT_TEMPLATES), default="none",
             help="text around the problem")
        flag("--system-prompt", metavar="TEXT", help="a system message before every problem")
        flag = command.add_argument_group("length limits").add_argument
        flag("--tokenizer", metavar="PATH", help="model directory or hub id: drop pairs over the limits below")
        flag("--max-prompt-tokens", type=positive_int, default=800, metavar="TOKENS",
             help="of a pair's prompt, rendered by the chat template")
        flag("--max-response-tokens", type=positive_int, default=19000, metavar="TOKENS",
             help="of each response, including its end of turn")
        flag("--prefill", default=PREFILL.replace("\n", r"\n"), metavar="TEXT",
             help=r"start of a response that evaluation forces, encoded separately as in training; \n is a newline")

    flag = add("decontaminate", decontaminate_files).add_argument
    flag("--input", required=True, nargs="+", metavar="FILE", help="training JSONL files")
    flag("--against", required=True, nargs="+", metavar="FILE", help="problems JSONL files")
    flag("--ngram", type=positive_int, default=8, metavar="WORDS",
         help="shared consecutive words; a Chinese or Japanese character is a word")
    flag("--examples", type=count, default=3, metavar="N", help="printed for each file and benchmark")

    flag = add("benchmarks", benchmarks).add_argument
    flag("--only", nargs="+", choices=[name for name, *_ in BENCHMARKS], help="only these")
    flag("--mirror", metavar="DIR", help="read DIR/HuggingFaceH4/MATH-500/… instead of the hub")

    flag = add("toy", toy).add_argument
    flag("--seed", type=int, default=0, help="of the problems and the teacher's traces")

    args = parser.parse_args(argv)
    if "prefill" in args:
        args.prefill = args.prefill.replace("\\n", "\n")
    return args


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the cores belong to the worker processes
    run_command(main)
