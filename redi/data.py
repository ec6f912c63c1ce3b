"""From JSONL rows to packed micro-batches: ids, shifted labels, and which rows go into step s on rank r.

    read_jsonl -> read_examples -> load_dataset (token ids, tokenised once, memory-mapped)
               -> epoch_order, partition (pure functions) -> pack -> MicroBatch
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from redi.losses import IGNORE_INDEX
from redi.tokenizer import Tokenizer

MAX_LINE_BYTES = 64 * 2**20
CACHE_FORMAT = 2


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) of each non-blank line.

    Raises ValueError naming file and line for invalid UTF-8, malformed JSON, anything but an object, and
    lines over 64 MiB (which are not read whole).
    """
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    with file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: not valid JSON in UTF-8: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {type(row).__name__}")
            yield number, row


@contextlib.contextmanager
def naming(path: str | Path):
    """Put the path into an OSError that lacks it, as one of a write or fsync does."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def write_atomically(path: str | Path):
    """A text file that appears under its name whole, when the block ends well, or not at all."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
    try:
        with naming(path), open(partial, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class Example:
    """One row: the prompt (messages, or text to be continued as it stands) and its completions.

    completions has one text for SFT, and (chosen, rejected) for pairs.
    """

    line: int
    prompt: list[dict] | str
    completions: tuple[str, ...]


def read_examples(path: str | Path, pairs: bool) -> Iterator[Example]:
    """Read positives (pairs=False) or pairs in any of TRL's forms.

    Message lists or plain strings; for pairs a prompt of its own or left implicit as the common start of
    chosen and rejected; for SFT prompt and completion, or `messages` that end with the assistant.
    Raises ValueError naming file, line and key.
    """
    for line, row in read_jsonl(path):
        try:
            prompt, completions = _pair(row) if pairs else _positive(row)
        except ValueError as error:
            raise ValueError(f"{path}, line {line}: {error}") from None
        for text in completions:
            if not text.strip():
                raise ValueError(f"{path}, line {line}: a completion is empty")
        if pairs and completions[0] == completions[1]:
            raise ValueError(f"{path}, line {line}: chosen equals rejected, which teaches nothing")
        yield Example(line, prompt, completions)


def _positive(row: dict) -> tuple[list[dict] | str, tuple[str]]:
    if "messages" in row:
        messages = _messages(row, "messages")
        if len(messages) < 2:
            raise ValueError("'messages' has no prompt before the answer")
        return messages[:-1], (_assistant_text(messages[-1:], "messages"),)
    prompt, completion = _field(row, "prompt"), _field(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, (completion,)
    return _as_messages(row, "prompt"), (_assistant_text(_messages(row, "completion"), "completion"),)


def _pair(row: dict) -> tuple[list[dict] | str, tuple[str, str]]:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if "prompt" not in row:
            prompt = os.path.commonprefix([chosen, rejected])
            # A word break belongs to the completions, as it does where the prompt is explicit.
            prompt = prompt[:-1] if prompt.endswith(" ") else prompt
            if not prompt:
                raise ValueError("no key 'prompt', and 'chosen' and 'rejected' have no common start")
            return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])
        if isinstance(row["prompt"], str):
            return row["prompt"], (chosen, rejected)
        raise ValueError("'prompt' is a list of messages but 'chosen' and 'rejected' are strings")
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    common = sum(1 for _ in _common_start(chosen, rejected))
    prompt = chosen[:common]
    if not common or isinstance(row.get("prompt"), list):
        _field(row, "prompt")
        stated = _as_messages(row, "prompt")
        if prompt[: len(stated)] != stated:  # else the conversations only repeat the prompt beside them
            prompt = stated + prompt
    return prompt, (_assistant_text(chosen[common:], "chosen"), _assistant_text(rejected[common:], "rejected"))


def _common_start(first: list, second: list) -> Iterator:
    for a, b in zip(first[:-1], second[:-1]):
        if a != b:
            return
        yield a


def _field(row: dict, key: str):
    if key not in row:
        raise ValueError(f"no key {key!r} (found {', '.join(sorted(row)) or 'none'})")
    return row[key]


def _as_messages(row: dict, key: str) -> list[dict]:
    return [{"role": "user", "content": row[key]}] if isinstance(row[key], str) else _messages(row, key)


def _messages(row: dict, key: str) -> list[dict]:
    messages = _field(row, key)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} must be a non-empty list of messages or a string")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{key!r} holds a message without the strings 'role' and 'content'")
    return messages


def _assistant_text(messages: list[dict], key: str) -> str:
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{key!r} must end with exactly one assistant message after the prompt")
    return messages[0]["content"]


@dataclass(frozen=True)
class TokenSettings:
    """Everything besides file and tokenizer that decides the token ids. Limits are in tokens."""

    pairs: bool
    max_prompt: int  # longer prompts are dropped, never truncated
    max_response: int
    max_total: int
    prefill: str = "<think>\n"
    system_prompt: str | None = None
    append_end_of_text: bool = False  # official: `\n<|endoftext|>` after the end of turn, counted in |y|
    loss_on_prompt: bool = False  # official stage 1


