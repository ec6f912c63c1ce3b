"""A chat template from a stranger's file: compiled in a sandbox, and tried in a process of its own beforehand.

Needs jinja2 only: that process runs this file.
"""

import datetime
import json
import resource
import subprocess
import sys

import jinja2
import jinja2.ext
import jinja2.sandbox

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SECONDS, BYTES, CHARACTERS = 5, 1 << 30, 1 << 20  # limits of the child


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


def try_in_child(source: str, special_tokens: dict[str, str], conversations: list[list[dict]]) -> None:
    """Compile and render a template in a process limited in time and memory, before this process does: it may loop
    for ever, or ask for more memory than there is (constants are computed while it is compiled). Takes about 0.1 s.

    Raises ValueError where that does not end well.
    """
    wall_seconds = 4 * SECONDS  # on a busy machine; the child's own limit is CPU time
    command = [sys.executable, "-P", __file__]  # -P: modules beside this file must not shadow the libraries'
    request = json.dumps([source, special_tokens, conversations])
    try:
        child = subprocess.run(command, input=request, capture_output=True, text=True, timeout=wall_seconds)
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template did not finish in {wall_seconds} s") from None
    if child.returncode < 0:
        raise ValueError(f"the chat template took {SECONDS} s for two short messages")
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no reason given"])[-1]
        reason = reason.removeprefix("jinja2.exceptions.").removeprefix("ValueError: ")[:300]
        raise ValueError(f"the chat template cannot be rendered ({reason})")


def _render_in_child() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    source, special_tokens, conversations = json.load(sys.stdin)
    template = ChatTemplate(source, special_tokens)
    for messages in conversations:
        text = template.render(messages, add_generation_prompt=messages[-1]["role"] == "user")
        if len(text) > CHARACTERS:
            raise ValueError(f"{len(text)} characters for two short messages")


if __name__ == "__main__":
    _render_in_child()
