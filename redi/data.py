"""From rows to packed micro-batches: token ids, shifted labels, and which rows rank r trains on in step s.

    load_dataset (rows.py: JSONL -> token ids, once, memory-mapped)
        -> step_rows, partition (pure functions) -> pack -> MicroBatch
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from redi.files import cache_path, code_digest, file_digest, load_arrays, save_arrays
from redi.losses import IGNORE_INDEX
from redi.rows import TokenSettings, encode_rows
from redi.tokenizer import Tokenizer

Assignment = list[list[list[int]]]  # [micro-batch][rank]: example indices
READERS = [Path(__file__).with_name(name) for name in ("rows.py", "tokenizer.py", "data.py")]  # rows -> token ids


@dataclass
class Dataset:
    """Token ids of all examples. Example i is sequences [i * k, (i + 1) * k), k = 1 for SFT, 2 for pairs."""

    ids: np.ndarray  # (total,) int32: prompt and completion of each sequence
    offsets: np.ndarray  # (S + 1,) int64, where each sequence starts in ids
    prompt_lengths: np.ndarray  # (S,) int64
    lines: np.ndarray  # (examples,) int64, line in the JSONL file
    dropped: int  # examples over a length limit
    sequences_per_example: int
    digest: str  # of the token ids and of where labels begin
    loss_on_prompt: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def input_lengths(self) -> np.ndarray:
        """(examples, k): tokens that go through the model; the last token of a sequence is only a label."""
        return (np.diff(self.offsets) - 1).reshape(len(self), -1)

    @property
    def label_spans(self) -> np.ndarray:
        """(S, 2): the tokens [first, stop) of a sequence are its labels. The only definition of what is trained on."""
        first = np.ones_like(self.prompt_lengths) if self.loss_on_prompt else self.prompt_lengths
        return np.stack([first, np.diff(self.offsets)], axis=1)

    @property
    def label_counts(self) -> np.ndarray:
        """(examples, k): |y|, labels of each sequence."""
        return np.diff(self.label_spans).reshape(len(self), -1)


def load_dataset(path: Path, tokenizer: Tokenizer, settings: TokenSettings, fallback: Path) -> Dataset:
    """Tokenise a JSONL file, once: the ids are cached beside it (or in the directory `fallback`) and memory-mapped.

    The cache's name depends on the data, the tokenizer, the settings, and the code that turns rows into ids.
    Raises ValueError naming file and line for invalid rows, and where no example is left.
    """
    inputs = [file_digest(path), file_digest(tokenizer.directory / "tokenizer.json"), tokenizer.chat_template,
              tokenizer.special_tokens, tokenizer.stop_ids]  # fmt: skip
    cache = cache_path(path, "tokens", fallback, settings, *inputs, code_digest(*READERS))
    if not cache.is_file():
        dataset = _tokenize(path, tokenizer, settings)
        arrays = {key: value for key, value in vars(dataset).items() if isinstance(value, np.ndarray)}
        save_arrays(cache, arrays, {"dropped": str(dataset.dropped), "digest": dataset.digest})
    arrays, metadata = load_arrays(cache, mapped=("ids",))
    if not len(arrays["lines"]):
        limits = f"{settings.max_prompt} prompt, {settings.max_response} response or {settings.max_total} tokens in all"
        raise ValueError(f"{path}: no example to train on ({metadata['dropped']} dropped: longer than {limits})")
    return Dataset(**arrays, dropped=int(metadata["dropped"]), sequences_per_example=2 if settings.pairs else 1,
                   digest=metadata["digest"], loss_on_prompt=settings.loss_on_prompt)


def _tokenize(path: Path, tokenizer: Tokenizer, settings: TokenSettings) -> Dataset:
    sequences, prompt_lengths, lines, dropped = [], [], [], 0
    for line, (prompt, *completions) in encode_rows(path, tokenizer, settings):
        if not settings.fit(prompt, *completions):
            dropped += 1
            continue
        lines.append(line)
        for completion in completions:
            sequences.append(np.array(prompt + completion, dtype=np.int32))
            prompt_lengths.append(len(prompt))
    ids = np.concatenate([np.empty(0, np.int32), *sequences])
    offsets = np.cumsum([0, *map(len, sequences)])
    prompt_lengths, lines = np.array(prompt_lengths, dtype=np.int64), np.array(lines, dtype=np.int64)
    dataset = Dataset(ids, offsets, prompt_lengths, lines, dropped, sequences_per_example=2 if settings.pairs else 1,
                      digest="", loss_on_prompt=settings.loss_on_prompt)
    digest = hashlib.sha256()
    for array in (dataset.ids, dataset.offsets, dataset.label_spans[:, 0]):
        digest.update(np.ascontiguousarray(array))
    dataset.digest = digest.hexdigest()
    return dataset


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: (examples,) int64, the same on every rank and after a resume."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def step_rows(examples: int, batch_size: int, seed: int, step: int) -> tuple[int, np.ndarray]:
    """(epoch, the example indices of optimiser step `step`). An epoch's last step may hold fewer."""
    steps_per_epoch = -(-examples // batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    return epoch, epoch_order(examples, seed, epoch)[index * batch_size : (index + 1) * batch_size]


def partition(rows: np.ndarray, tokens: np.ndarray, costs: np.ndarray, ranks: int, max_tokens: int) -> Assignment:
    """Spread a step's examples over ranks and micro-batches.

    Balances the costs of the ranks in a micro-batch. A micro-batch has at most max_tokens, unless a single example is
    longer. All ranks get the same number of micro-batches, the smallest that suffices (a list may be empty).

    Args: rows (n,) example indices; tokens, costs (n,) of those rows.
    """
    by_cost = np.argsort(-costs, kind="stable")
    micro_batches = -(-int(np.minimum(tokens, max_tokens).sum()) // (ranks * max_tokens))
    while True:
        bins = ranks * micro_batches
        members, filled, load = [[] for _ in range(bins)], np.zeros(bins, np.int64), np.zeros(bins)
        for i in by_cost:
            fits = (filled + tokens[i] <= max_tokens) | (filled == 0)
            if not fits.any():
                break
            chosen = np.flatnonzero(fits)[np.argmin(load[fits])]
            members[chosen].append(int(rows[i]))
            filled[chosen] += tokens[i]
            load[chosen] += costs[i]
        else:
            # Ranks run bins of similar cost at the same time; the largest first, to surface out-of-memory errors early.
            order = np.argsort(-load, kind="stable")
            return [[members[b] for b in order[m * ranks : (m + 1) * ranks]] for m in range(micro_batches)]
        micro_batches += 1


def assign_to_ranks(dataset: Dataset, rows: np.ndarray, flops: Callable, max_tokens: int, ranks: int) -> Assignment:
    """`partition` of a step's rows by cost: flops(lengths (n, k)) -> (n, k), those of a forward pass."""
    lengths = dataset.input_lengths[rows]
    return partition(rows, lengths.sum(1), flops(lengths).sum(1), ranks, max_tokens)


def micro_batches(dataset: Dataset, rows: np.ndarray, flops: Callable, max_tokens: int, rank: int,
                  ranks: int) -> list["MicroBatch"]:
    """This rank's packed micro-batches of a step: as many as every other rank gets."""
    return [pack(dataset, parts[rank]) for parts in assign_to_ranks(dataset, rows, flops, max_tokens, ranks)]


@dataclass
class MicroBatch:
    """Packed sequences: T tokens in N sequences of B examples, all chosen first, then all rejected.

    weight: 0 for an example that only keeps its rank in the collectives, otherwise 1.
    """

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (N + 1,) int32
    max_seqlen: int
    labels: torch.Tensor  # (T,) int64, -100 where there is nothing to predict
    label_positions: torch.Tensor  # (M,) int64, where labels != -100: computed here, to avoid a device synchronisation
    rows: torch.Tensor  # (B,) int64, example indices
    weight: float

    def model_inputs(self) -> tuple:
        """The arguments of CausalLM.forward."""
        return self.input_ids, self.position_ids, self.cu_seqlens, self.max_seqlen, self.labels, self.label_positions

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, torch.Tensor)}
        moved = {key: tensor.pin_memory().to(device, non_blocking=True) for key, tensor in tensors.items()}
        return replace(self, **moved)


