"""Throughput of sampling beside transformers.generate, in useful tokens per CPU second, alternating in one process.

    python tests/bench/sampling.py                        16 prompts, top-p 0.95, temperature 0.6, one thread
    python tests/bench/sampling.py --shape wide-vocabulary --rows 8

Needs tests/requirements.txt. Both load the same random weights and the same prompts (24 to 60 tokens) and sample
responses of the same uneven lengths (57 to 734 tokens): there is no stop token, each row ends at its own limit. Padding
after the end of a row does not count as useful.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from redi.evaluation.generation import Request, generate  # noqa: E402
from redi.evaluation.sampling import sample_key  # noqa: E402
from redi.hub.config import parse_config  # noqa: E402
from redi.hub.weights import load_pretrained, save_pretrained  # noqa: E402
from redi.model import CausalLM  # noqa: E402

SHAPES = {
    "standard": {"vocab_size": 32_000, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6},
    "wide-vocabulary": {"vocab_size": 151_936, "hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4},
    "0.5B": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
             "num_hidden_layers": 24},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="standard")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=16, help="rows of our decoding batch")
    parser.add_argument("--tile", type=int, default=16, help="rows in one call of our model")
    parser.add_argument("--longest", type=int, default=734, help="tokens of the longest response")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(0)
    vocab_size = SHAPES[args.shape]["vocab_size"]
    prompts = [[rng.randrange(vocab_size) for _ in range(rng.randint(24, 60))] for _ in range(args.prompts)]
    # Evenly spaced on a logarithmic scale: long-tailed, as reasoning traces are.
    spread = [i / max(1, args.prompts - 1) for i in range(args.prompts)]
    lengths = [round(57 * (args.longest / 57) ** x) for x in spread]
    rng.shuffle(lengths)

    with tempfile.TemporaryDirectory() as directory:
        config = {
            "model_type": "qwen2", "num_hidden_layers": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096,
            "tie_word_embeddings": True, **SHAPES[args.shape],
        }  # fmt: skip
        model = CausalLM(parse_config(config))
        model.init_weights(seed=0)
        save_pretrained(model, directory)
        model = load_pretrained(directory)
        peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    def ours(lengths, temperature=0.6):
        requests = [Request(ids, sample_key(0, str(i), 0), n) for i, (ids, n) in enumerate(zip(prompts, lengths))]
        samples = sorted(generate(model, requests, (), temperature, args.top_p, args.rows, tile=args.tile))
        return [ids for _, ids, _ in samples]

    def theirs(lengths, temperature=0.6):
        width = max(map(len, prompts))
        input_ids = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        limits = torch.tensor(lengths) + width

        class Limits(transformers.StoppingCriteria):
            def __call__(self, ids, scores, **kwargs):
                return ids.shape[1] >= limits

        sampling = {"do_sample": True, "temperature": temperature, "top_p": args.top_p, "top_k": 0}
        out = peer.generate(
            input_ids, attention_mask=mask, max_new_tokens=max(lengths), pad_token_id=0, eos_token_id=None,
            stopping_criteria=transformers.StoppingCriteriaList([Limits()]),
            **(sampling if temperature else {"do_sample": False}),
        )  # fmt: skip
        return [ids[width : width + n].tolist() for ids, n in zip(out, lengths)]

    few = [9] * args.prompts
    assert ours(few, 0) == theirs(few, 0), "greedy continuations differ"
    rates = {"ours": [], "transformers": []}
    for _ in range(args.turns):
        for name, draw in (("ours", ours), ("transformers", theirs)):
            start = time.process_time()
            samples = draw(lengths)
            rates[name].append(sum(lengths) / (time.process_time() - start))
            assert [len(ids) for ids in samples] == lengths
    print(
        f"{args.shape}, {args.prompts} responses of {min(lengths)} to {max(lengths)} tokens (mean "
        f"{sum(lengths) / len(lengths):.0f}), rows {args.rows}, tile {args.tile}, top-p {args.top_p}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, one thread, median [min, max] of {args.turns}"
    )
    for name, values in rates.items():
        print(f"{name:14}{median(values):8.0f} useful tokens per CPU second [{min(values):.0f}, {max(values):.0f}]")
    ratios = [a / b for a, b in zip(rates["ours"], rates["transformers"])]
    print(f"ratio         {median(ratios):8.2f} [{min(ratios):.2f}, {max(ratios):.2f}]; target 2")


if __name__ == "__main__":
    main()
