"""Text to token ids and back: `tokenizer.json`, chat templates, prompts with a forced start of the answer.

A prompt and its completion are encoded apart, and a forced prefill apart from what follows it. So the ids
that a model is trained on are those it sees when it is evaluated, whatever a tokenizer would like to merge.
"""

import datetime
import json
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from redi.files import error_context, read_json, resolve_directory

# Evaluation makes every response begin with this; those trained on begin with it too.
PREFILL = "<think>\n"
# What a tokenizer is made of: all that decides ids and stop ids, but for the eos ids in the model's config.json.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_QUESTION, _ANSWER = {"role": "user", "content": "question"}, {"role": "assistant", "content": "sentinel"}


class ChatTemplate:
    """The source of a chat template, with the special tokens that it may name ({"eos_token": "</s>"})."""

    def __init__(self, source: str, special_tokens: dict[str, str]):
        self.source, self.special_tokens = source, special_tokens
        self._template = _environment().from_string(source)

    def render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        """The conversation as text. Raises ValueError where the template refuses the messages."""
        try:
            return self._template.render(messages=messages, tools=None, documents=None,
                                         add_generation_prompt=add_generation_prompt, **self.special_tokens)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from None


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks an assistant's text for trainers: its content."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _environment() -> jinja2.Environment:
    """A sandbox with what templates are written for, the environment of transformers."""

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment


class Tokenizer:
    """What stands in a model directory's tokenizer.json, tokenizer_config.json and chat_template.jinja.

    directory: Path; chat_template: str (ChatML where the directory has none)
    vocab_size: the highest token id + 1; added_ids: the tokens beside the vocabulary proper, special or not
    end_of_turn_id: the special token that the chat template puts after an assistant's message
    end_of_text_id: the other token that ends a text, or None; stop_ids: every id at which sampling must stop
    """

    def __init__(self, directory: Path, tokenizer: tokenizers.Tokenizer, template: ChatTemplate, eos_ids: list[int]):
        """`eos_ids`: ids that the model's own files say end a text, in their order."""
        self.directory, self.chat_template = Path(directory), template.source
        self._template, self._tokenizer = template, tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        conversation = self._render([_QUESTION, _ANSWER], add_generation_prompt=False)
        _, answer, turn_end = conversation.rpartition(_ANSWER["content"])
        added = tokenizer.get_added_tokens_decoder()
        self.added_ids, special_ids = set(added), {id for id, token in added.items() if token.special}
        named = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")]
        eos_ids = [id for id in (*eos_ids, *named) if id is not None]
        turn_end_ids = [id for id in self.encode(turn_end) if answer and id in special_ids]
        if not turn_end_ids and not eos_ids:
            raise ValueError(f"{self.directory}: neither the chat template nor tokenizer_config.json "
                             "(eos_token) names a special token that ends an answer")
        self.end_of_turn_id = (turn_end_ids or eos_ids)[0]
        self.end_of_text_id = next((id for id in eos_ids if id != self.end_of_turn_id), None)
        self.stop_ids = list(dict.fromkeys([self.end_of_turn_id, *eos_ids]))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "Tokenizer":
        """Reads a model directory, or a repository on the hub. Raises ValueError naming the file."""
        directory = resolve_directory(path_or_hub_id, [*TOKENIZER_FILES, "config.json"])
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
        special_tokens = {}
        for name, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                special_tokens[name] = token
        eos_ids = []
        if "eos_token" in special_tokens:
            eos_ids.append(tokenizer.token_to_id(special_tokens["eos_token"]))
            if eos_ids[0] is None:
                raise ValueError(f"{config_path}: eos_token {special_tokens['eos_token']!r} is not in tokenizer.json")
        for name in ("generation_config.json", "config.json"):
            ids = read_json(directory / name).get("eos_token_id") if (directory / name).is_file() else None
            ids = ids if isinstance(ids, list) else [ids]
            eos_ids += [id for id in ids if type(id) is int and 0 <= id < 2**32 and tokenizer.id_to_token(id)]
        with error_context(str(directory)):
            template = _read_template(directory, config, special_tokens)
        return cls(directory, tokenizer, template, eos_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text: no special token is added, those written in the text are parsed.
        Raises ValueError for text that UTF-8 cannot hold."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores unless TOKENIZERS_PARALLELISM=false."""
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError):  # which of the two depends on the version of tokenizers
            bad = next((text for text in texts if not _is_text(text)), None)
            raise ValueError(f"cannot encode {str(bad)[:80]!r}: not a string that UTF-8 can hold") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_prompt(self, messages: list[dict], system_prompt: str | None = None) -> str:
        """The conversation as text, up to where the assistant begins to answer. `system_prompt` takes the
        place of the system message; None leaves the messages, or the template's default, as they are.
        Raises ValueError when the template refuses the messages."""
        if system_prompt is not None:
            rest = messages[1:] if messages and messages[0].get("role") == "system" else messages
            messages = [{"role": "system", "content": system_prompt}, *rest]
        return self._render(messages, add_generation_prompt=True)

    def encode_prompt(self, messages: list[dict], system_prompt: str | None = None, prefill: str = "") -> list[int]:
        """Ids of the rendered prompt, then of the `prefill` that the answer is made to begin with, unless the
        template has put it there already."""
        prompt_text = self.render_prompt(messages, system_prompt)
        if prefill and prompt_text.endswith(prefill):
            prefill = ""
        return self.encode(prompt_text) + self.encode(prefill)

    def encode_completions(self, texts: list[str], prefill: str, prompt_texts: list[str]) -> list[list[int]]:
        """Ids of an assistant's texts, each after its rendered prompt, without the end of turn. A text that begins
        with `prefill` is encoded in two parts, so that encode_prompt(…, prefill) and what is sampled after it are
        the ids trained on. Where the prompt ends with the prefill, it is left out."""
        starts, rests = [], []
        for text, prompt_text in zip(texts, prompt_texts, strict=True):
            has_prefill = prefill != "" and text.startswith(prefill)
            starts.append(has_prefill and not prompt_text.endswith(prefill))
            rests.append(text[len(prefill) :] if has_prefill else text)
        prefill_ids = self.encode(prefill)
        return [prefill_ids * start + ids for start, ids in zip(starts, self.encode_batch(rests))]

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        with error_context(str(self.directory)):
            return self._template.render(messages, add_generation_prompt)


def _read_template(directory: Path, config: dict, special_tokens: dict[str, str]) -> ChatTemplate:
    source = config.get("chat_template")
    if isinstance(source, list):  # several named templates
        source = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}.get("default")
    path = directory / "chat_template.jinja"
    if path.is_file():  # as in transformers, the file goes before the key
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path.name}: not UTF-8 ({error.reason} at byte {error.start})") from None
    if source is None:
        return ChatTemplate(CHATML_TEMPLATE, special_tokens)
    if not isinstance(source, str):
        raise ValueError(f"tokenizer_config.json's chat_template must be a string, found {type(source).__name__}")
    return ChatTemplate(source, special_tokens)


def _is_text(value) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)
