import itertools
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import tokenizers

from redi.files import resolve_directory
from redi.problems import PROMPT_TEMPLATES, user_message
from redi.tokenizer import CHATML_TEMPLATE, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
THINK = "<think>\n"
# Qwen2.5-Math's template, without its branches for tools
QWEN_TEMPLATE = r"""{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}{%- else %}
    {{- '<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n' }}
{%- endif %}{%- for message in messages %}{%- if message.role != "system" or not loop.first %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
THINKING_TEMPLATE = QWEN_TEMPLATE.replace(r"assistant\n' }}", r"assistant\n<think>\n' }}")


def write_tokenizer(directory: Path, template=None, config=None) -> Path:
    """A small byte-level BPE that has learnt to merge ">" with a newline, and newlines with each other."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
    text = "<think>\n\nOkay, so 1 + 1 is 2.\n</think>\n\nassistant\n<think>\n\n"
    bpe.train_from_iterator([text] * 20, trainer)
    bpe.enable_truncation(3)
    bpe.enable_padding(length=16)
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", **(config or {})}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_ids_and_text_without_padding_or_truncation(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path))
    text = "Okay, so 1 + 1 is 2: half of π²? naïve 日本.\n\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert len(ids) > 16 and tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removesuffix("<|im_end|>")
    assert tokenizer.encode("") == []
    assert tokenizer.encode_batch([text, "", "1"]) == [ids, [], tokenizer.encode("1")]
    assert tokenizer.vocab_size == 299 and max(ids) < 299
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode("half a pair: \ud83d")


def test_built_in_chatml_and_the_tokens_that_stop(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path))
    messages = [user_message("1 + 1?")]
    assert tokenizer.chat_template == CHATML_TEMPLATE
    assert tokenizer.render_prompt(messages) == "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    own = tokenizer.render_prompt(messages, "Be brief.")
    assert own == "<|im_start|>system\nBe brief.<|im_end|>\n" + tokenizer.render_prompt(messages)
    assert (tokenizer.end_of_text_id, tokenizer.end_of_turn_id, tokenizer.stop_ids) == (0, 2, [2, 0])


def test_end_of_turn_follows_the_template_and_eos_ids_of_the_model_also_stop(tmp_path):
    template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "a", template))
    assert tokenizer.end_of_turn_id == 0 and tokenizer.end_of_text_id is None and tokenizer.stop_ids == [0]
    none_shown = write_tokenizer(tmp_path / "b", "{% for m in messages %}{{ m.content }}\n{% endfor %}")
    (none_shown / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    tokenizer = Tokenizer.from_pretrained(none_shown)
    assert tokenizer.end_of_turn_id == 0 and tokenizer.end_of_text_id == 1 and tokenizer.stop_ids == [0, 1]
    swapped = write_tokenizer(tmp_path / "c", QWEN_TEMPLATE, {"eos_token": "<|im_end|>"})  # instruct models
    assert Tokenizer.from_pretrained(swapped).stop_ids == [2, 0]


def test_template_from_file_key_or_list_and_the_system_prompt(tmp_path):
    messages = [{"role": "user", "content": "1 + 1?"}]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": QWEN_TEMPLATE}]
    by_key = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "key", QWEN_TEMPLATE))
    by_list = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "list", named))
    directory = write_tokenizer(tmp_path / "file", "the key must lose against the file")
    (directory / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    by_file = Tokenizer.from_pretrained(directory)
    turns = "<|im_start|>user\n1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    default = "Please reason step by step, and put your final answer within \\boxed{}."
    expected = f"<|im_start|>system\n{default}<|im_end|>\n{turns}"
    assert [t.render_prompt(messages) for t in (by_key, by_list, by_file)] == [expected] * 3
    own = by_key.render_prompt([{"role": "system", "content": "old"}, *messages], "Own.")
    assert own == f"<|im_start|>system\nOwn.<|im_end|>\n{turns}"


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE, THINKING_TEMPLATE])
@pytest.mark.parametrize("prompt_template", list(PROMPT_TEMPLATES))
@pytest.mark.parametrize("rest", ["Okay.\n</think>\n\n2", "\nOkay", ""])
def test_evaluation_prompt_and_what_follows_equal_the_training_ids(tmp_path, template, prompt_template, rest):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template))
    messages = [user_message("1 + 1?", prompt_template)]
    evaluation = tokenizer.encode_prompt(messages, prefill=THINK) + tokenizer.encode(rest)
    prompt_text = tokenizer.render_prompt(messages)
    (completion,) = tokenizer.encode_completions([THINK + rest], THINK, [prompt_text])
    training = tokenizer.encode_prompt(messages) + completion
    assert training == evaluation
    whole = prompt_text + rest if prompt_text.endswith(THINK) else prompt_text + THINK + rest
    assert tokenizer.decode(training, skip_special_tokens=False) == whole  # one <think>, one newline after it


