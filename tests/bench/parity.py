"""Parity with transformers of a model directory: rendered template, token ids, logits, greedy tokens; in fp32.

    pip install -r tests/requirements.txt
    python tests/bench/parity.py --model HuggingFaceTB/SmolLM2-135M-Instruct --problems problems.jsonl

Prints a JSON object, and writes it to --output if given.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.cli import Parser, positive_int, run_command
from redi.evaluation import generation
from redi.files import resolve_directory, write_json
from redi.hub.weights import MODEL_FILES, load_pretrained
from redi.problems import read_benchmark, user_message
from redi.tokenizer import Tokenizer
from tests.tiny import all_logits


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory or hub id")
    add("--problems", required=True, type=Path, help="JSONL: id, problem, answer")
    add("--limit", type=positive_int, default=4, help="number of problems")
    add("--tokens", type=positive_int, default=64, help="greedy tokens per problem")
    add("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    problems = read_benchmark(args.problems, args.limit).problems.values()
    result = compare(args.model, [user_message(problem) for problem in problems], args.tokens)
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


@torch.no_grad()
def compare(model: str, messages: list[dict], new_tokens: int) -> dict:
    """Count the messages whose text, ids and greedy tokens are equal; report the largest difference of logits."""
    directory = resolve_directory(model, MODEL_FILES)
    tokenizer, their_tokenizer = Tokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    ours = load_pretrained(directory).eval()
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    result = {"prompts": len(messages), "same_text": 0, "same_ids": 0, "same_greedy_tokens": 0, "greedy_tokens": 0,
              "largest_logit": 0.0, "largest_logit_difference": 0.0}  # fmt: skip
    for message in messages:
        text = their_tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        ids = their_tokenizer(text, add_special_tokens=False).input_ids
        logits = theirs(torch.tensor([ids])).logits[0]
        difference = (logits - all_logits(ours, torch.tensor([*ids, 0]))).abs().max().item()
        answer = theirs.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False,
                                 eos_token_id=tokenizer.stop_ids, pad_token_id=tokenizer.stop_ids[0])  # fmt: skip
        request = generation.Request(ids, 0, new_tokens)
        [(_, greedy, _)] = generation.generate(ours, [request], tokenizer.stop_ids, temperature=0)
        result["same_text"] += text == tokenizer.render_prompt([message])
        result["same_ids"] += ids == tokenizer.encode_prompt([message])
        result["same_greedy_tokens"] += answer[0, len(ids) :].tolist() == greedy
        result["greedy_tokens"] += len(greedy)
        result["largest_logit"] = max(result["largest_logit"], logits.abs().max().item())
        result["largest_logit_difference"] = max(result["largest_logit_difference"], difference)
    return result


if __name__ == "__main__":
    run_command(main)
