"""The embedded example: a water-tank task, a teacher with a bad habit, and a model that trains on a laptop.

The problem `Tank of 15 litres: 8+3-1+9-7-5+2` starts at 8 litres, adds 3, removes 1, and so on. The level is clamped
between 0 and 15 at each change: 13+9 gives 15, 3-7 gives 0. The answer is the final level. The teacher either applies
one change per line (`13+9 -> 15`, rarely wrong) or hurries and applies up to four at once (`In my head: 11-1+9-7 -> 8`,
wrong about 40 % of the time). Many correct traces contain a hurried move that happened to be right, so a student that
imitates correct traces alone learns the habit. The wrong traces show its cost, which is what stage 2 learns from.
"""

import contextlib
import io
import itertools
import json
import math
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch

from redi import distributed
from redi.analysis import page
from redi.answer_checker import is_correct
from redi.distributed import print_rank0
from redi.evaluation.scoring import read_results
from redi.files import json_line, read_jsonl, write_atomically
from redi.hub.config import parse_config
from redi.hub.weights import save_pretrained
from redi.model import CausalLM
from redi.problems import assistant_message, user_message
from redi.tokenizer import CHATML_TEMPLATE, Tokenizer

CAPACITY = 15  # litres
CHANGES = 6  # changes of the level per problem
TRAIN_PROBLEMS, TEST_PROBLEMS = 3000, 300
SOLUTIONS = 6  # teacher samples per training problem

ALWAYS_CAREFUL = 0.15  # share of solutions without a hurried move
HURRY = 0.85  # in the others: probability that a move applies three or four changes at once (or all that are left)
WRONG = {1: 0.02, 2: 0.35, 3: 0.45, 4: 0.45}  # number of changes in a move -> probability of a wrong result

TASK = f"Tank of {CAPACITY} litres: "
GIVES = " -> "
IN_MY_HEAD = "In my head: "  # starts a hurried move; makes hurried solutions about as long as careful ones
MOVE = re.compile(rf"^(?:{IN_MY_HEAD})?(\d+)((?:[+-]\d)+){GIVES}(\d+)$", re.MULTILINE)