def pack(dataset: Dataset, rows: list[int]) -> MicroBatch:
    """Concatenate the sequences of some examples; of an empty list, the shortest example with weight 0. Labels are
    shifted here, and nowhere else."""
    weight = 1.0
    if not rows:
        rows, weight = [int(dataset.input_lengths.sum(1).argmin())], 0.0
    k = dataset.sequences_per_example
    sequences = [row * k + j for j in range(k) for row in rows]
    inputs, labels = [], []
    for s, (first, stop) in zip(sequences, dataset.label_spans[sequences]):
        ids = np.asarray(dataset.ids[dataset.offsets[s] : dataset.offsets[s + 1]], dtype=np.int64)
        inputs.append(ids[:-1])
        labels.append(np.full_like(inputs[-1], IGNORE_INDEX))
        labels[-1][first - 1 : stop - 1] = ids[first:stop]
    lengths = [len(ids) for ids in inputs]
    labels = np.concatenate(labels)
    return MicroBatch(
        input_ids=torch.from_numpy(np.concatenate(inputs)),
        position_ids=torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        cu_seqlens=torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        max_seqlen=max(lengths),
        labels=torch.from_numpy(labels),
        label_positions=torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX)),
        rows=torch.tensor(rows),
        weight=weight,
    )
