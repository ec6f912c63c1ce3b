"""Sampling with a cache of keys and values. Knows token ids only.

Rows of the cache are decoded together; a row that finishes is given to the next request at once. The random
number behind a token depends on its request's key, its position and nothing else, so a request's sample does
not depend on what is decoded beside it, as far as the logits do not. On CPU they do not depend on it at all:
the model is always run on DECODE_TILE tokens (matrix products of another shape may round differently),
prompts one at a time, and attention row by row. On CUDA the shapes depend on `rows` and on the longest row,
so samples are equal to the extent that kernels round equally.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from redi.attention import cached_attention, packed_attention
from redi.sampling import sample

DECODE_TILE = 16  # tokens that one call of the model decodes on CPU
CACHE_BLOCK = 1024  # slots; the cache grows in whole blocks


@dataclass
class Request:
    """One sample to draw. Neighbours with the same prompt share one pass of the model over it."""

    prompt_ids: list[int]
    key: int  # from `redi.sampling.sample_key`
    max_new_tokens: int


@dataclass
class _Row:
    index: int
    request: Request
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Position of the newest token: sampled, its keys and values not yet in the cache."""
        return len(self.request.prompt_ids) + len(self.ids) - 1


@torch.inference_mode()
def generate(
    model,
    requests: Iterable[Request],
    stop_ids: Iterable[int],
    temperature: float = 0.6,
    top_p: float = 0.95,
    rows: int = DECODE_TILE,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, list[int], str]]:
    """Draw one sample a request; yield (index of the request, sampled ids, finish reason) as samples finish.

    The ids include the stop id that ended the sample (reason "stop"); reason "length" means that
    max_new_tokens ids came without one. Temperature 0 is greedy. At most `rows` requests are decoded at a
    time; they are taken from the iterable as rows become free. `on_tokens` is told of each pass of the model
    how many ids it gave: the first sample may take an hour to finish.
    Raises ValueError when the logits are not finite.
    """
    stop_ids, requests = frozenset(stop_ids), enumerate(requests)
    cache = KVCache(model, rows)
    active: list[_Row] = []  # active[i] owns row i of the cache
    prompt_ids = None
    while True:
        while len(active) < rows and (entry := next(requests, None)):
            row = _Row(*entry)
            if row.request.prompt_ids != prompt_ids:
                prompt_ids = row.request.prompt_ids
                prompt, prompt_logits = _prefill(model, prompt_ids)
            row.ids += sample(prompt_logits, [row.request.key], [len(prompt_ids)], temperature, top_p)
            on_tokens(1)
            if reason := _finish_reason(row, stop_ids):
                yield row.index, row.ids, reason
                continue
            cache.reserve(len(prompt_ids) + 1, [r.position for r in active])
            cache.write_prompt(len(active), prompt)
            active.append(row)
        if not active:
            return

        positions = [row.position for row in active]
        cache.reserve(max(positions) + 1, positions)
        logits = cache.decode([row.ids[-1] for row in active], positions)
        next_positions = [position + 1 for position in positions]
        keys = [row.request.key for row in active]
        for row, token in zip(active, sample(logits, keys, next_positions, temperature, top_p)):
            row.ids.append(token)
        on_tokens(len(active))
        for i in reversed(range(len(active))):
            if reason := _finish_reason(active[i], stop_ids):
                yield active[i].index, active[i].ids, reason
                last = active.pop()
                if i < len(active):  # the last row moves into the gap: active rows stay the first ones
                    cache.move(len(active), i, last.position)
                    active[i] = last


def _finish_reason(row: _Row, stop_ids: frozenset[int]) -> str | None:
    if row.ids[-1] in stop_ids:
        return "stop"
    return "length" if len(row.ids) >= row.request.max_new_tokens else None


def _prefill(model, prompt_ids: list[int]):
    """Run the model over one prompt. Returns (keys, values) by layer, each (K, T, D), and logits (1, V)."""
    device, length = model.head_weight.device, len(prompt_ids)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    by_layer = []

    def attend(q, k, v):
        by_layer.append((k.transpose(0, 1), v.transpose(0, 1)))
        return packed_attention(q, k, v, cu_seqlens, length)

    input_ids = torch.tensor(prompt_ids, device=device)
    hidden = model.hidden(input_ids, torch.arange(length, device=device), [attend] * model.config.num_hidden_layers)
    return by_layer, model.logits(hidden[-1:])


