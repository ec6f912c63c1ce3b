"""Text to token ids and back: `tokenizer.json`, chat templates, prompts with a forced start of the answer.

A prompt and its completion are encoded apart, and a forced prefill apart from what follows it. So the ids
that a model is trained on are those it sees when it is evaluated, whatever a tokenizer would like to merge.
"""
import datetime
import json
import subprocess
import sys
from pathlib import Path

import jinja2
import jinja2.ext
import jinja2.sandbox

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What a problem is wrapped in before it becomes the user's message, in training data and in evaluation alike.
# "open-r1" is the evaluation template of open-r1 and lighteval (paper, Appendix C.5; MATH_QUERY_TEMPLATE in
# openr1/src/open_r1/evaluate.py of the official code), both spaces after "clearly." included.
PROMPT_TEMPLATES = {
    "none": "{problem}",
    "open-r1": (
        "Solve the following math problem efficiently and clearly.  The last line of your response should be "
        "of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' "
        "(without quotes) where ANSWER is just the final number or expression that solves the problem. Think "
        "step by step before answering.\n\n{problem}"
    ),
}

TOKENIZER_FILES = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json",
                   "config.json"]
SENTINEL = "sentinel"
TEMPLATE_SECONDS, TEMPLATE_BYTES, TEMPLATE_CHARACTERS = 5, 1 << 30, 1 << 20


def user_message(problem: str, prompt_template: str = "none") -> dict:
    """The user's message for a problem. `prompt_template` is a key of PROMPT_TEMPLATES."""
    return {"role": "user", "content": PROMPT_TEMPLATES[prompt_template].replace("{problem}", problem)}


def resolve_directory(path_or_hub_id: str | Path, patterns: list[str], repo_type: str = "model") -> Path:
    """A local directory as it is; otherwise a Hugging Face hub id, of which the files that match `patterns`
    (globs) are downloaded into the hub's cache.

    Raises ValueError when there is no such directory, and no such repository or no way to the hub.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path}: expected a directory, found a file")
    from huggingface_hub import snapshot_download  # takes 0.2 s to import: only where a hub id is given

    try:
        return Path(snapshot_download(str(path_or_hub_id), repo_type=repo_type, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # every error of huggingface_hub is one of the two
        reason = " ".join(str(error).split())
        raise ValueError(f"{path_or_hub_id}: no such directory, and the Hugging Face hub gave no {repo_type} "
                         f"of that name ({type(error).__name__}: {reason[:300]})") from None


class Tokenizer:
    """What stands in a model directory's tokenizer.json, tokenizer_config.json and chat_template.jinja.

    directory: Path; chat_template: str (ChatML where the directory has none)
    vocab_size: the highest token id + 1
    end_of_turn_id: the special token that the chat template puts after an assistant's message
    end_of_text_id: the other token that ends a text, or None; stop_ids: every id at which sampling must stop
    """

    def __init__(self, directory: Path, tokenizer, chat_template: str | None, special_tokens: dict[str, str],
                 eos_ids: list[int]):
        """`tokenizer`: tokenizers.Tokenizer; `special_tokens`: what a template may use ("eos_token": "</s>");
        `eos_ids`: ids that the model's own files say end a text, in their order."""
        self.directory = Path(directory)
        self.chat_template = CHATML_TEMPLATE if chat_template is None else chat_template
        self._special_tokens = special_tokens
        self._tokenizer = tokenizer
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1

        request = {"template": self.chat_template, "special_tokens": special_tokens}
        if chat_template is not None:
            _try_template_in_child(request, self.directory)
        self._template = _compile_template(self.chat_template)
        conversation = self._render(_SENTINEL_CONVERSATION, add_generation_prompt=False)
        _, answer, turn_end = conversation.rpartition(SENTINEL)
        special_ids = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        named = [tokenizer.token_to_id(t) for t in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")]
        eos_ids = [id for id in (*eos_ids, *named) if id is not None]
        turn_end_ids = self.encode(turn_end) if answer else []
        self.end_of_turn_id = next((id for id in turn_end_ids if id in special_ids), None)
        if self.end_of_turn_id is None:
            if not eos_ids:
                raise ValueError(f"{self.directory}: neither the chat template nor tokenizer_config.json "
                                 "(eos_token) names a special token that ends an answer")
            self.end_of_turn_id = eos_ids[0]
        self.end_of_text_id = next((id for id in eos_ids if id != self.end_of_turn_id), None)
        self.stop_ids = list(dict.fromkeys([self.end_of_turn_id, *eos_ids]))

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path) -> "Tokenizer":
        """Reads a model directory, or a repository on the hub. Raises ValueError naming the file."""
        from tokenizers import Tokenizer as FastTokenizer  # here: the template's child has no use for it

        directory = resolve_directory(path_or_hub_id, TOKENIZER_FILES)
        if not (directory / "tokenizer.json").is_file():
            raise ValueError(f"{directory}: no tokenizer.json in this directory")
        try:
            tokenizer = FastTokenizer.from_file(str(directory / "tokenizer.json"))
        except Exception as error:  # tokenizers raises no narrower class
            raise ValueError(f"{directory / 'tokenizer.json'}: not a tokenizer ({error})") from None
        if not tokenizer.get_vocab_size():
            raise ValueError(f"{directory / 'tokenizer.json'}: the vocabulary is empty")
        config = _read_json_object(directory / "tokenizer_config.json")

        special_tokens = {}
        for name, token in config.items():
            token = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(token, str):
                special_tokens[name] = token
        eos_ids = []
        if "eos_token" in special_tokens:
            eos_ids.append(tokenizer.token_to_id(special_tokens["eos_token"]))
            if eos_ids[0] is None:
                raise ValueError(f"{directory / 'tokenizer_config.json'}: eos_token "
                                 f"{special_tokens['eos_token']!r} is not in tokenizer.json")
        for name in ("generation_config.json", "config.json"):
            ids = _read_json_object(directory / name).get("eos_token_id")
            ids = ids if isinstance(ids, list) else [ids]
            eos_ids += [id for id in ids if type(id) is int and 0 <= id < 2**32 and tokenizer.id_to_token(id)]

        template = config.get("chat_template")
        if isinstance(template, list):  # several named templates
            named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
            template = named.get("default")
        if (directory / "chat_template.jinja").is_file():  # as in transformers, the file goes before the key
            template = _read_text(directory / "chat_template.jinja")
        if template is not None and not isinstance(template, str):
            raise ValueError(f"{directory / 'tokenizer_config.json'}: chat_template must be a string, found "
                             f"{type(template).__name__}")
        return cls(directory, tokenizer, template, special_tokens, eos_ids)

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

    def encode_prompt(self, messages: list[dict], system_prompt: str | None = None,
                      prefill: str = "") -> list[int]:
        """Ids of the rendered prompt, then of the `prefill` that the answer is made to begin with, unless the
        template has put it there already."""
        prompt_text = self.render_prompt(messages, system_prompt)
        if prefill and prompt_text.endswith(prefill):
            prefill = ""
        return self.encode(prompt_text) + self.encode(prefill)

    def encode_completion(self, text: str, prefill: str = "<think>\n", prompt_text: str = "") -> list[int]:
        """Ids of an assistant's text after the rendered prompt `prompt_text`, without the end of turn. A text
        that begins with `prefill` is encoded in two parts, so that encode_prompt(…, prefill) and what is
        sampled after it are the ids trained on. Where the prompt ends with the prefill, it is left out."""
        return self.encode_completions([text], prefill, [prompt_text])[0]

    def encode_completions(self, texts: list[str], prefill: str, prompt_texts: list[str]) -> list[list[int]]:
        """`encode_completion` for many texts."""
        starts, rests = [], []
        for text, prompt_text in zip(texts, prompt_texts, strict=True):
            has_prefill = prefill != "" and text.startswith(prefill)
            starts.append(has_prefill and not prompt_text.endswith(prefill))
            rests.append(text[len(prefill):] if has_prefill else text)
        prefill_ids = self.encode(prefill)
        return [prefill_ids * start + ids for start, ids in zip(starts, self.encode_batch(rests))]

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        try:
            return _render_template(self._template, messages, self._special_tokens, add_generation_prompt)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.directory}: the chat template refuses these messages: {error}") from None


