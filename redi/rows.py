"""A line of positives or pairs, in any form that TRL reads -> token ids of its prompt and completions. No torch."""

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path

from redi.cli import positive_int
from redi.files import error_context, read_jsonl
from redi.tokenizer import PREFILL, REASONING_KEYS, Tokenizer

# Keys that change what a trainer makes of a row, and that are not supported here.
ROW_KEYS = ("tools", "functions", "documents", "chat_template_kwargs", "system", "image", "images", "video", "videos",
            "audio", "audios", "input_ids", "completion_mask", "assistant_masks", *REASONING_KEYS)


@dataclass(frozen=True)
class TokenSettings:
    """Everything besides file and tokenizer that decides the token ids. Limits are in tokens."""

    pairs: bool
    max_prompt: int  # longer prompts are dropped, never truncated
    max_response: int  # the end of turn included, as in |y|
    max_total: int
    prefill: str = PREFILL
    system_prompt: str | None = None
    append_end_of_text: bool = False  # official: `\n<|endoftext|>` after the end of turn, counted in |y|
    loss_on_prompt: bool = False  # official stage 1

    def fit(self, prompt: list[int], *completions: list[int]) -> bool:
        """Whether an example, as token ids, is within the limits."""
        longest = max(map(len, completions))
        within = len(prompt) <= self.max_prompt and longest <= self.max_response
        return within and len(prompt) + longest <= self.max_total


def add_token_flags(add: Callable) -> None:
    """Add the flags that TokenSettings is made from; `add` is the add_argument of a parser."""
    add("--max-prompt-tokens", type=positive_int, default=800, help="pairs with a longer prompt are dropped")
    add("--max-response-tokens", type=positive_int, default=19000, help="pairs with a longer response are dropped")
    add("--max-tokens", type=positive_int, default=32768, help="longer sequences, prompt included, are dropped")
    add("--prefill", type=lambda text: text.replace(r"\n", "\n"), default=PREFILL.replace("\n", r"\n"),
        help=r"forced start of responses in evaluation; \n: newline")
    add("--system-prompt", help="system message (default: the chat template's)")
    add("--append-end-of-text", action="store_true", help=r"end responses with \n<|endoftext|>, as the official code")


def token_settings(args: argparse.Namespace, pairs: bool, context: int) -> TokenSettings:
    """The settings from the flags above; the limits of prompt and response apply to pairs. context: the model's."""
    prompt, response = (args.max_prompt_tokens, args.max_response_tokens) if pairs else (args.max_tokens,) * 2
    return TokenSettings(pairs, prompt, response, min(context, args.max_tokens), prefill=args.prefill,
                         system_prompt=args.system_prompt, append_end_of_text=args.append_end_of_text,
                         loss_on_prompt=getattr(args, "loss_on_prompt", False))


@dataclass
class Example:
    """One row: the prompt (messages, or plain text to be continued) and its completions.

    completions: one text for SFT, (chosen, rejected) for pairs; or, where an assistant's message has keys besides role
    and content, the message.
    """

    line: int
    prompt: list[dict] | str
    completions: tuple[str | dict, ...]


def encode_rows(path: Path, tokenizer: Tokenizer, settings: TokenSettings) -> Iterator[tuple[int, list[list[int]]]]:
    """(line, [prompt ids, completion ids, …]) of every row. Raises ValueError naming file and line."""
    stream = read_examples(path, settings.pairs)
    while examples := list(islice(stream, 256)):
        try:
            encoded = encode(examples, tokenizer, settings)
        except ValueError:
            for example in examples:  # one at a time, to find the line
                with error_context(f"{path}, line {example.line}"):
                    encode([example], tokenizer, settings)
            raise
        yield from zip((example.line for example in examples), encoded)


def encode(examples: list[Example], tokenizer: Tokenizer, settings: TokenSettings) -> list[list[list[int]]]:
    """[prompt ids, completion ids, …] of each example; a completion ends with the end of turn.

    A plain-text prompt is continued unchanged; a conversation goes through the chat template. Raises ValueError for
    text that UTF-8 cannot hold, messages that the template refuses, and an empty prompt or completion.
    """
    end = [tokenizer.end_of_turn_id]
    if settings.append_end_of_text:
        if tokenizer.end_of_text_id is None:
            raise ValueError(f"{tokenizer.directory}: the tokenizer has no end-of-text token to append")
        end += tokenizer.encode("\n") + [tokenizer.end_of_text_id]
    system = settings.system_prompt
    prompts = [prompt if isinstance(prompt, str) else tokenizer.render_prompt(prompt, system)
               for prompt in (example.prompt for example in examples)]
    columns = [tokenizer.encode_batch(prompts)]
    for completions in zip(*(example.completions for example in examples)):
        texts = [text if isinstance(text, str) else tokenizer.render_response(example.prompt, text, system)
                 for example, text in zip(examples, completions)]
        columns.append(tokenizer.encode_completions(texts, settings.prefill, prompts))
    if not all(ids for column in columns for ids in column):
        raise ValueError("the prompt or a completion has no tokens")
    rows = [[prompt, *(ids + end for ids in completions)] for prompt, *completions in zip(*columns)]
    if settings.pairs and any(chosen == rejected for _, chosen, rejected in rows):
        raise ValueError("chosen and rejected have the same token ids")
    return rows


