"""Text to token ids and back: `tokenizer.json`, chat templates, prompts with a forced start of the response.

A prompt and its completion are encoded separately, and a forced prefill separately from what follows it. The ids that a
model is trained on are therefore those that it sees in evaluation, whatever the tokenizer would merge.
"""

import contextlib
import datetime
import json
import os
import re
from pathlib import Path

import tokenizers
from jinja2 import TemplateError, ext, sandbox

from redi.files import read_json, resolve_directory

# Evaluation forces every response to begin with this; responses in training data begin with it too.
PREFILL = "<think>\n"
# The files that decide ids and stop ids, besides the eos ids in the model's config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message, in transformers' order of preference

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

_THOUGHT_AT_END = re.compile(r"<think>\s*(</think>\s*)?\Z")
_QUESTION, _ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "sentinel"}


class _GenerationBlock(ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks an assistant's text for trainers: its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _environment() -> sandbox.SandboxedEnvironment:
    """The sandbox that transformers gives chat templates."""

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


class Tokenizer:
    """The tokenizer of a model directory: tokenizer.json, tokenizer_config.json and the chat template.

    directory: Path; vocab_size: the highest token id + 1
    chat_template: its source; None where the directory has none and the vocabulary lacks the tokens of ChatML
    end_of_turn_id: the token that the chat template puts after an assistant's message
    end_of_text_id: the other token that ends a text, or None; stop_ids: every id at which sampling must stop
    notices: sentences for the user about what was assumed
    """

    def __init__(self, directory: Path, tokenizer, template: str | None, special_tokens: dict, eos_ids: list[int]):
        """tokenizer: of the tokenizers library. template: the directory's own. special_tokens: those that a template
        may name ({"eos_token": "</s>"}). eos_ids: ids that the model's files say end a text, in their order."""
        self.directory, self._tokenizer = Path(directory), tokenizer
        self.special_tokens, self.notices = special_tokens, []
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.has_own_template = bool(template)
        self.chat_template = template or None
        if not template and all(self.encode(token) == [tokenizer.token_to_id(token)] for token in CHATML_TOKENS):
            self.chat_template = CHATML_TEMPLATE
            self.notices.append(f"{directory} has no chat template: using ChatML, which is saved with the model")
        with _template_errors(directory):
            self._template = self.chat_template and _environment().from_string(self.chat_template)

        conversation = self._render([_QUESTION, _ANSWER], None) if self._template else ""
        _, answer, turn_end = conversation.rpartition(_ANSWER["content"])
        self._turn_end = turn_end if answer else ""
        named = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")]
        eos_ids = [id for id in (*eos_ids, *named) if id is not None]
        added = tokenizer.get_added_tokens_decoder()  # special or not; runs of blanks may be among them
        turn_end_ids = [id for id in self.encode(self._turn_end) if id in added and added[id].content.strip()]
        if not turn_end_ids and len(single := self.encode(self._turn_end.strip())) == 1:
            turn_end_ids = single
        if not turn_end_ids and not eos_ids:
            raise ValueError(f"{directory}: neither the chat template nor tokenizer_config.json (eos_token) names a "
                             "token that ends an answer")
        self.end_of_turn_id = (turn_end_ids or eos_ids)[0]
        if self._turn_end.strip() and not turn_end_ids:
            self.notices.append(f"{directory}: {self._turn_end!r}, which ends an answer in the chat template, is not "
                                f"one token: answers end with {tokenizer.id_to_token(self.end_of_turn_id)!r}")
        self.end_of_text_id = next((id for id in eos_ids if id != self.end_of_turn_id), None)
        self.stop_ids = list(dict.fromkeys([self.end_of_turn_id, *eos_ids]))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "Tokenizer":
        """Reads a model directory, or a repository on the hub. Raises ValueError naming the file."""
        directory = resolve_directory(path_or_hub_id, [*TOKENIZER_FILES, "config.json", "additional_chat_templates/*"])
        path, config_path = directory / "tokenizer.json", directory / "tokenizer_config.json"
        if not path.is_file():
            raise ValueError(f"{directory}: no tokenizer.json in this directory")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{path}: not a tokenizer ({error})") from None
        if not tokenizer.get_vocab_size():
            raise ValueError(f"{path}: the vocabulary is empty")

        config = read_json(config_path) if config_path.is_file() else {}
        tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in config.items()}
        tokens = {name: token for name, token in tokens.items() if name.endswith("_token") and isinstance(token, str)}
        eos_ids = []
        if "eos_token" in tokens:
            eos_ids.append(tokenizer.token_to_id(tokens["eos_token"]))
            if eos_ids[0] is None:
                raise ValueError(f"{config_path}: eos_token {tokens['eos_token']!r} is not in tokenizer.json")
        for name in ("generation_config.json", "config.json"):
            ids = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
            ids = ids if isinstance(ids, list) else [ids]
            eos_ids += [id for id in ids if type(id) is int and 0 <= id < 2**32 and tokenizer.id_to_token(id)]
        return cls(directory, tokenizer, _read_template(directory, config), tokens, eos_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Special tokens written in the text are parsed; none is added. Raises ValueError for
        text that UTF-8 cannot hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores unless TOKENIZERS_PARALLELISM=false."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # which of the two depends on the version of tokenizers
            raise ValueError("a text is not a string that UTF-8 can hold (half of a surrogate pair)") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_prompt(self, messages: list[dict], system_prompt: str | None = None) -> str:
        """The conversation as text, up to where the assistant begins to answer. `system_prompt` replaces the system
        message; None leaves the messages, or the template's default, as they are. Raises ValueError when the template
        refuses the messages."""
        return self._render(messages, system_prompt, add_generation_prompt=True)

    def render_response(self, messages: list[dict], message: dict, system_prompt: str | None = None) -> str:
        """The text of an assistant's message that has more than role and content, after render_prompt(messages).

        Reasoning is placed where the chat template places it, otherwise between <think> and </think> before the
        content. Raises ValueError naming any other key that changes what the template renders.
        """
        plain = {"role": message["role"], "content": message["content"]}

        def rendered(**keys) -> str:
            return self._render([*messages, {**plain, **keys}], system_prompt)

        for key in message.keys() - plain.keys() - set(REASONING_KEYS):
            if rendered(**{key: message[key]}) != rendered():
                raise ValueError(f"{key!r} of the assistant's message, which the chat template uses, is not supported")
        content, reasoning = message["content"], _reasoning(message)
        if "</think>" in content and reasoning.strip() not in content:
            raise ValueError("the thought in 'content' is not the one under the message's reasoning key")
        if "</think>" in content or not reasoning.strip():
            return content
        text = rendered(reasoning_content=reasoning)
        if text == rendered():
            return PREFILL + reasoning.strip("\n") + "\n</think>\n\n" + content
        prompt_text = _THOUGHT_AT_END.sub("", self.render_prompt(messages, system_prompt))
        if not text.startswith(prompt_text) or not text.endswith(self._turn_end):
            raise ValueError("the chat template renders the message's reasoning key, but does not continue its prompt")
        return text[len(prompt_text) :].removesuffix(self._turn_end)

    def encode_prompt(self, messages: list[dict], system_prompt: str | None = None, prefill: str = "") -> list[int]:
        """Ids of the rendered prompt, then of the `prefill` that the response is forced to begin with, without what
        the prompt ends with already. Raises ValueError for a prefill that opens a thought behind an empty one."""
        prompt_text = self.render_prompt(messages, system_prompt)
        return self.encode(prompt_text) + self.encode(_continuation(prompt_text, prefill, prefill))

    def encode_completions(self, texts: list[str], prefill: str, prompt_texts: list[str]) -> list[list[int]]:
        """Ids of an assistant's texts, each after its rendered prompt, without the end of turn. A text that begins
        with `prefill` is encoded in two parts, so that encode_prompt(…, prefill) and what is sampled after it are
        the ids trained on. What the prompt ends with already is left out. Raises ValueError as encode_prompt does."""
        starts, rests = [], []
        for text, prompt_text in zip(texts, prompt_texts, strict=True):
            starts.append(_continuation(prompt_text, prefill, prefill) if text.startswith(prefill) else "")
            rests.append(_continuation(prompt_text, text, prefill)[len(starts[-1]) :])
        start_ids = {start: self.encode(start) for start in set(starts)}
        return [start_ids[start] + ids for start, ids in zip(starts, self.encode_batch(rests))]

    def _render(self, messages: list[dict], system_prompt: str | None, add_generation_prompt: bool = False) -> str:
        if self._template is None:
            raise ValueError(f"{self.directory}: no chat template, and the vocabulary lacks the tokens of ChatML, "
                             f"{' and '.join(CHATML_TOKENS)}: add a chat_template.jinja")
        if system_prompt is not None:
            rest = messages[1:] if messages and messages[0].get("role") == "system" else messages
            messages = [{"role": "system", "content": system_prompt}, *rest]
        messages = list(map(_with_reasoning_aliases, messages))
        with _template_errors(self.directory):
            return self._template.render(messages=messages, tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **self.special_tokens)


def _with_reasoning_aliases(message: dict) -> dict:
    """As transformers: reasoning under the names that chat templates read, whichever of them the data uses."""
    reasoning = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _reasoning(message: dict) -> str:
    """The text under one of REASONING_KEYS, or "". Raises ValueError where it is no text, or there are two."""
    found = {key: message[key] for key in REASONING_KEYS if message.get(key)}
    if len(set(map(str, found.values()))) > 1 or not all(isinstance(text, str) for text in found.values()):
        raise ValueError(f"a message's {' and '.join(map(repr, found))} must be one text")
    return next(iter(found.values()), "")


def _continuation(prompt_text: str, text: str, prefill: str) -> str:
    """`text` as it continues the prompt: without the start of a thought (<think>, or the first word of `prefill`), and
    the blanks behind it, that the prompt ends with already."""
    if prefill and prompt_text.endswith(prefill) and text.startswith(prefill):
        return text[len(prefill) :]
    before, after = prompt_text.rstrip(), text.lstrip()
    for tag in ("<think>", *prefill.split()[:1]):
        if before.endswith(tag) and after.startswith(tag):
            blanks, rest = prompt_text[len(before) :], after[len(tag) :]
            return rest[len(os.path.commonprefix([blanks, rest])) :]
    if after.startswith("<think>") and before.endswith("</think>") and _THOUGHT_AT_END.search(prompt_text):
        raise ValueError(f"the chat template ends the prompt with an empty thought, and {text[:20]!r} opens another: "
                         "--prefill '' is for responses without a thought; for others, change the chat template")
    return text


@contextlib.contextmanager
def _template_errors(directory: Path):
    try:
        yield
    except (TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{directory}: the chat template fails: {' '.join(str(error).split())[:300]}") from None


def _read_template(directory: Path, config: dict) -> str | None:
    """chat_template.jinja, or else the key in tokenizer_config.json, as in transformers; None where there is neither.
    Raises ValueError naming the file, also for named templates without a default."""
    path, config_path = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None
    source, named = config.get("chat_template"), directory / "additional_chat_templates"
    if isinstance(source, list):
        source = {template.get("name"): template.get("template") for template in source if isinstance(template, dict)}
    if source is None and named.is_dir():
        source, config_path = {path.stem: None for path in sorted(named.glob("*.jinja"))}, named
    if isinstance(source, dict):
        if not isinstance(source.get("default"), str):
            names = ", ".join(map(repr, source)) or "none"
            raise ValueError(f"{config_path}: named chat templates ({names}), of which none is 'default'")
        source = source["default"]
    if not isinstance(source, str | None):
        raise ValueError(f"{config_path}: chat_template must be a string, found {type(source).__name__}")
    return source
