"""log π of every row of a data file under the current weights: DPO's reference, and held-out values."""

from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from redi import data, distributed, files
from redi.hub.weights import weights_digest
from redi.losses import sequence_logps


@torch.no_grad()
def completion_logps(args, model, dataset: data.Dataset, device: torch.device, title: str) -> torch.Tensor:
    """log π of each example's completions, (examples, k) fp32 in nats, on every rank. Every rank calls.

    args: train.py's batch_size and micro_batch_tokens, which change nothing but speed and memory.
    """
    logps = torch.zeros(len(dataset), dataset.sequences_per_example, device=device)
    blocks = np.array_split(np.arange(len(dataset)), -(-len(dataset) // args.batch_size))
    ranks = distributed.rank(), distributed.world_size()
    for rows in tqdm(blocks, title, disable=distributed.hide_bar(), unit="batch", leave=False):
        for micro in data.micro_batches(dataset, rows, model.config.forward_flops, args.micro_batch_tokens, *ranks):
            micro = micro.to(device)
            sums, _ = sequence_logps(model(*micro.model_inputs()), micro.labels, micro.cu_seqlens)
            if micro.weight:
                logps[micro.rows] = torch.stack(sums.chunk(dataset.sequences_per_example), 1)
    distributed.reshard(model)
    return distributed.sum_over_ranks(logps)


def reference(args, model, dataset: data.Dataset, directory: Path, device: torch.device) -> torch.Tensor:
    """log π_ref of (chosen, rejected), (examples, 2) fp32: the start's, computed once, kept on disk for other runs.

    directory: of the model that training begins from, whose weights are the current ones.
    """
    depends_on = weights_digest(directory), model.config, args.dtype, dataset.digest
    path = files.cache_path(args.data, "reference", args.output, *depends_on)
    # Decided by rank 0 alone: a file that one rank sees and another does not would leave them waiting.
    if not distributed.all_gather_object(path.is_file())[0]:
        logps = completion_logps(args, model, dataset, device, "reference log-probs").cpu().numpy()
        save = partial(files.save_arrays, path, {"reference_logps": logps})
        distributed.run_on_ranks(distributed.local_rank() == 0, save)
    arrays, _ = files.load_arrays(path)
    return torch.from_numpy(arrays["reference_logps"]).to(device)


def held_out(args, model, dataset: data.Dataset, device: torch.device) -> dict[str, float]:
    """Log-prob a token, in nats, mean over the examples of --eval-data; of pairs also rejected, and the margin."""
    logps = completion_logps(args, model, dataset, device, "held-out rows").cpu()
    chosen, *rejected = (logps / torch.from_numpy(dataset.label_counts)).mean(0).tolist()
    values = {"eval_chosen_logp": chosen}
    if rejected:
        values |= {"eval_rejected_logp": rejected[0], "eval_margin": chosen - rejected[0]}
    return values
