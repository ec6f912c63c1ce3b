"""log π of every row of a data set under the current weights: DPO's reference, and held-out values."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from redi import attention, data, distributed, files, kernels, losses
from redi import model as model_code
from redi.training.plan import forward_flops

# DPO's policy starts as its reference: how far the two may differ before the first update, in nats per token.
REFERENCE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.02}


@torch.no_grad()
def completion_logps(
    model, dataset: data.Dataset, batch_size: int, micro_batch_tokens: int, title: str
) -> torch.Tensor:
    """log π of each example's completions, (examples, k) fp32 in nats, on every rank. Every rank calls.

    batch_size, micro_batch_tokens: as in training; they change speed and memory only. title: of the progress bar.
    """
    logps = torch.zeros(len(dataset), dataset.sequences_per_example, device=model.head_weight.device)
    blocks = np.array_split(np.arange(len(dataset)), -(-len(dataset) // batch_size))
    flops, ranks = partial(forward_flops, model.config), (distributed.rank(), distributed.world_size())
    for rows in tqdm(blocks, title, disable=distributed.hide_bar(), unit="batch", leave=False):
        for micro in data.micro_batches(dataset, rows, flops, micro_batch_tokens, *ranks):
            micro = micro.to(logps.device)
            sums, _ = losses.sequence_logps(model(*micro.model_inputs()), micro.labels, micro.cu_seqlens)
            if micro.weight:
                logps[micro.rows] = torch.stack(sums.chunk(dataset.sequences_per_example), 1)
    distributed.reshard(model)
    return distributed.sum_over_ranks(logps)


def reference_path(
    data_path: Path, fallback: Path, model_digest: str, config: model_code.ModelConfig, dtype: str,
    dataset: data.Dataset,
) -> Path:  # fmt: skip
    """The cache file of `reference`, named by all that decides its content: the initial weights (their digest), the
    model's config, the dtype, the rows, and the code that computes log-probs. In `fallback` if the data's directory is
    read-only."""
    code = files.code_digest(attention, data, kernels, losses, model_code, __file__)
    return files.cache_path(data_path, "reference", fallback, model_digest, config, dtype, dataset.digest, code)


def reference(path: Path, model, dataset: data.Dataset, batch_size: int, micro_batch_tokens: int) -> torch.Tensor:
    """log π_ref of (chosen, rejected), (examples, 2) fp32: read from `path`, or computed from the current weights."""
    if not all(distributed.all_gather_object(path.is_file())):  # machines may have data directories of their own
        logps = completion_logps(model, dataset, batch_size, micro_batch_tokens, "reference log-probs").cpu().numpy()
        save = partial(files.save_arrays, path, {"reference_logps": logps})
        distributed.run_on_ranks(distributed.local_rank() == 0, save)
    arrays, _ = files.load_arrays(path)
    return torch.from_numpy(arrays["reference_logps"]).to(model.head_weight.device)


def check_reference(gap: float, dtype: str, path: Path) -> None:
    """Warn if the policy of the first step is not the reference, as it must be; DPO's loss is ln 2 there.

    gap: mean difference of the log-probs, in nats per token; path: the reference's cache.
    """
    if not gap <= REFERENCE_TOLERANCE[dtype]:
        distributed.print_rank0(f"warning: at the first step the log-probs of policy and reference differ by {gap:.2g} "
                                f"nats per token, although they are the same model; expected at most "
                                f"{REFERENCE_TOLERANCE[dtype]:g}. Delete {path} and start again")


def held_out(model, dataset: data.Dataset, batch_size: int, micro_batch_tokens: int) -> dict[str, float]:
    """Log-prob per token, in nats, mean over the examples of --eval-data; for pairs also rejected, and the margin."""
    logps = completion_logps(model, dataset, batch_size, micro_batch_tokens, "held-out rows").cpu()
    chosen, *rejected = (logps / torch.from_numpy(dataset.label_counts)).mean(0).tolist()
    values = {"eval_chosen_logp": chosen}
    if rejected:
        values |= {"eval_rejected_logp": rejected[0], "eval_margin": chosen - rejected[0]}
    return values


def compare_held_out(dataset: data.Dataset, held_out: data.Dataset, path: Path, held_out_path: Path) -> None:
    """Warn about rows of --eval-data that are in --data too, by their token ids or by those of their prompts alone.
    Raises ValueError where all rows are."""
    (prompts, examples), (held_out_prompts, held_out_examples) = _hashes(dataset), _hashes(held_out)
    known_prompts, known_examples = set(prompts), set(examples)
    shared = sum(value in known_examples for value in held_out_examples)
    if shared == len(held_out):
        raise ValueError(f"{held_out_path} has the rows of {path}: --eval-data is for rows that are not trained on")
    if shared_prompts := sum(value in known_prompts for value in held_out_prompts):
        distributed.print_rank0(f"warning: of the {len(held_out)} examples in {held_out_path}, {shared} are also in "
                                f"{path}, and {shared_prompts} have a prompt that is also there")


def _hashes(dataset: data.Dataset) -> tuple[list[int], list[int]]:
    """Of each example: of the token ids of its prompt, and of all its token ids."""
    starts, lengths = (array[:: dataset.sequences_per_example] for array in (dataset.offsets, dataset.prompt_lengths))
    prompts = [hash(dataset.ids[start : start + length].tobytes()) for start, length in zip(starts, lengths)]
    return prompts, [hash(dataset.ids[start:stop].tobytes()) for start, stop in zip(starts, starts[1:])]