def test_without_the_split_ids_would_differ(tmp_path):
    """The tokenizer of these tests merges across the prefill's end, so the tests above can fail."""
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path))
    apart = tokenizer.encode(THINK) + tokenizer.encode("\nOkay")
    both = tokenizer.encode_completions([THINK + "\nOkay", "Okay"], THINK, ["", ""])
    assert both == [apart, tokenizer.encode("Okay")]
    whole = tokenizer.encode(THINK + "\nOkay")
    assert tokenizer.encode_completions([THINK + "\nOkay"], "", [""]) == [whole] != [apart]


def test_paper_evaluation_template():
    content = user_message("What is {problem}?", "open-r1")["content"]
    assert content.startswith("Solve the following math problem efficiently and clearly.  The last line of ")
    assert "'Therefore, the final answer is: $\\boxed{ANSWER}$. I hope it is correct' (without" in content
    assert content.endswith("Think step by step before answering.\n\nWhat is {problem}?")
    assert user_message("x")["content"] == "x"


def test_template_conventions(tmp_path):
    template = ("{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}\n"
                "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}"
                "{{ strftime_now('%Y')[:2] }}{{ eos_token }}"
                "{% if messages | length > 2 %}{{ raise_exception('too many messages') }}{% endif %}")
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template))
    message = {"role": "user", "content": "<é>"}
    assert tokenizer.render_prompt([message]) == '{"role": "user", "content": "<é>"}20<|endoftext|>'
    with pytest.raises(ValueError, match="too many messages"):
        tokenizer.render_prompt([message] * 3)


@pytest.mark.parametrize("template, reason", [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{{ cycler.__init__.__globals__.os.system('touch escaped') }}", "unsafe"),
    ("{% include '/etc/passwd' %}", "loader"),
    ("{% for message in messages %}", "end"),
    ("{{ raise_exception('no') }}", "no"),
    ("{{ messages[0].content + 1 }}", "concatenate"),
    ("{{ 1 / 0 }}", "zero"),
])
def test_templates_that_fail_or_leave_the_sandbox_are_refused_in_one_sentence(tmp_path, template, reason):
    with pytest.raises(ValueError, match="chat template") as error:
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, template))
    assert reason in str(error.value) and str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 and not Path("escaped").exists()


# Which template, and which token ends a turn


def test_chatml_is_the_default_and_said(tmp_path):
    own = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "own", QWEN_TEMPLATE))
    assert own.has_own_template and own.notices == []
    for name, template in (("absent", None), ("empty", "")):
        default = Tokenizer.from_pretrained(write_tokenizer(tmp_path / name, template))
        assert default.chat_template == CHATML_TEMPLATE and not default.has_own_template
        notice, = default.notices
        assert str(tmp_path / name) in notice and "no chat template" in notice and "ChatML" in notice