class KVCache:
    """Keys and values of up to `rows` sequences: by layer (rows, K, capacity, D), where slot == position.

    The capacity follows the longest sequence so far, in whole blocks. On CPU, pages that no row has written
    to take no memory.
    """

    def __init__(self, model, rows: int):
        self.model, config, weight = model, model.config, model.head_weight
        self.on_cuda = weight.is_cuda
        self.width = rows if self.on_cuda else DECODE_TILE  # tokens in one call of the model
        rows = -(-rows // self.width) * self.width
        shape = (rows, config.num_key_value_heads, 0, config.head_dim)
        self.layers = [[weight.new_empty(shape) for _ in "kv"] for _ in range(config.num_hidden_layers)]
        self.row_ids = torch.arange(self.width, device=weight.device)
        self.capacity, self.graphs = 0, {}

    def reserve(self, length: int, lengths: list[int]) -> None:
        """Make room for `length` slots a row, keeping the first lengths[i] slots of row i."""
        if length <= self.capacity:
            return
        # At least a quarter more, so that all copies together cost but a few times the final cache.
        self.capacity = -(-max(length, self.capacity * 5 // 4) // CACHE_BLOCK) * CACHE_BLOCK
        self.graphs.clear()  # they hold the old addresses
        for tensors in self.layers:
            for i, old in enumerate(tensors):
                shape = (*old.shape[:2], self.capacity, old.shape[3])
                # On CUDA unused slots are read and weighted with zero, which NaN would survive.
                new = old.new_zeros(shape) if self.on_cuda else old.new_empty(shape)
                for row, kept in enumerate(lengths):
                    new[row, :, :kept] = old[row, :, :kept]
                tensors[i] = new

    def write_prompt(self, row: int, prompt: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensors, sources in zip(self.layers, prompt):
            for tensor, source in zip(tensors, sources):
                tensor[row, :, : source.shape[1]] = source

    def move(self, source: int, target: int, length: int) -> None:
        for tensors in self.layers:
            for tensor in tensors:
                tensor[target, :, :length] = tensor[source, :, :length]

    def decode(self, input_ids: list[int], positions: list[int]) -> torch.Tensor:
        """Run the model on the newest token of rows 0 to n-1 and keep its keys and values: logits (n, V)."""
        n, device = len(input_ids), self.row_ids.device
        padding = [0] * (-n % self.width)  # rows without a sequence: token 0 at position 0, result unused
        input_ids = torch.tensor(input_ids + padding, device=device)
        position_ids = torch.tensor(positions + padding, device=device)
        if self.on_cuda:
            return self._replay(input_ids, position_ids, max(positions) + 1)[:n]
        logits = [
            self._step(start, input_ids[start : start + self.width], position_ids[start : start + self.width])
            for start in range(0, n, self.width)
        ]
        return torch.cat(logits)[:n] if len(logits) > 1 else logits[0][:n]

    def _step(self, start: int, input_ids: torch.Tensor, position_ids: torch.Tensor, span: int | None = None):
        """input_ids, position_ids (width,) of the rows from `start` on, with `span` slots -> (width, V)."""

        def attend(keys, values, q, k, v):
            keys[self.row_ids, :, position_ids] = k
            values[self.row_ids, :, position_ids] = v
            return cached_attention(q, keys, values, position_ids + 1)

        rows = slice(start, start + self.width)
        attends = [partial(attend, keys[rows, :, :span], values[rows, :, :span]) for keys, values in self.layers]
        return self.model.logits(self.model.hidden(input_ids, position_ids, attends))

    def _replay(self, input_ids: torch.Tensor, position_ids: torch.Tensor, length: int) -> torch.Tensor:
        """_step for all rows as one CUDA graph for each number of blocks that the longest row fills:
        launching the kernels one by one costs more than running them."""
        span = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        if span not in self.graphs:
            inputs = input_ids.clone(), position_ids.clone()
            self._step(0, *inputs, span)  # what kernels set up at their first call cannot be captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._step(0, *inputs, span)
            self.graphs[span] = graph, inputs, logits
        graph, inputs, logits = self.graphs[span]
        inputs[0].copy_(input_ids)
        inputs[1].copy_(position_ids)
        graph.replay()
        return logits