MODEL = {"model_type": "qwen2", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rope_theta": 10000.0,
         "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "initializer_range": 0.05}


def pour(level: int, changes: list[int]) -> int:
    """The level after these changes, clamped to [0, CAPACITY] after each."""
    for change in changes:
        level = min(max(level + change, 0), CAPACITY)
    return level


def changes_text(level: int, changes: list[int]) -> str:
    """8, [3, -1] -> "8+3-1"."""
    return str(level) + "".join(f"{change:+d}" for change in changes)


def teacher_solution(level: int, changes: list[int], rng: random.Random) -> str:
    """A teacher trace: reasoning in <think>…</think>, then the answer, correct or wrong, in \\boxed{…}."""
    always_careful = rng.random() < ALWAYS_CAREFUL
    lines = ["<think>"]
    while changes:
        hurries = len(changes) > 1 and not always_careful and rng.random() < HURRY
        count = min(rng.choice((3, 4)), len(changes)) if hurries else 1
        taken, changes = changes[:count], changes[count:]
        result = _wrong_level(level, taken, rng) if rng.random() < WRONG[count] else pour(level, taken)
        lines.append(f"{IN_MY_HEAD if hurries else ''}{changes_text(level, taken)}{GIVES}{result}")
        level = result
    return "\n".join([*lines, "</think>", f"\\boxed{{{level}}}"])


def _wrong_level(level: int, taken: list[int], rng: random.Random) -> int:
    """A wrong level: off by one or, for several changes, with one sign flipped, one change skipped, or the sum of all
    clamped only at the end."""
    correct = pour(level, taken)
    result = correct
    while result == correct:
        i = rng.randrange(len(taken))
        slips = [pour(correct, [rng.choice((-1, 1))])]
        if len(taken) > 1:
            slips += [pour(level, taken[:i] + [-taken[i]] + taken[i + 1 :]), pour(level, taken[:i] + taken[i + 1 :]),
                      pour(level, [sum(taken)])]
        result = rng.choice(slips)
    return result


def share_of_hurried_moves(responses: list[str]) -> float:
    """Share of moves in these responses (lines such as `8+3 -> 11`) that apply several changes; nan without moves."""
    counts = [len(re.findall("[+-]", taken)) for response in responses for _, taken, _ in MOVE.findall(response)]
    return sum(count > 1 for count in counts) / len(counts) if counts else math.nan


def write_data(output: str | Path, seed: int) -> None:
    """Write the example's data into the directory `output`, deterministic in `seed`:

    teacher.jsonl: {"id", "problem", "answer", "source", "generations"}, the input of `prepare_data.py traces`;
    positives.jsonl, pairs.jsonl: the output of that command: each problem's first correct trace, and in pairs its
        first wrong one, as judged by the answer checker;
    problems.jsonl: {"id", "problem", "answer"}, held out: disjoint from the teacher's problems.
    """
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    answers: dict[str, str] = {}  # by problem; a duplicate could be in both training and test
    teacher, positives, pairs, test = [], [], [], []
    while len(answers) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        level, changes = rng.randint(0, CAPACITY), [rng.choice((-1, 1)) * rng.randint(1, 9) for _ in range(CHANGES)]
        problem, answer = TASK + changes_text(level, changes), str(pour(level, changes))
        if problem in answers:
            continue
        answers[problem] = answer
        if len(test) < TEST_PROBLEMS:
            test.append({"id": f"test-{len(test):04d}", "problem": problem, "answer": answer})
            continue
        named = {"id": f"train-{len(teacher):04d}", "source": "toy"}
        generations = [teacher_solution(level, changes, rng) for _ in range(SOLUTIONS)]
        teacher.append({**named, "problem": problem, "answer": answer, "generations": generations})
        verdicts = [is_correct(solution, answer) for solution in generations]
        correct = next((solution for solution, verdict in zip(generations, verdicts) if verdict), None)
        wrong = next((solution for solution, verdict in zip(generations, verdicts) if not verdict), None)
        prompt = [user_message(problem)]
        if correct:
            positives.append({"prompt": prompt, "completion": [assistant_message(correct)], **named})
        if correct and wrong:
            pairs.append({"prompt": prompt, "chosen": [assistant_message(correct)],
                          "rejected": [assistant_message(wrong)], **named})  # fmt: skip
    for name, rows in (("teacher", teacher), ("positives", positives), ("pairs", pairs), ("problems", test)):
        with write_atomically(output / f"{name}.jsonl") as file:
            file.writelines(map(json_line, rows))


def write_model(directory: str | Path, seed: int) -> None:
    """Write a model directory: the example's tokenizer, and random weights from `seed`. Collective."""
    with tempfile.TemporaryDirectory() as temporary:
        write_tokenizer(temporary)
        tokenizer = Tokenizer.from_pretrained(temporary)
        model = CausalLM(parse_config({**MODEL, "vocab_size": tokenizer.vocab_size}))
        model.init_weights(seed, std=MODEL["initializer_range"])
        save_pretrained(model, directory, tokenizer)


def write_tokenizer(directory: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json: one token per number, sign or word; ChatML turns."""
    special = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|unknown|>"]
    words = ["system", "user", "assistant", "<think>", "</think>", "\\boxed{", "}", "\n", TASK, GIVES, "+", "-"]
    words += re.findall(r" ?\w+|: ", IN_MY_HEAD)
    numbers = [str(number) for number in range(max(CAPACITY, 9) + 1)]
    vocabulary = {token: id for id, token in enumerate([*special, *words, *numbers])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    pattern = "|".join([re.escape(word) for word in words] + ["[1-9][0-9]", "[0-9]"])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()  # concatenates tokens without spaces
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(Path(directory) / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "unk_token": "<|unknown|>", "chat_template": CHATML_TEMPLATE}
    (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


# SFT is trained to its plateau: doubling the steps gains nothing. Stage 2 and its control (more SFT) take the same
# number of updates on the same number of sequences (a pair counts as two).
SFT_STEPS, STAGE_2_STEPS = 2000, 150
STAGES = {
    "sft": ["sft", "--steps", str(SFT_STEPS), "--batch-size", "16", "--lr", "2e-3"],
    "sft-continued": ["sft", "--steps", str(STAGE_2_STEPS), "--batch-size", "32", "--lr", "7e-5"],
    "redi": ["redi", "--steps", str(STAGE_2_STEPS), "--batch-size", "16", "--lr", "7e-5"],
}
TITLES = {
    "sft": "SFT: imitate the correct traces",
    "sft-continued": "SFT continued, the control: further SFT with as many updates and traces as REDI",
    "redi": "REDI: from the SFT model, towards the correct traces and away from the wrong ones",
}
SAMPLING = {"sampled": ["--samples", "4"], "greedy": ["--samples", "1", "--temperature", "0"]}
MAX_NEW_TOKENS = 96  # the longest teacher trace has 42

Command = Callable[[list[str]], None]  # main(argv) of train.py or evaluate.py


def run_example(train: Command, evaluate: Command, output: str | Path = "out/example", seed: int = 0) -> None:
    """`train.py` without arguments: data, SFT, SFT continued (the control), REDI, and an evaluation of all three.

    Resumes an earlier run: finished parts are kept. Collective.
    """
    output = Path(output)
    data = output / "data"
    torch.set_num_threads(1)  # more threads do not speed up products this small, and slow them down on a busy machine
    distributed.init_process_group()
    distributed.lock_output(output)
    prepare(output, seed)
    print_rank0(_introduction(data))
    for number, (name, arguments) in enumerate(STAGES.items(), 1):
        print_rank0(f"\n{number} of 4. {TITLES[name]}")
        start = output / ("start" if name == "sft" else "sft/final")
        rows = data / ("pairs.jsonl" if name == "redi" else "positives.jsonl")
        train_stage(train, arguments, start, rows, output / name, seed)
    print_rank0(f"\n4 of 4. Evaluation on {TEST_PROBLEMS} held-out problems: 4 samples at temperature 0.6, and greedy")
    models = [output / name / "final" for name in STAGES]
    for folder, arguments in SAMPLING.items():
        evaluate_models(evaluate, models, data / "problems.jsonl", output / folder, [*arguments, "--seed", str(seed)])
    if distributed.rank() == 0:
        print(_results(output))
        page.main(["--before", str(output / "sft/final"), "--after", str(output / "redi/final"), "--dtype", "float32",
                   "--data", str(data / "pairs.jsonl"), "--problems", str(data / "teacher.jsonl"),
                   "--output", str(output / "page.html")])


def prepare(output: Path, seed: int) -> None:
    """Write the data and the start model unless they exist. Collective."""
    data, start = output / "data", output / "start"
    missing = distributed.rank() == 0 and not (data / "problems.jsonl").exists()  # written last
    distributed.run_on_ranks(missing, lambda: write_data(data, seed))
    if not distributed.all_gather_object((start / "generation_config.json").exists())[0]:  # as rank 0 sees it
        write_model(start, seed)


def train_stage(train: Command, arguments: list[str], start: Path, rows: Path, output: Path, seed: int) -> None:
    train([*arguments, "--model", str(start), "--data", str(rows), "--output", str(output), "--resume",
           "--seed", str(seed), "--dtype", "float32", "--recompute", "nothing", "--log-every", "100"])


def evaluate_models(evaluate: Command, models: list[Path], problems: Path, output: Path, arguments: list[str]) -> None:
    """Run evaluate.py without printing its table."""
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(["--model", *map(str, models), "--problems", str(problems), "--output", str(output),
                  "--dtype", "float32", "--rows", "400", "--max-new-tokens", str(MAX_NEW_TOKENS), *arguments])


def _introduction(data: Path) -> str:
    positives, pairs = (read_rows(data / f"{name}.jsonl") for name in ("positives", "pairs"))
    correct, wrong = (pairs[0][key][0]["content"] for key in ("chosen", "rejected"))
    return f"""
Water is added to and removed from a tank of {CAPACITY} litres, which can neither overflow nor go below empty.
A teacher that often hurries has written {SOLUTIONS} traces for each of {TRAIN_PROBLEMS} problems. They give
{len(positives)} correct traces for SFT, and {len(pairs)} pairs of a correct and a wrong trace for REDI. The first pair:
    {pairs[0]["prompt"][0]["content"]}
{_side_by_side(correct, wrong, "correct", "wrong")}"""


def _side_by_side(left: str, right: str, left_title: str, right_title: str) -> str:
    columns = [f"{left_title}:", *left.split("\n")], [f"{right_title}:", *right.split("\n")]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"    {a:<40}{b}".rstrip() for a, b in rows)


def _results(output: Path) -> str:
    """The example's results as text."""
    sampled, greedy = (results_by_model(output / folder) for folder in SAMPLING)
    samples = {name: read_samples(output / "sampled" / f"{name}-final") for name in STAGES}
    lines = [f"\n{'':16}{'pass@1':>14}{'pass@4':>9}{'greedy':>9}{'hurried moves':>16}{'tokens':>9}"]
    for name in STAGES:
        row = sampled[f"{name}-final"]
        hurried = share_of_hurried_moves([sample["response"] for sample in samples[name]])
        title = re.match("[^:,]+", TITLES[name])[0]
        lines.append(
            f"{title:16}{100 * row['pass@1']:>7.1f} ± {100 * row['sem']:.1f} %{100 * row['pass@k']['4']:>7.1f} %"
            f"{100 * greedy[f'{name}-final']['pass@1']:>7.1f} %{100 * hurried:>14.1f} %{row['mean_tokens']:>9.1f}"
        )
    before = next((sample for sample in samples["sft"] if not sample["correct"]), samples["sft"][0])
    after = next(s for s in samples["redi"] if (s["id"], s["sample"]) == (before["id"], before["sample"]))
    problem = next(row for row in read_rows(output / "data" / "problems.jsonl") if row["id"] == before["id"])
    lines += [
        "\nThe first wrong sample of the SFT model, and REDI's sample of the same index:",
        f"    {problem['problem']} (the answer is {problem['answer']})",
        _side_by_side(before["response"], after["response"], "SFT", "REDI"),
        "\nLogPS (log-prob per token) while REDI trains, mean over the pairs of a step:",
    ]
    metrics = read_rows(output / "redi" / "metrics.jsonl")
    shown = [metrics[round(i * (len(metrics) - 1) / 6)] for i in range(7)]
    for title, key, form in (("step", "step", "d"), ("correct traces", "chosen_logp", ".2f"),
                             ("wrong traces", "rejected_logp", ".2f")):
        lines.append(f"    {title:16}" + "".join(f"{row[key]:>8{form}}" for row in shown))
    lines += [
        f"\nIn {output}:",
        "    data/                        teacher traces, positives.jsonl, pairs.jsonl, held-out problems.jsonl",
        "    */final                      the models, which transformers and vLLM load",
        "    */metrics.jsonl              one line per training step",
        "    sampled/, greedy/            all responses, and results.json",
        "    page.html                    what REDI changed, token by token: open it in a browser",
        "\nThis used one thread per process. On a busy machine set OMP_NUM_THREADS=1 for your own runs as well.",
    ]
    return "\n".join(lines)


def results_by_model(folder: Path) -> dict[str, dict]:
    return {row["model"]: row for row in read_results(folder / "results.json")}


def read_rows(path: Path) -> list[dict]:
    return [row for _, row in read_jsonl(path)]


def read_samples(folder: Path) -> list[dict]:
    return read_rows(folder / "problems" / "samples.jsonl")