@dataclass
class Dataset:
    """Token ids of all examples. Example i is sequences [i * k, (i + 1) * k), k = 1 for SFT, 2 for pairs."""

    ids: np.ndarray  # (total,) int32
    offsets: np.ndarray  # (S + 1,) int64, where each sequence starts in ids
    prompt_lengths: np.ndarray  # (S,) int64, tokens before the first label
    lines: np.ndarray  # (examples,) int64, line in the JSONL file
    dropped: int  # examples over a length limit
    sequences_per_example: int
    digest: str  # of the token ids and all that decides the labels

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def input_lengths(self) -> np.ndarray:
        """(examples, k): tokens that go through the model; the last token of a sequence is only a label."""
        return (np.diff(self.offsets) - 1).reshape(len(self), -1)

    @property
    def label_counts(self) -> np.ndarray:
        """(examples, k): |y|, labels of each sequence."""
        return (np.diff(self.offsets) - self.prompt_lengths).reshape(len(self), -1)


def load_dataset(path: Path, tokenizer: Tokenizer, settings: TokenSettings, cache: Path) -> Dataset:
    """Tokenise a JSONL file, once: the ids are kept in `cache` and memory-mapped from there.

    `cache` is a file made by this function before, or to be made; call `cache_name` for its name.
    Raises ValueError naming file and line for bad rows, and where nothing is left to train on.
    """
    if not cache.is_file():
        _tokenize(path, tokenizer, settings, cache)
    try:
        with safe_open(cache, framework="np") as file:
            metadata = file.metadata()
            offsets, prompts, lines = (file.get_tensor(key) for key in ("offsets", "prompt_lengths", "lines"))
        ids = np.empty(0, np.int32)
        if len(lines):  # The only large tensor is mapped, not read: all ranks of a machine share its pages.
            ids = np.memmap(cache, np.int32, "r", _data_offset(cache, "ids"), shape=int(offsets[-1]))
        if metadata["sha256"] != _checksum(metadata, ids, offsets, prompts, lines):
            raise ValueError("its checksum is another")
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"{cache} is damaged ({error}); delete it, and it is made again") from None
    if not len(lines):
        raise ValueError(
            f"{path}: no example to train on ({metadata['dropped']} dropped: longer than "
            f"{settings.max_prompt} prompt, {settings.max_response} response or {settings.max_total} tokens in all)"
        )
    return Dataset(
        ids, offsets, prompts, lines, int(metadata["dropped"]), 2 if settings.pairs else 1, metadata["digest"]
    )


def cache_name(path: Path, tokenizer: Tokenizer, settings: TokenSettings) -> str:
    """File name of the token cache: the data file's name and a hash of all that decides the ids."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {settings} {tokenizer.chat_template}".encode())
    for file in (path, tokenizer.directory / "tokenizer.json"):
        try:
            with open(file, "rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return f"{path.name}.tokens-{digest.hexdigest()[:16]}.safetensors"


def _checksum(metadata: dict[str, str], *arrays: np.ndarray) -> str:
    """SHA-256 of all that a token cache holds."""
    digest = hashlib.sha256(f"{metadata['dropped']} {metadata['digest']}".encode())
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode() + b"\0")
        digest.update(array)
    return digest.hexdigest()


def _data_offset(path: Path, key: str) -> int:
    with open(path, "rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        return 8 + header_bytes + json.loads(file.read(header_bytes))[key]["data_offsets"][0]


def _tokenize(path: Path, tokenizer: Tokenizer, settings: TokenSettings, cache: Path) -> None:
    pieces, offsets, prompt_lengths, lines, dropped = [], [0], [], [], 0
    end = [tokenizer.end_of_turn_id]
    if settings.append_end_of_text:
        if tokenizer.end_of_text_id is None:
            raise ValueError(f"{tokenizer.directory}: the tokenizer has no end-of-text token to append")
        end += tokenizer.encode("\n") + [tokenizer.end_of_text_id]
    stream = read_examples(path, settings.pairs)
    while examples := list(islice(stream, 256)):
        try:
            encoded = _encode(examples, tokenizer, settings)
        except ValueError:
            for example in examples:  # one by one, to tell which: text that is no UTF-8, a role the template refuses
                try:
                    _encode([example], tokenizer, settings)
                except ValueError as error:
                    raise ValueError(f"{path}, line {example.line}: {error}") from None
            raise
        for example, (prompt, *completions) in zip(examples, encoded):
            completions = [ids + end for ids in completions]
            if not prompt or min(map(len, completions)) == len(end):
                raise ValueError(f"{path}, line {example.line}: the prompt or a completion has no tokens")
            if settings.pairs and completions[0] == completions[1]:
                raise ValueError(f"{path}, line {example.line}: chosen and rejected have the same token ids")
            longest = max(map(len, completions))
            if (
                len(prompt) > settings.max_prompt
                or longest > settings.max_response
                or len(prompt) + longest > settings.max_total
            ):
                dropped += 1
                continue
            lines.append(example.line)
            for completion in completions:
                pieces.append(np.array(prompt + completion, dtype=np.int32))
                offsets.append(offsets[-1] + len(pieces[-1]))
                prompt_lengths.append(1 if settings.loss_on_prompt else len(prompt))
    ids = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
    tensors = {
        "ids": torch.from_numpy(ids),
        "offsets": torch.tensor(offsets),
        "prompt_lengths": torch.tensor(prompt_lengths, dtype=torch.int64),
        "lines": torch.tensor(lines, dtype=torch.int64),
    }
    digest = hashlib.sha256()
    for key, tensor in tensors.items():
        if key != "lines":
            digest.update(tensor.numpy().tobytes())
    metadata = {"dropped": str(dropped), "digest": digest.hexdigest()}
    metadata["sha256"] = _checksum(metadata, *(tensor.numpy() for tensor in tensors.values()))
    partial = cache.with_name(f"{cache.name}.partial-{os.getpid()}")
    try:
        save_file(tensors, partial, metadata=metadata)
        os.replace(partial, cache)
    except SafetensorError as error:  # the library's way to report a full disk
        raise OSError(f"cannot write {cache}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def _encode(examples: list[Example], tokenizer: Tokenizer, settings: TokenSettings) -> list[list[list[int]]]:
    """[prompt ids, completion ids, …] of each example, without the end of turn.

    A plain-text prompt is continued as it stands; a conversation goes through the chat template.
    """
    prompts = [
        example.prompt
        if isinstance(example.prompt, str)
        else tokenizer.render_prompt(example.prompt, settings.system_prompt)
        for example in examples
    ]
    columns = [tokenizer.encode_batch(prompts)]
    for texts in zip(*(example.completions for example in examples)):
        columns.append(tokenizer.encode_completions(list(texts), settings.prefill, prompts))
    return list(map(list, zip(*columns)))


def text_digest(text: str) -> str:
    """The first 16 hexadecimal digits of a text's SHA-256: enough to name a cache file by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def epoch_order(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the examples in an epoch: (examples,) int64, the same on every rank and after a resume."""
    return np.random.default_rng([seed, epoch]).permutation(examples)