_SENTINEL_CONVERSATION = [{"role": "user", "content": "question"}, {"role": "assistant", "content": SENTINEL}]


class _GenerationBlock(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}, which marks an assistant's text for trainers: its content."""
    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(["name:endgeneration"], drop_needle=True)


def _compile_template(source: str) -> jinja2.Template:
    """A chat template in a sandbox with what templates are written for, the environment of transformers."""
    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, **options):  # jinja2's own escapes HTML
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment.from_string(source)


def _render_template(template: jinja2.Template, messages, special_tokens, add_generation_prompt) -> str:
    return template.render(messages=messages, tools=None, documents=None,
                           add_generation_prompt=add_generation_prompt, **special_tokens)


def _try_template_in_child(request: dict, directory: Path) -> None:
    """Compiles and renders a template from a file in a process of its own, limited in time and memory, before
    this process does: a template may loop for ever, or ask for more memory than there is (constants are
    computed while it is compiled). Takes about 0.1 s. Raises ValueError."""
    wall_seconds = 4 * TEMPLATE_SECONDS  # on a busy machine; the child's own limit is CPU time
    command = [sys.executable, "-P", __file__]  # -P: modules beside this file must not shadow the libraries'
    try:
        child = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True,
                               timeout=wall_seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"{directory}: the chat template did not finish in {wall_seconds} s") from None
    if child.returncode < 0:
        raise ValueError(f"{directory}: the chat template took {TEMPLATE_SECONDS} s for two short messages")
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = reason.removeprefix("jinja2.exceptions.")[:300]
        raise ValueError(f"{directory}: the chat template cannot be rendered ({reason})")


def _render_in_child() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (TEMPLATE_SECONDS, TEMPLATE_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (TEMPLATE_BYTES, TEMPLATE_BYTES))
    request = json.load(sys.stdin)
    template = _compile_template(request["template"])
    for messages in (_SENTINEL_CONVERSATION[:1], _SENTINEL_CONVERSATION):
        text = _render_template(template, messages, request["special_tokens"],
                                add_generation_prompt=len(messages) == 1)
        if len(text) > TEMPLATE_CHARACTERS:
            raise ValueError(f"{len(text)} characters for two short messages")


def _is_text(value) -> bool:
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start})") from None


def _read_json_object(path: Path) -> dict:
    """A JSON file's object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


if __name__ == "__main__":
    _render_in_child()
