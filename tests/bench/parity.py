"""Does a model directory mean the same here as in transformers? In fp32: template, token ids, logits, greedy tokens;
with --pairs also the loss and the gradients of a REDI step against those of a padded batch on transformers' model.

    pip install -r tests/requirements.txt
    python tests/bench/parity.py --model HuggingFaceTB/SmolLM2-135M-Instruct --problems problems.jsonl \
        --pairs pairs.jsonl

Prints a JSON object, and writes it to --output where that is given.
"""

import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from redi.cli import Parser, positive_int, run_command
from redi.data import load_dataset, pack
from redi.evaluation.generation import Request, generate
from redi.files import resolve_directory, write_json
from redi.hub.weights import MODEL_FILES, load_pretrained
from redi.losses import redi_loss, sequence_logps
from redi.problems import read_benchmark, user_message
from redi.rows import TokenSettings
from redi.tokenizer import Tokenizer
from tests.tiny import all_logits


def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="model directory or hub id")
    add("--problems", required=True, type=Path, help="JSONL: id, problem, answer")
    add("--limit", type=positive_int, default=4, help="problems to compare on")
    add("--tokens", type=positive_int, default=64, help="greedy tokens a problem")
    add("--pairs", type=Path, metavar="FILE", help="pairs.jsonl, for the REDI step")
    add("--batch-size", type=positive_int, default=2, help="pairs of the step, from the start of the file")
    add("--prefill", default="", help="of the pairs' responses")
    add("--output", type=Path, help="JSON file")
    args = parser.parse_args(argv)
    problems = read_benchmark(args.problems, args.limit).problems.values()
    result = compare(args.model, [user_message(problem) for problem in problems], args.tokens)
    if args.pairs:
        result |= compare_step(args.model, args.pairs, args.batch_size, args.prefill)
    print(json.dumps(result, indent=2))
    if args.output:
        write_json(args.output, result)


@torch.no_grad()
def compare(model: str, messages: list[dict], new_tokens: int) -> dict:
    """For how many messages text, ids and greedy tokens are the same, and how far the logits differ."""
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
        request = Request(ids, 0, new_tokens)
        [(_, greedy, _)] = generate(ours, [request], tokenizer.stop_ids, temperature=0)
        result["same_text"] += text == tokenizer.render_prompt([message])
        result["same_ids"] += ids == tokenizer.encode_prompt([message])
        result["same_greedy_tokens"] += answer[0, len(ids) :].tolist() == greedy
        result["greedy_tokens"] += len(greedy)
        result["largest_logit"] = max(result["largest_logit"], logits.abs().max().item())
        result["largest_logit_difference"] = max(result["largest_logit_difference"], difference)
    return result


def compare_step(model: str, pairs: Path, batch_size: int, prefill: str) -> dict:
    """Loss of a REDI step, and how far loss and gradients are from those of a padded batch: |difference| / |gradient|,
    the largest over the parameters."""
    directory = resolve_directory(model, MODEL_FILES)
    limits = {"max_prompt": 4096, "max_response": 4096, "max_total": 4096}
    with tempfile.TemporaryDirectory() as cache:
        settings = TokenSettings(pairs=True, prefill=prefill, **limits)
        dataset = load_dataset(pairs, Tokenizer.from_pretrained(directory), settings, Path(cache))
    batch, ours = pack(dataset, list(range(batch_size))), load_pretrained(directory)
    logps, lengths = sequence_logps(ours(*batch.model_inputs()), batch.labels, batch.cu_seqlens)
    loss = redi_loss(*logps.chunk(2), *lengths.chunk(2)).mean()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    del ours  # two models with gradients do not fit everywhere

    starts = batch.cu_seqlens.tolist()
    sequences = [slice(start, stop) for start, stop in zip(starts, starts[1:])]
    input_ids, labels = (
        torch.nn.utils.rnn.pad_sequence([values[one] for one in sequences], batch_first=True, padding_value=padding)
        for values, padding in ((batch.input_ids, 0), (batch.labels, -100))
    )  # (2B, L); labels are the next tokens already
    mask = torch.arange(input_ids.shape[1]) < torch.tensor([[one.stop - one.start] for one in sequences])
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits = theirs(input_ids, attention_mask=mask.long()).logits
    token_losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    averages = -token_losses.view_as(labels).sum(1) / (labels != -100).sum(1)
    chosen, rejected = averages.chunk(2)
    their_loss = (-chosen + 0.8 * rejected).mean()
    their_loss.backward()
    differences = [
        ((gradients[name] - parameter.grad).norm() / parameter.grad.norm()).item()
        for name, parameter in theirs.named_parameters()
    ]
    return {"redi_loss": loss.item(), "redi_loss_difference": abs(loss - their_loss).item(),
            "largest_relative_gradient_difference": max(differences)}  # fmt: skip


if __name__ == "__main__":
    run_command(main)