def step_rows(examples: int, batch_size: int, seed: int, step: int) -> tuple[int, np.ndarray]:
    """(epoch, the example indices of optimiser step `step`). An epoch's last step may hold fewer."""
    steps_per_epoch = -(-examples // batch_size)
    epoch, index = divmod(step, steps_per_epoch)
    return epoch, epoch_order(examples, seed, epoch)[index * batch_size : (index + 1) * batch_size]


def partition(
    rows: np.ndarray, tokens: np.ndarray, costs: np.ndarray, ranks: int, max_tokens: int
) -> list[list[list[int]]]:
    """Spread a step's examples over ranks and micro-batches: result[micro][rank] is a list of rows.

    Costs come out even between the ranks of a micro-batch. A micro-batch holds at most max_tokens, unless a
    single example is longer; the number of micro-batches is the smallest for which that works out, and the
    same on all ranks (a rank may get an empty list).

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
            # Neighbours in cost run side by side; the heaviest first, so that a lack of memory shows at once.
            heaviest = np.argsort(-load, kind="stable")
            return [[members[b] for b in heaviest[m * ranks : (m + 1) * ranks]] for m in range(micro_batches)]
        micro_batches += 1


@dataclass
class MicroBatch:
    """Packed sequences: T tokens in N sequences of B examples, all chosen first, then all rejected.

    An example of weight 0 is there only so that its rank takes part in the collectives.
    """

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (N + 1,) int32
    max_seqlen: int
    labels: torch.Tensor  # (T,) int64, -100 where there is nothing to predict
    label_positions: torch.Tensor  # (M,) int64, where labels != -100: known here, so no GPU waits for it
    rows: torch.Tensor  # (B,) int64, example indices
    weight: float

    def model_inputs(self) -> tuple:
        """The arguments of CausalLM.forward."""
        return (
            self.input_ids, self.position_ids, self.cu_seqlens, self.max_seqlen, self.labels, self.label_positions,
        )

    def to(self, device: torch.device) -> "MicroBatch":
        if device.type == "cpu":
            return self
        moved = {
            key: value.pin_memory().to(device, non_blocking=True)
            for key, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return MicroBatch(max_seqlen=self.max_seqlen, weight=self.weight, **moved)


def pack(dataset: Dataset, rows: list[int]) -> MicroBatch:
    """Concatenate the sequences of some examples, with labels shifted once and for all.

    An empty list packs the shortest example with weight 0.
    """
    weight = 1.0
    if not rows:
        rows, weight = [int(dataset.input_lengths.sum(1).argmin())], 0.0
    k = dataset.sequences_per_example
    sequences = [row * k + j for j in range(k) for row in rows]
    inputs, labels = [], []
    for s in sequences:
        ids = np.asarray(dataset.ids[dataset.offsets[s] : dataset.offsets[s + 1]], dtype=np.int64)
        inputs.append(ids[:-1])
        labels.append(ids[1:].copy())
        labels[-1][: dataset.prompt_lengths[s] - 1] = IGNORE_INDEX
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
