"""Sampling with a KV cache and continuous batching. Works on token ids only.

When a sequence finishes, its place in the batch goes to the next request at once. The random number behind a token
depends only on its request's key and its position, so a sample depends on the rest of the batch only as far as the
logits do. On CPU they do not depend on it at all: the model always runs on `tile` tokens (matrix products of
another shape may round differently), prompts one at a time, and attention sequence by sequence. On CUDA the shapes
depend on `max_batch_size`, so samples are equal up to the rounding of the kernels.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

from redi.attention import cached_attention, packed_attention, uses_flash
from redi.evaluation.sampling import sample

DECODE_TILE = 16  # default number of tokens that one call of the model decodes on a CPU
CACHE_BLOCK = 1024  # slots; the cache grows by multiples of it


@dataclass
class Request:
    """One sample to draw. Consecutive requests with the same prompt share one prefill."""

    prompt_ids: list[int]
    key: int  # from `redi.evaluation.sampling.sample_key`
    max_new_tokens: int


@dataclass
class _Sequence:
    index: int
    request: Request
    ids: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Position of the newest token: sampled, but its keys and values are not in the cache yet."""
        return len(self.request.prompt_ids) + len(self.ids) - 1

    @property
    def slots_needed(self) -> int:
        """Maximum number of cache slots: the last token is never written to it."""
        return len(self.request.prompt_ids) + self.request.max_new_tokens - 1


@torch.inference_mode()
def generate(
    model, requests: Iterable[Request], stop_ids: Iterable[int], temperature: float = 0.6, top_p: float = 0.95,
    max_batch_size: int = DECODE_TILE, on_tokens: Callable[[int], None] = lambda count: None, tile: int = DECODE_TILE,
) -> Iterator[tuple[int, list[int], str]]:  # fmt: skip
    """Draw one sample for each request; yield (index of the request, sampled ids, finish reason) as samples finish.

    The ids include the stop id that ended the sample (reason "stop"); with reason "length", max_new_tokens ids came
    without one. Temperature 0 is greedy. At most `max_batch_size` requests are decoded at a time; they are taken from
    the iterable as places become free. `on_tokens` receives the number of new ids after each forward pass, as the
    first sample may take an hour to finish. A wider `tile` reads the weights less often (CPU only); its samples differ
    by rounding. Raises ValueError when the logits are not finite.
    """
    stop_ids, requests = frozenset(stop_ids), enumerate(requests)
    cache = KVCache(model, max_batch_size, tile)
    active: list[_Sequence] = []  # active[i] owns row i of the cache
    prompt_ids = None
    while True:
        while len(active) < max_batch_size and (entry := next(requests, None)):
            sequence = _Sequence(*entry)
            if sequence.request.prompt_ids != prompt_ids:
                prompt_ids = sequence.request.prompt_ids
                prompt, prompt_logits = _prefill(model, prompt_ids)
            sequence.ids += sample(prompt_logits, [sequence.request.key], [len(prompt_ids)], temperature, top_p)
            on_tokens(1)
            if reason := _finish_reason(sequence, stop_ids):
                yield sequence.index, sequence.ids, reason
                continue
            positions = [sequence.position for sequence in active]
            active.append(sequence)
            cache.reserve(len(prompt_ids), positions, max(sequence.slots_needed for sequence in active))
            cache.write_prompt(len(positions), prompt)
        if not active:
            return

        positions = [sequence.position for sequence in active]
        cache.reserve(max(positions) + 1, positions, max(sequence.slots_needed for sequence in active))
        logits = cache.decode([sequence.ids[-1] for sequence in active], positions)
        next_positions = [position + 1 for position in positions]
        keys = [sequence.request.key for sequence in active]
        for sequence, token in zip(active, sample(logits, keys, next_positions, temperature, top_p)):
            sequence.ids.append(token)
        on_tokens(len(active))
        for i in reversed(range(len(active))):
            if reason := _finish_reason(active[i], stop_ids):
                yield active[i].index, active[i].ids, reason
                last = active.pop()
                if i < len(active):  # the last row fills the gap: active rows stay contiguous
                    cache.move(len(active), i, last.position)
                    active[i] = last


def _finish_reason(sequence: _Sequence, stop_ids: frozenset[int]) -> str | None:
    if sequence.ids[-1] in stop_ids:
        return "stop"
    return "length" if len(sequence.ids) >= sequence.request.max_new_tokens else None