def read_examples(path: str | Path, pairs: bool) -> Iterator[Example]:
    """Read positives (pairs=False) or pairs in any of TRL's forms. Keys whose value is null count as absent.

    Message lists or plain strings; for pairs an explicit prompt or an implicit one, the common start of chosen and
    rejected; for SFT prompt and completion, or `messages` that end with the assistant.
    Raises ValueError naming file, line and key.
    """
    for line, row in read_jsonl(path):
        with error_context(f"{path}, line {line}"):
            row = _without_nulls(row)
            if unused := [key for key in ROW_KEYS if row.get(key)]:
                raise ValueError(f"the key {unused[0]!r} is not supported: it would not be trained on")
            prompt, completions = _pair(row) if pairs else _positive(row)
            for completion in completions:
                if not (completion if isinstance(completion, str) else completion["content"]).strip():
                    raise ValueError("a completion is empty")
            if pairs and completions[0] == completions[1]:
                raise ValueError("chosen and rejected are identical")
        yield Example(line, prompt, completions)


def _without_nulls(value):
    """JSON data without the keys whose value is null, which `datasets` writes for absent ones."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _positive(row: dict) -> tuple[list[dict] | str, tuple[str | dict]]:
    if row.get("label", 1) != 1:  # true equals 1
        raise ValueError(f"'label' is {row['label']!r}, but every completion of this file is trained on as correct")
    if "messages" in row:
        *prompt, answer = _messages(row, "messages")
        if not prompt:
            raise ValueError("'messages' has no prompt before the answer")
        if row.get("completion", answer["content"]) not in (answer["content"], [answer]):
            raise ValueError("'messages' and 'completion' end with different answers")
        return prompt, (_answer([answer], "messages"),)
    completion, prompt = _field(row, "completion"), _field(row, "prompt")
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, (completion,)
    return _as_messages(row, "prompt"), (_answer(_messages(row, "completion"), "completion"),)


def _pair(row: dict) -> tuple[list[dict] | str, tuple[str | dict, str | dict]]:
    chosen, rejected = _field(row, "chosen"), _field(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        prompt = row["prompt"] if "prompt" in row else os.path.commonprefix([chosen, rejected])
        if not isinstance(prompt, str):
            raise ValueError("'prompt' is a list of messages but 'chosen' and 'rejected' are strings")
        if "prompt" in row:
            return prompt, (chosen, rejected)
        prompt = prompt.removesuffix(" ")  # a word break belongs to the completions, as with an explicit prompt
        if not prompt:
            raise ValueError("no key 'prompt', and 'chosen' and 'rejected' have no common start")
        return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])
    chosen, rejected = _messages(row, "chosen"), _messages(row, "rejected")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1]))
    prompt = [message for message, _ in shared]
    completions = chosen[len(prompt) :], rejected[len(prompt) :]
    if not prompt or isinstance(row.get("prompt"), list):
        stated = _as_messages(row, "prompt")
        if prompt[: len(stated)] != stated:  # else the conversations only repeat the prompt beside them
            prompt = stated + prompt
    return prompt, (_answer(completions[0], "chosen"), _answer(completions[1], "rejected"))


def _field(row: dict, key: str):
    if key not in row:
        kind = ""
        if key == "completion" and "chosen" in row:
            kind = ": a pair, where a row of one completion is expected"
        elif key == "chosen" and "completion" in row:
            kind = ": a row of one completion, where a pair is expected"
        raise ValueError(f"no key {key!r} (found {', '.join(sorted(row)) or 'none'}){kind}")
    return row[key]


def _as_messages(row: dict, key: str) -> list[dict]:
    value = _field(row, key)
    return [{"role": "user", "content": value}] if isinstance(value, str) else _messages(row, key)


def _messages(row: dict, key: str) -> list[dict]:
    messages = _field(row, key)
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{key!r} must be a non-empty list of messages or a string")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise ValueError(f"{key!r} has a message without the strings 'role' and 'content'")
    return messages


def _answer(messages: list[dict], key: str) -> str | dict:
    """The content of the one assistant's message; the message where it has other keys."""
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise ValueError(f"{key!r} must end with exactly one assistant message after the prompt")
    [message] = messages
    unused = [name for name in ("tool_calls", "function_call") if message.get(name)]
    if message.get("weight", 1) != 1:
        unused.append("weight")
    if unused:
        raise ValueError(f"{key!r}: the key {unused[0]!r} of the assistant's message is not supported")
    return message["content"] if message.keys() == {"role", "content"} else message