@pytest.mark.parametrize("lacking", ["<|im_end|>", "<|im_start|>"])
def test_chatml_without_its_tokens_is_refused_for_conversations_only(tmp_path, lacking):
    """Plain text needs no template."""
    path = write_tokenizer(tmp_path) / "tokenizer.json"
    path.write_text(path.read_text().replace(lacking, "<|other|>"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template is None and tokenizer.end_of_turn_id == 0 and tokenizer.encode("1")
    with pytest.raises(ValueError, match=f"{tmp_path}: no chat template, and .*im_start.*im_end.*chat_template.jinja"):
        tokenizer.render_prompt([user_message("1?")])


def test_named_templates_without_a_default_are_refused_by_name(tmp_path):
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    for value in (named, {"tool_use": "x", "rag": "y"}, [], [{"name": "default", "template": None}, *named]):
        with pytest.raises(ValueError, match="tokenizer_config.json: .*none is 'default'") as error:
            Tokenizer.from_pretrained(write_tokenizer(tmp_path, value))
        assert not value or "'tool_use', 'rag'" in str(error.value)
    directory = write_tokenizer(tmp_path)
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    with pytest.raises(ValueError, match="additional_chat_templates: named chat templates .'tool_use'"):
        Tokenizer.from_pretrained(directory)
    (directory / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    assert Tokenizer.from_pretrained(directory).chat_template == QWEN_TEMPLATE


PHI_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role + m.content }}<|im_end|>\n{% endfor %}{{ eos_token }}"


@pytest.mark.parametrize("template", [None, QWEN_TEMPLATE, PHI_TEMPLATE])
def test_the_templates_end_of_turn_need_not_be_a_special_token(tmp_path, template):
    path = write_tokenizer(tmp_path, template) / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = token["content"] == "<|endoftext|>"
    path.write_text(json.dumps(tokenizer))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.end_of_turn_id == 2 and tokenizer.end_of_text_id == 0 and tokenizer.stop_ids == [2, 0]


def test_the_end_of_turn_may_be_a_word_of_the_vocabulary_and_blanks_are_none(tmp_path):
    template = "{% for m in messages %}{{ m.content }}\n\n</s>{% endfor %}"
    directory = write_tokenizer(tmp_path, template, {"eos_token": "stop"})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"</s>": 0, "stop": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_pretrained(directory).stop_ids == [0, 1]
    blanks = tokenizers.Tokenizer.from_file(str(write_tokenizer(directory, template.replace("</s>", "{{ eos_token }}"))
                                                / "tokenizer.json"))
    blanks.add_tokens(["\n\n"])
    blanks.save(str(directory / "tokenizer.json"))
    assert Tokenizer.from_pretrained(directory).stop_ids == [0]


def test_an_end_of_turn_of_several_tokens_is_said(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, "{{ messages[-1].content }} END OF ANSWER"))
    notice, = tokenizer.notices
    assert tokenizer.end_of_turn_id == 0 and "END OF ANSWER" in notice and "'<|endoftext|>'" in notice


# A thought that the prompt opens


def template_that_opens(thought: str) -> str:
    return QWEN_TEMPLATE.replace("assistant\\n' }}", f"assistant\\n{thought}' }}}}")


@pytest.mark.parametrize("opened", ["<think>", r"<think>\n", r"<think>\n\n", "<think> "])
def test_a_thought_is_opened_once_in_training_and_evaluation(tmp_path, opened):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template_that_opens(opened)))
    messages = [user_message("1 + 1?")]
    prompt_text = tokenizer.render_prompt(messages)
    responses = "<think>\nOkay.\n</think>\n\n2", "<think>Okay.</think>2", "\n<think>\nOkay", "Okay.\n</think>\n\n2"
    for prefill, response in itertools.product([THINK, "<think>", "", "<think>\nOkay"], responses):
        [completion] = tokenizer.encode_completions([response], prefill, [prompt_text])
        trained = tokenizer.encode(prompt_text) + completion
        evaluated = tokenizer.encode_prompt(messages, prefill=prefill)
        text = tokenizer.decode(trained, skip_special_tokens=False)
        assert text.startswith(prompt_text) and text.count("<think>") == 1 and text.endswith(response[-4:])
        assert tokenizer.decode(evaluated, skip_special_tokens=False).count("<think>") == 1
        if response.startswith(prefill):
            assert trained[: len(evaluated)] == evaluated


def test_another_tag_that_the_prefill_opens_and_the_prompt_too(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template_that_opens(r"<reasoning>\n")))
    messages = [user_message("1 + 1?")]
    evaluated = tokenizer.encode_prompt(messages, prefill="<reasoning>\nOkay,")
    assert tokenizer.decode(evaluated, skip_special_tokens=False).endswith("assistant\n<reasoning>\nOkay,")
    [completion] = tokenizer.encode_completions(["<reasoning>2"], "<reasoning>\n", [tokenizer.render_prompt(messages)])
    assert completion == tokenizer.encode("2")


