"""What a reader may want to change, done on a copy: README's new objective to the letter, and a new metric."""

import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch

from redi.hub.weights import load_pretrained
from redi.tokenizer import Tokenizer
from tests import tiny
from tests.conftest import ROOT


@pytest.fixture
def copy(tmp_path):
    """The code, a model and pairs, in a directory of its own."""
    shutil.copytree(ROOT / "redi", tmp_path / "redi", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("train.py", "evaluate.py"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    tiny.write_model(tmp_path / "model", hidden_size=36, intermediate_size=50, num_hidden_layers=1)
    tiny.write_rows(tmp_path, examples=8)
    return tmp_path


def edit(path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


SEVERAL = """
import sys
import train
for line in sys.stdin:
    try:
        train.main(line.split())
    except (ValueError, SystemExit) as end:
        print(f"error: {end}")
    print(end="\\0")
"""


def train(copy, *commands: str) -> list[str]:
    """What each of these commands of train.py prints, one after another in one process of the copy's."""
    words = "--model model --data pairs.jsonl --output out --batch-size 4"  # a later --output replaces this one
    lines = "".join(f"{command.replace(' ', f' {words} ', 1)}\n" for command in commands)
    run = subprocess.run([sys.executable, "-c", SEVERAL], cwd=copy, input=lines, capture_output=True, text=True,
                         timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout.split("\0")[:-1]


def metrics(copy, output="out") -> list[dict]:
    return [json.loads(line) for line in (copy / output / "metrics.jsonl").read_text().splitlines()]


def test_a_new_objective_as_readme_adds_it(copy):
    section = (ROOT / "README.md").read_text().partition("## Add an objective")[2].partition("\n## ")[0]
    loss, entry = re.findall(r"```python\n# [^\n]*\n(.*?)```", section, re.DOTALL)
    with open(copy / "redi" / "losses.py", "a") as file:
        file.write("\n\n" + loss)
    edit(copy / "train.py", '    "simpo": Method(\n', f'{entry}    "simpo": Method(\n')

    settings = "--epochs 2 --lr 1e-3 --save-every 2"
    shown, planned, trained, *refused = train(
        copy, "ln-dpo --help", "ln-dpo --plan --epochs 1", f"ln-dpo --output whole {settings}", "ln-dpo --gamma=3",
        "ln-dpo --label-smoothing=0.1", "ln-dpo --alpha=1", "sft --beta=2")
    assert "scale of the margin per token (default: 2.0)" in shown and "--gamma" not in shown and "3e-07" in shown
    assert re.search(r"steps +2 of 4", planned) and "error: " not in planned + trained
    rows = metrics(copy, "whole")
    assert len(rows) == 4 and rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(list(copy.glob("pairs.jsonl.reference-*"))) == 1
    flags, owners = ["--gamma", "--label-smoothing", "--alpha", "--beta"], ["simpo", "dpo", "redi", "dpo and ln-dpo"]
    for sentence, flag, owner in zip(refused, flags, owners, strict=True):
        assert sentence.startswith("error: ") and flag in sentence and owner in sentence
    assert not (copy / "out").exists()

    shutil.copytree(copy / "whole", copy / "cut")
    for name in ("final", "step-000004"):
        shutil.rmtree(copy / "cut" / name)
    again = f"ln-dpo --output cut {settings} --resume"
    refused, resumed = train(copy, f"{again} --beta 1", again)
    assert "--beta 2.0" in refused and "not 1.0" in refused
    assert "from step 2" in resumed and "error: " not in resumed
    final = "final/model.safetensors"
    assert (copy / "cut" / final).read_bytes() == (copy / "whole" / final).read_bytes()


def test_alpha_that_falls_over_the_steps_is_changed_in_one_place(copy):
    """From 1.0 to 0.6, linearly: README's other example."""
    edit(copy / "train.py", "*logps.chunk(2), *lengths.chunk(2), alpha)",
         "*logps.chunk(2), *lengths.chunk(2), alpha * (1 - 0.4 * progress))")
    [output] = train(copy, "redi --alpha 1 --steps 4 --lr 1e-3")
    assert "error: " not in output
    rows = metrics(copy)
    for step, row in enumerate(rows):
        alpha = 1 - 0.4 * step / 4
        assert row["loss"] == pytest.approx(-row["chosen_logp"] + alpha * row["rejected_logp"], abs=1e-6)


def test_a_new_metric_in_two_files(copy):
    """The mean entropy, in nats a token, of the model's predictions over chosen and rejected responses."""
    losses, loop = copy / "redi" / "losses.py", copy / "train.py"
    edit(losses, "        dtype = matmul_dtype(hidden)\n        weight, log_probs =",
         "        entropies, dtype = torch.empty_like(logps), matmul_dtype(hidden)\n        weight, log_probs =")
    edit(losses, "            logps[rows] = log_probs.gather(1, labels[rows, None]).squeeze(1)\n",
         "            logps[rows] = log_probs.gather(1, labels[rows, None]).squeeze(1)\n"
         "            entropies[rows] = -(log_probs.exp() * log_probs).sum(-1)\n")
    edit(losses, "        return logps\n",
         "        ctx.mark_non_differentiable(entropies)\n        return logps, entropies\n")
    edit(losses, "    def backward(ctx, grad_logps):\n", "    def backward(ctx, grad_logps, _):\n")
    edit(losses, "    logps = _LabelLogps.apply(hidden[positions], head_weight, labels[positions], chunk_size, "
         "product or fp32_product)\n"
         "    return torch.zeros(len(labels), device=hidden.device).index_copy(0, positions, logps)\n",
         "    found = _LabelLogps.apply(hidden[positions], head_weight, labels[positions], chunk_size, "
         "product or fp32_product)\n"
         "    zeros = torch.zeros(len(labels), device=hidden.device)\n"
         "    return tuple(zeros.index_copy(0, positions, values) for values in found)\n")
    edit(loop, "            token_logps = model(*micro.model_inputs())\n",
         "            token_logps, entropies = model(*micro.model_inputs())\n")
    edit(loop, "                totals[name] += term\n",
         "                totals[name] += term\n"
         "            sums, _ = sequence_logps(entropies, micro.labels, micro.cu_seqlens)\n"
         "            for name, mean in zip((\"chosen_entropy\", \"rejected_entropy\"), (sums / lengths).chunk(2)):\n"
         "                totals[name] += micro.weight / len(rows) * mean.sum()\n")
    trained, = train(copy, "redi --steps 1 --batch-size 8 --micro-batch-tokens 300")
    assert "error: " not in trained
    row, = metrics(copy)

    model, tokenizer = load_pretrained(copy / "model"), Tokenizer.from_pretrained(copy / "model")
    rows = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    for name in ("chosen", "rejected"):
        means, end = [], [tokenizer.end_of_turn_id]
        for pair in rows:
            prompt = tokenizer.encode(tokenizer.render_prompt(pair["prompt"]))
            ids = torch.tensor(prompt + tiny.completion_ids(tokenizer, pair[name][0]["content"]) + end)
            log_probs = tiny.all_logits(model, ids).log_softmax(-1)[len(prompt) - 1 :]
            means.append(-(log_probs.exp() * log_probs).sum(-1).mean())
        assert row[f"{name}_entropy"] == pytest.approx(torch.stack(means).mean().item(), abs=1e-5)