def _prefill(model, prompt_ids: list[int]):
    """Forward pass over a prompt of T tokens. Returns (keys, values) by layer, each (T, K, D), and logits (1, V)."""
    device, length = model.head_weight.device, len(prompt_ids)
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
    by_layer = []

    def attend(q, k, v):
        by_layer.append((k, v))
        return packed_attention(q, k, v, cu_seqlens, length)

    input_ids = torch.tensor(prompt_ids, device=device)
    hidden = model.hidden(input_ids, torch.arange(length, device=device), [attend] * model.config.num_hidden_layers)
    return by_layer, model.logits(hidden[-1:])


class KVCache:
    """Keys and values of up to `max_batch_size` sequences: by layer (rows, capacity, K, D), where slot == position.

    The capacity follows the longest sequence so far, in blocks. On CPU, pages that no sequence has written to take no
    memory.
    """

    def __init__(self, model, max_batch_size: int, tile: int):
        self.model, self.max_batch_size, self.capacity, self.graph = model, max_batch_size, 0, None
        config, weight = model.config, model.head_weight
        # One CUDA graph for the batch, where attention needs no lengths on the host.
        self.captures = uses_flash(weight.new_empty(1, 1, config.head_dim))
        self.width = max_batch_size if self.captures else tile  # tokens in one forward pass
        self.row_ids = torch.arange(self.width, device=weight.device)
        self.layers = [self._allocate() for _ in range(config.num_hidden_layers)]

    def _allocate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, (rows, capacity, K, D). In memory, the slots of a head are contiguous on CPU
        (attention takes a fifth of the time), the heads of a slot on CUDA (as FlashAttention expects)."""
        config, rows = self.model.config, -(-self.max_batch_size // self.width) * self.width
        shape, size = (rows, self.capacity, config.num_key_value_heads), config.head_dim
        new = self.model.head_weight.new_empty
        if self.captures:
            return new(*shape, size), new(*shape, size)
        shape = shape[0], shape[2], shape[1]
        return new(*shape, size).transpose(1, 2), new(*shape, size).transpose(1, 2)

    def reserve(self, length: int, lengths: list[int], needed: int) -> None:
        """Grow to at least `length` slots for each row, but not beyond `needed`, the maximum that any sequence can
        reach. Keeps the first lengths[i] slots of row i."""
        if length <= self.capacity:
            return
        # By at least a quarter, so that all copies together cost a small multiple of the final cache.
        wanted = min(max(length, self.capacity * 5 // 4), needed)
        self.capacity = -(-wanted // CACHE_BLOCK) * CACHE_BLOCK
        self.graph = None  # it refers to the old addresses
        for i, old in enumerate(self.layers):
            self.layers[i] = self._allocate()
            for source, target in zip(old, self.layers[i]):
                for row, kept in enumerate(lengths):
                    target[row, :kept] = source[row, :kept]

    def write_prompt(self, row: int, prompt: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for tensors, sources in zip(self.layers, prompt):
            for tensor, source in zip(tensors, sources):
                tensor[row, : len(source)] = source

    def move(self, source: int, target: int, length: int) -> None:
        for tensors in self.layers:
            for tensor in tensors:
                tensor[target, :length] = tensor[source, :length]

    def decode(self, input_ids: list[int], positions: list[int]) -> torch.Tensor:
        """One decode step for the newest tokens of rows 0 to n-1, which writes their keys and values: logits (n, V)."""
        n, device = len(input_ids), self.row_ids.device
        padding = [0] * (-n % self.width)  # unused rows: token 0 at position 0, result ignored
        input_ids = torch.tensor(input_ids + padding, device=device)
        position_ids = torch.tensor(positions + padding, device=device)
        if self.captures:
            return self._replay(input_ids, position_ids)[:n]
        logits = [
            self._step(start, input_ids[start : start + self.width], position_ids[start : start + self.width])
            for start in range(0, n, self.width)
        ]
        return torch.cat(logits)[:n] if len(logits) > 1 else logits[0][:n]

    def _step(self, start: int, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """input_ids, position_ids (width,) of the rows from `start` on -> (width, V)."""
        lengths = (position_ids + 1).int()

        def attend(keys, values, q, k, v):
            keys[self.row_ids, position_ids] = k
            values[self.row_ids, position_ids] = v
            return cached_attention(q, keys, values, lengths)

        rows = slice(start, start + self.width)
        attention_fns = [partial(attend, keys[rows], values[rows]) for keys, values in self.layers]
        return self.model.logits(self.model.hidden(input_ids, position_ids, attention_fns))

    def _replay(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """_step for all rows as one CUDA graph, since launching the kernels one by one costs more than running them."""
        if self.graph is None:
            self.inputs = input_ids.clone(), position_ids.clone()
            self._step(0, *self.inputs)  # warm-up: what kernels set up at their first call cannot be captured
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step(0, *self.inputs)
        self.inputs[0].copy_(input_ids)
        self.inputs[1].copy_(position_ids)
        self.graph.replay()
        return self.logits