@pytest.mark.parametrize("empty", [r"<think>\n\n</think>\n\n", "<think></think>", r"<think>\n</think> "])
def test_a_thought_behind_an_empty_one_is_refused_with_the_flag_that_helps(tmp_path, empty):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template_that_opens(empty)))
    messages = [user_message("1 + 1?")]
    prompt_text = tokenizer.render_prompt(messages)
    for encode in (lambda: tokenizer.encode_prompt(messages, prefill=THINK),
                   lambda: tokenizer.encode_completions(["<think>Okay</think>2"], THINK, [prompt_text]),
                   lambda: tokenizer.encode_completions(["<think>Okay</think>2"], "", [prompt_text])):
        with pytest.raises(ValueError, match="empty thought.*--prefill ''"):
            encode()
    assert tokenizer.encode_completions(["2"], THINK, [prompt_text]) == [tokenizer.encode("2")]
    assert tokenizer.encode_prompt(messages) == tokenizer.encode(prompt_text)


# Reasoning beside the content

# Qwen3's place for it, in short
REASONING_TEMPLATE = r"""{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.reasoning_content is string and loop.last %}
        {{- '<think>\n' + m.reasoning_content.strip('\n') + '\n</think>\n\n' }}
    {%- endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
CHANNELS_TEMPLATE = (
    "{% for m in messages %}{% if m.thinking %}<|im_start|>analysis:{{ m.thinking }}{% endif %}"
    "<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


@pytest.mark.parametrize("template, expected", [
    (None, "<think>\n1, 2\n</think>\n\n2"),
    (THINKING_TEMPLATE, "<think>\n1, 2\n</think>\n\n2"),
    (REASONING_TEMPLATE, "<think>\n1, 2\n</think>\n\n2"),
    (REASONING_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'"), "<think>\n1, 2\n</think>\n\n2"),
    (REASONING_TEMPLATE.replace("</think>\\n\\n", "</think>"), "<think>\n1, 2\n</think>2"),
    (CHANNELS_TEMPLATE, "analysis:1, 2\n<|im_start|>assistant:2"),
])
def test_reasoning_is_placed_as_the_template_does_or_in_a_thought(tmp_path, template, expected):
    tokenizer, messages = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template)), [user_message("1 + 1?")]
    for key in ("reasoning_content", "thinking", "reasoning"):
        text = tokenizer.render_response(messages, {"role": "assistant", "content": "2", key: "1, 2\n"})
        assert text == expected
    [ids] = tokenizer.encode_completions([text], THINK, [tokenizer.render_prompt(messages)])
    whole = tokenizer.decode(tokenizer.encode_prompt(messages) + ids, skip_special_tokens=False)
    assert whole.count("1, 2") == 1 and whole.count("<think>") == expected.count("<think>")


def test_other_keys_of_the_answer_pass_unless_the_template_uses_them(tmp_path):
    named = QWEN_TEMPLATE.replace("message.role + '\\n'", "message.role + (message.name or '') + '\\n'")
    assert named != QWEN_TEMPLATE
    answer = {"role": "assistant", "content": "2", "name": "R1", "score": 1}
    messages = [user_message("1 + 1?")]
    assert Tokenizer.from_pretrained(write_tokenizer(tmp_path / "a")).render_response(messages, answer) == "2"
    with pytest.raises(ValueError, match="'name' of the assistant's message"):
        Tokenizer.from_pretrained(write_tokenizer(tmp_path / "b", named)).render_response(messages, answer)


def test_reasoning_that_contradicts_itself_is_refused(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, REASONING_TEMPLATE))
    messages, answer = [user_message("1?")], {"role": "assistant", "content": "2"}
    for keys, expected in (({"reasoning_content": ["1"]}, "'reasoning_content' must be one text"),
                           ({"reasoning_content": "1", "thinking": "2"}, "'reasoning_content' and 'thinking'"),
                           ({"reasoning": "1", "content": "<think>\n2\n</think>2"}, "the thought in 'content'")):
        with pytest.raises(ValueError, match=expected):
            tokenizer.render_response(messages, answer | keys)
    for keys in ({"reasoning": "1, 2", "content": "<think>\n1, 2\n</think>\n\n2"}, {"reasoning": " \n"},
                 {"reasoning": "1, 2", "thinking": "1, 2", "content": "<think>1, 2</think>2"}):
        assert tokenizer.render_response(messages, answer | keys) == (answer | keys)["content"]


def test_reasoning_of_earlier_turns_reaches_the_template_under_its_name(tmp_path):
    template = "{% for m in messages %}{{ m.reasoning_content or '' }}{{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, template))
    history = [{"role": "assistant", "content": "2", "reasoning": "1, "}, user_message("why?")]
    assert tokenizer.render_prompt(history) == "1, 2<|im_end|>why?<|im_end|>"


@pytest.mark.parametrize("name, content, reason", [
    ("tokenizer.json", "{", "tokenizer.json: not a tokenizer"),
    ("tokenizer.json", None, "no tokenizer.json"),
    ("tokenizer_config.json", "[1]", "expected a JSON object, found list"),
    ("tokenizer_config.json", '{"a": ', "not valid JSON"),
    ("tokenizer_config.json", "[" * 100_000, "not valid JSON"),
    ("tokenizer_config.json", b"\xff\xfe", "not valid JSON in UTF-8"),
    ("tokenizer_config.json", '{"eos_token": "</s>"}', "eos_token '</s>' is not in tokenizer.json"),
    ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be a string, found int"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
])
def test_broken_files_are_named(tmp_path, name, content, reason):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        Tokenizer.from_pretrained(tmp_path)
    assert reason in str(error.value) and str(tmp_path) in str(error.value)


class FakeHub(BaseHTTPRequestHandler):
    """Lists one repository, org/tiny, a model and a dataset at once, and serves its files."""
    files: dict = {}
    listing: list = []

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        if "/api/" in self.path and "org/tiny" in self.path:
            answer = {"id": "org/tiny", "sha": "a" * 40, "siblings": [{"rfilename": n} for n in self.listing]}
            if "/tree/" in self.path:
                answer = [{"type": "file", "path": n, "size": 1, "oid": "b" * 40} for n in self.listing]
            self.answer(200, json.dumps(answer).encode())
        elif (name := self.path.partition("/org/tiny/resolve/")[2].partition("/")[2]) in self.files:
            body = self.files[name]
            self.answer(200, body, {"ETag": '"%d"' % hash(body), "X-Repo-Commit": "a" * 40})
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                   "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    yield lambda *command, **extra: subprocess.run(
        [sys.executable, *command], env={**environment, **extra}, cwd=tmp_path, timeout=60,
        capture_output=True, text=True)
    server.shutdown()


LOAD = "import sys, redi.tokenizer as t; print(t.Tokenizer.from_pretrained(sys.argv[1]).stop_ids)"


def test_hub_ids(tmp_path, hub, monkeypatch):
    directory = write_tokenizer(tmp_path / "local", QWEN_TEMPLATE)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    monkeypatch.setattr(FakeHub, "files", files)
    monkeypatch.setattr(FakeHub, "listing", [*files, "model.safetensors"])
    assert hub("-c", LOAD, "org/tiny").stdout == "[2, 0]\n"
    missing = hub("-c", LOAD, "org/missing")
    assert "ValueError: org/missing: no such directory, and the Hugging Face hub gave no" in missing.stderr
    offline = hub("-c", LOAD, "org/other", HF_HUB_OFFLINE="1")
    assert "ValueError: org/other: no such directory, and" in offline.stderr
    cached = hub("-c", LOAD, "org/tiny", HF_HUB_OFFLINE="1")
    assert cached.stdout == "[2, 0]\n"


def test_hub_listing_cannot_climb_out(tmp_path, hub, monkeypatch):
    name = "../../../../../escaped/tokenizer.json"
    monkeypatch.setattr(FakeHub, "files", {name: b"{}"})
    monkeypatch.setattr(FakeHub, "listing", [name])
    result = hub("-c", "from redi.files import *; resolve_directory('org/tiny', ['*.json'])")
    assert result.returncode != 0 and "ValueError: org/tiny" in result.stderr
    assert not list(tmp_path.rglob("escaped")) and not (tmp_path.parent / "escaped").exists()


def test_names_that_are_no_directory_and_no_repository(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a directory, found a file"):
        resolve_directory(tmp_path / "file", ["*"])
    with pytest.raises(ValueError, match="no such directory"):
        resolve_directory(tmp_path / "missing" / "model", ["*"])
