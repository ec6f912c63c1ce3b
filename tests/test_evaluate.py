import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers

import evaluate
from redi.evaluation import sample_store as store
from redi.evaluation import scoring as results
from redi.evaluation.generation import Request, generate
from redi.evaluation.sampling import sample_key
from redi.example import water_tank as toy
from redi.hub.weights import load_pretrained
from redi.problems import read_benchmark
from redi.tokenizer import Tokenizer
from tests.conftest import ROOT, run_python
from tests.conftest import read_jsonl as read
from tests.conftest import write_jsonl as write


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A directory with random weights, a context of 128 tokens and a tokenizer."""
    directory = tmp_path_factory.mktemp("run") / "final"
    toy.write_model(directory, seed=0)
    return directory


@pytest.fixture
def problems(tmp_path) -> Path:
    rows = [{"id": f"s{i}", "problem": f"{i}+{i}", "answer": str(2 * i)} for i in range(5)]
    return write(tmp_path / "sums.jsonl", rows)


def main(*argv) -> None:
    evaluate.main([*map(str, argv)])


def run(model, problems, output, *more) -> dict:
    """evaluate.py in this process. Returns results.json."""
    main("--model", model, "--problems", problems, "--output", output, "--samples", 3, *more)
    return json.loads((output / "results.json").read_text())


def score(samples: Path, problems: Path, *more) -> list[dict]:
    """evaluate.py --score in this process. Returns the rows of results.json, if there is an --output."""
    main("--score", samples, "--problems", problems, *more)
    output = more[more.index("--output") + 1] if "--output" in more else None
    return json.loads((output / "results.json").read_text())["results"] if output else []


def copied(model: Path, folder: Path) -> Path:
    """A copy of the model under its name, to be changed."""
    return Path(shutil.copytree(model, folder / model.name))


def command(*argv, ranks=None) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, str(ROOT / "evaluate.py"), *map(str, argv)]


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_and_results(model, problems, tmp_path, capsys):
    results = run(model, problems, tmp_path / "out")
    [row] = results["results"]
    samples = read(tmp_path / "out" / row["model"] / "sums" / "samples.jsonl")
    assert [(s["id"], s["sample"]) for s in samples] == [(f"s{i}", k) for i in range(5) for k in range(3)]
    assert list(samples[0]) == ["id", "sample", "response", "finish_reason", "tokens", "answer", "correct"]
    assert all(s["response"].startswith("<think>\n") for s in samples)
    assert (row["benchmark"], row["problems"], row["samples"]) == ("sums", 5, 3)
    assert row["pass@1"] == sum(s["correct"] for s in samples) / 15
    assert row["boxed"] == sum(s["answer"] is not None for s in samples) / 15
    assert {"sem", "sem_problems"} <= set(row)
    assert row["truncated"] == sum(s["finish_reason"] == "length" for s in samples) / 15
    assert row["mean_tokens"] == sum(s["tokens"] for s in samples) / 15
    assert set(row["pass@k"]) == {"1", "2", "3"}
    assert row["settings"]["temperature"] == 0.6 and row["settings"]["prefill"] == "<think>\n"
    assert {"checker", "torch", "tokenizers"} <= set(row["versions"])
    printed = capsys.readouterr()
    header, line = printed.out.splitlines()
    assert re.split("  +", header)[3:] == ["pass@1", "± runs", "± problems", "pass@k", "boxed", "truncated", "tokens"]
    assert re.fullmatch(r"sums +\S+-final +5( +\d+\.\d){3} +\d+\.\d \(k = 3\)( +\d+\.\d %){2} +\d+", line)
    assert "context of 128 tokens" in printed.err


def test_the_response_is_the_text_of_the_sampled_ids(model, problems, tmp_path):
    """Against generate() called by hand: prompt, keys, stop ids, decoding."""
    run(model, problems, tmp_path / "out", "--seed", "4", "--samples", "1")
    tokenizer, weights = Tokenizer.from_pretrained(model), load_pretrained(model)
    for sample in read(next((tmp_path / "out").rglob("samples.jsonl"))):
        message = {"role": "user", "content": f"{sample['id'][1:]}+{sample['id'][1:]}"}
        prompt_ids = tokenizer.encode(tokenizer.render_prompt([message]) + "<think>\n")
        request = Request(prompt_ids, sample_key(4, sample["id"], 0), 128 - len(prompt_ids))
        [(_, ids, reason)] = generate(weights, [request], tokenizer.stop_ids)
        assert (sample["finish_reason"], sample["tokens"]) == (reason, len(ids))
        text = tokenizer.decode(ids[:-1] if reason == "stop" else ids, skip_special_tokens=False)
        assert sample["response"] == "<think>\n" + text


def killed_after(lines: int, out: Path, start: list[str]) -> None:
    """Start a command and kill -9 it once it has drawn that many samples. Of torchrun only the parent is killed."""
    process = subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_lines(lines, out, process)
    process.kill()
    process.wait()


def wait_for_lines(lines: int, out: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while sum(path.read_bytes().count(b"\n") for path in out.rglob("samples*.jsonl")) < lines:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)


def check_finishes_as_if_nothing_had_happened(start: list[str], expected: Path, out: Path) -> None:
    finished = subprocess.run(start, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("pass@1") == 1  # one table, not one a rank
    folder = next(expected.rglob("samples.jsonl")).parent.relative_to(expected)
    assert sorted(path.name for path in (out / folder).iterdir()) == [".lock", "samples.jsonl", "settings.json"]
    for name in (folder / "samples.jsonl", folder / "settings.json", "results.json"):
        assert (out / name).read_bytes() == (expected / name).read_bytes()


def test_killed_and_continued_with_two_ranks_gives_the_same_bytes(model, problems, tmp_path):
    run(model, problems, tmp_path / "expected", "--samples", "12")
    out = tmp_path / "out"
    argv = ("--model", model, "--problems", problems, "--output", out, "--samples", 12, "--rows", 2)
    killed_after(3, out, command(*argv))
    with open(next(out.rglob("samples.jsonl")), "ab") as file:
        file.write(b'{"id": "s1", "sam')  # what a kill in the middle of a write leaves
    check_finishes_as_if_nothing_had_happened(command(*argv, ranks=2), tmp_path / "expected", out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_its_status_and_says_how_to_go_on(model, problems, tmp_path, number):
    out = tmp_path / "out"
    start = command("--model", model, "--problems", problems, "--output", out, "--samples", 4000)  # a minute's work
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for_lines(3, out, process)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert stderr.splitlines()[-1] == "interrupted; the same command resumes"
    assert "Traceback" not in stderr and "pass@1" not in stdout
    drawn = read(next(out.rglob("samples.jsonl")))  # whole lines only
    expected = run(model, problems, tmp_path / "expected", "--samples", "4")
    assert run(model, problems, out, "--samples", "4") == expected
    kept = {(s["id"], s["sample"]): s for s in read(next(out.rglob("samples.jsonl")))}
    undisturbed = read(next((tmp_path / "expected").rglob("samples.jsonl")))
    assert all(kept[s["id"], s["sample"]] == s for s in drawn + undisturbed)


@pytest.mark.slow
def test_killed_torchrun_and_continued_with_three_ranks_gives_the_same_bytes(model, problems, tmp_path):
    run(model, problems, tmp_path / "expected", "--samples", "40")
    out = tmp_path / "out"
    argv = ("--model", model, "--problems", problems, "--output", out, "--samples", 40, "--rows", 2)
    for lines in (5, 60, 110):
        killed_after(lines, out, command(*argv, ranks=2))
    check_finishes_as_if_nothing_had_happened(command(*argv, ranks=3), tmp_path / "expected", out)


def test_a_model_that_changes_before_it_is_loaded_is_refused(model, problems, tmp_path, monkeypatch):
    copy, load = copied(model, tmp_path), evaluate.load_pretrained

    def changed(directory, *rest):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "changed": True}))
        return load(directory, *rest)

    monkeypatch.setattr(evaluate, "load_pretrained", changed)
    with pytest.raises(ValueError, match=f"{copy} has changed"):
        run(copy, problems, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("samples*.jsonl"))


def test_a_rerun_draws_nothing_and_changes_no_byte(model, problems, tmp_path, monkeypatch):
    run(model, problems, tmp_path / "out")
    files = files_in(tmp_path / "out")
    (tmp_path / "out" / "results.json.partial-77").write_bytes(b"{")  # of a run killed while it wrote the table
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    run(model, problems, tmp_path / "out")
    assert files == files_in(tmp_path / "out")


def test_progress_in_a_log(model, problems, tmp_path, monkeypatch, capsys):
    run(model, problems, tmp_path / "quick")
    assert "tokens/s" not in capsys.readouterr().err  # nothing in the first seconds
    monkeypatch.setattr(evaluate, "SECONDS_BETWEEN_LINES", 0)
    run(model, problems, tmp_path / "out")
    shown = re.findall(r"-final: [^\r]* (\d+)/15 [^\r]* \d+ tokens/s", capsys.readouterr().err)
    counts = list(map(int, shown))
    assert counts[0] == 0 and counts[-1] == 15 and counts == sorted(counts)  # from before the first sample on


def test_a_rank_that_fails_alone_says_why(model, problems, tmp_path, monkeypatch, capsys):
    def full_disk(*args):
        raise OSError(28, "No space left on device", "samples.rank-1.jsonl")

    monkeypatch.setattr(evaluate, "draw", full_disk)
    with pytest.raises(OSError):
        run(model, problems, tmp_path / "out")
    assert "error: " not in capsys.readouterr().err  # the first rank's error is told by run_command
    monkeypatch.setattr(evaluate, "local_rank", lambda: 1)
    with pytest.raises(OSError):
        run(model, problems, tmp_path / "out")
    assert "error: [Errno 28] No space left on device: 'samples.rank-1.jsonl'\n" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{", "{}", '{"results": 3}', '{"results": [{"model": "a", "benchmark": "b"}]}'])
def test_results_that_are_none_are_named_and_kept(model, problems, tmp_path, content):
    path = tmp_path / "out" / "results.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        run(model, problems, tmp_path / "out")
    assert path.read_text() == content


def test_more_samples_continue_and_fewer_use_the_first(model, problems, tmp_path, monkeypatch):
    direct = run(model, problems, tmp_path / "direct", "--samples", "4")
    run(model, problems, tmp_path / "out", "--samples", "2", "--limit", "3")
    fewer = run(model, problems, tmp_path / "few", "--samples", "2")
    assert run(model, problems, tmp_path / "out", "--samples", "4") == direct
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    assert run(model, problems, tmp_path / "out", "--samples", "2") == fewer


def test_a_rank_file_met_twice_counts_once(model, problems, tmp_path, monkeypatch):
    """A kill after the merged file was put in place and before the rank's file was removed."""
    run(model, problems, tmp_path / "out")
    main = next((tmp_path / "out").rglob("samples.jsonl"))
    whole = main.read_bytes()
    lines = whole.splitlines(keepends=True)
    (main.parent / "samples.rank-1.jsonl").write_bytes(b"".join(lines[4:9]) + b"{")
    (main.parent / "samples.jsonl.partial-77").write_bytes(b"{")
    main.write_bytes(b"".join(reversed(lines[:7])))
    (main.parent / "samples.rank-12.jsonl").write_bytes(b"".join(lines[9:]))
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    run(model, problems, tmp_path / "out")
    assert main.read_bytes() == whole
    assert sorted(path.name for path in main.parent.iterdir()) == [".lock", "samples.jsonl", "settings.json"]


@pytest.mark.parametrize("flag, value", [
    ("--temperature", "1.0"), ("--top-p", "1"), ("--seed", "1"), ("--prefill", "<think>"), ("--dtype", "bfloat16"),
    ("--system-prompt", "Be brief."), ("--max-new-tokens", "9"), ("--prompt-template", "open-r1"),
])  # fmt: skip
def test_samples_of_other_settings_are_not_mixed(model, problems, tmp_path, flag, value):
    folder = tmp_path / "out" / evaluate.storage_name(str(model)) / "sums"
    folder.mkdir(parents=True)
    args = ["--model", str(model), "--problems", str(problems), "--output", str(tmp_path / "out")]
    parsed = evaluate.parse_arguments(args)
    [made_with] = evaluate.Model(str(model), [read_benchmark(problems)], parsed, evaluate.torch.device("cpu")).stores
    (folder / "settings.json").write_text(json.dumps({**made_with.settings, "code": made_with.code}))
    write(folder / "samples.jsonl", [{"id": "s0", "sample": 0, "response": "", "correct": False}])
    before = (folder / "samples.jsonl").read_bytes()
    with pytest.raises(ValueError, match=rf"has samples made with {flag.strip('-').replace('-', '_')} "):
        evaluate.main([*args, flag, value])
    assert (folder / "samples.jsonl").read_bytes() == before


def test_changed_problems_or_weights_are_noticed(model, problems, tmp_path):
    other = copied(model, tmp_path / model.parent.name)
    run(other, problems, tmp_path / "out", "--limit", "1")
    toy.write_model(tmp_path / "new", seed=1)
    shutil.copy(tmp_path / "new" / "model.safetensors", other)
    with pytest.raises(ValueError, match="model_digest"):
        run(other, problems, tmp_path / "out", "--limit", "1")
    problems.write_text(problems.read_text() + '{"id": "x", "problem": "1", "answer": "1"}\n')
    with pytest.raises(ValueError, match="problems_digest"):
        run(model, problems, tmp_path / "out", "--limit", "1")


def test_samples_are_scored_anew_when_the_checker_changes(model, problems, tmp_path, monkeypatch):
    assert run(model, problems, tmp_path / "out")["results"][0]["pass@1"] == 0
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    monkeypatch.setattr(store, "judge", lambda *arguments: (None, True))
    for module in (store, results):
        monkeypatch.setattr(module, "checker_version", lambda: "2")
    [row] = run(model, problems, tmp_path / "out")["results"]
    assert row["pass@1"] == 1 and row["versions"]["checker"] == "2"
    assert all(s["correct"] for s in read(next((tmp_path / "out").rglob("samples.jsonl"))))


def test_a_corrected_gold_answer_scores_the_samples_again(model, problems, tmp_path, monkeypatch):
    run(model, problems, tmp_path / "out")
    folder = next((tmp_path / "out").rglob("samples.jsonl")).parent
    [sample, *others] = read(folder / "samples.jsonl")
    sample["response"] += r"</think> \boxed{77}"
    write(folder / "samples.jsonl", [sample, *others])
    rows = read(problems)
    write(problems, [{**rows[0], "answer": "77"}, *rows[1:]])
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    assert run(model, problems, tmp_path / "out")["results"][0]["pass@1"] == pytest.approx(1 / 15)
    assert [s["correct"] for s in read(folder / "samples.jsonl")] == [True] + [False] * 14

    scored = tmp_path / "scored"
    score(folder / "samples.jsonl", problems, "--output", scored)
    write(problems, rows)
    assert score(folder / "samples.jsonl", problems, "--output", scored)[0]["pass@1"] == 0


def test_samples_of_other_code_are_refused_by_the_file_that_changed(model, problems, tmp_path, monkeypatch, capsys):
    run(model, problems, tmp_path / "out")
    path = next((tmp_path / "out").rglob("settings.json"))
    settings = json.loads(path.read_text())
    monkeypatch.setattr(evaluate, "load_pretrained", None)
    for changed, named in (
        ({**settings, "code": {**settings["code"], "redi/evaluation/sampling.py": "0"}}, "redi/evaluation/sampling.py"),
        ({**settings, "code": {**settings["code"], "redi/model.py": "0", "evaluate.py": "1"}},
         "evaluate.py, redi/model.py"),
        ({key: value for key, value in settings.items() if key not in ("code", "problems_digest")}, "the code"),
    ):  # fmt: skip
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"another version of {named}.*--keep-samples") as refusal:
            run(model, problems, tmp_path / "out")
        assert str(path.parent) in str(refusal.value)
        run(model, problems, tmp_path / "out", "--keep-samples")
        assert json.loads(path.read_text()) == settings
        run(model, problems, tmp_path / "out")  # and the flag is not needed again
    path.write_text(json.dumps({**settings, "code": {}, "seed": 9}))
    with pytest.raises(ValueError, match="samples made with seed 9"):  # other settings are not kept
        run(model, problems, tmp_path / "out", "--keep-samples")


def test_models_with_one_directory_name_and_several_benchmarks(model, problems, tmp_path):
    other = tmp_path / "sft" / "final"
    toy.write_model(other, seed=1)
    more = write(tmp_path / "more.jsonl", [{"problem": "1+1", "answer": 2}])
    argv = ["--problems", problems, more, "--samples", 1, "--limit", 2, "--max-new-tokens", 5, "--output"]
    main("--model", model, *argv, tmp_path / "out")
    main("--model", other, *argv, tmp_path / "out")  # results of the first stay
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    names = [f"{model.parent.name}-final", "sft-final"]
    assert {(row["benchmark"], row["model"]) for row in rows} == {(b, m) for b in ("sums", "more") for m in names}
    assert {row["mean_tokens"] <= 5 for row in rows} == {True}
    together = tmp_path / "together"
    main("--model", other, model, *argv, together)
    assert (together / "results.json").read_bytes() == (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(ValueError, match="both be stored as"):
        main("--model", other, tmp_path / "elsewhere" / "sft" / "final", *argv, together)
    copy = write(tmp_path / "sft" / "sums.jsonl", [{"problem": "1", "answer": "1"}])
    with pytest.raises(ValueError, match="both be stored as 'sums'"):
        main("--model", other, "--problems", problems, copy, "--output", together)


def test_storage_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "redi" / "step-000100").mkdir(parents=True)
    for path in ("redi/step-000100", "redi/step-000100/", tmp_path / "redi" / "step-000100"):
        assert evaluate.storage_name(str(path)) == "redi-step-000100"
    assert evaluate.storage_name("Qwen/Qwen2.5-Math-1.5B") == "Qwen-Qwen2.5-Math-1.5B"
    assert evaluate.storage_name("redi/..") == f"{tmp_path.parent.name}-{tmp_path.name}"


def captured_prompts(monkeypatch, model, problems, tmp_path, *flags) -> list[str]:
    prompts, tokenizer = [], Tokenizer.from_pretrained(model)

    def fake_generate(weights, requests, stop_ids, *rest):
        for i, request in enumerate(requests):
            prompts.append(tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
            yield i, [tokenizer.end_of_turn_id], "stop"

    monkeypatch.setattr(evaluate, "generate", fake_generate)
    run(model, problems, tmp_path / "out", "--samples", "1", "--limit", "1", *flags)
    return prompts


def test_a_special_token_that_was_sampled_is_stored(model, problems, tmp_path, monkeypatch):
    """A </think> that is a special token decides whether the thought ends."""
    changed = copied(model, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(changed / "tokenizer.json"))
    tokenizer.add_special_tokens(["</think>"])
    tokenizer.save(str(changed / "tokenizer.json"))
    close, end = tokenizer.token_to_id("</think>"), Tokenizer.from_pretrained(changed).end_of_turn_id

    def fake_generate(weights, requests, stop_ids, *rest):
        yield 0, [close, end], "stop"
        yield 1, [close], "length"

    monkeypatch.setattr(evaluate, "generate", fake_generate)
    run(changed, problems, tmp_path / "out", "--samples", "2", "--limit", "1")
    samples = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert [sample["response"] for sample in samples] == ["<think>\n</think>"] * 2


def test_prompts(model, problems, tmp_path, monkeypatch):
    flags = "--prefill", "<think>", "--system-prompt", "0"
    [prompt] = captured_prompts(monkeypatch, model, problems, tmp_path, *flags)
    assert prompt.startswith("<|im_start|>system\n0<|im_end|>") and prompt.endswith("assistant\n<think>")
    [sample] = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert (sample["response"], sample["tokens"]) == ("<think>", 1)
    [prompt] = captured_prompts(monkeypatch, model, problems, tmp_path / "2", "--prefill", r"<think>\n\n")
    assert prompt.endswith("assistant\n<think>\n\n") and "system" not in prompt


def test_bad_input_by_the_command_line(model, problems, tmp_path):
    """One clear sentence, exit status 1, nothing written."""
    long = write(tmp_path / "long.jsonl", [{"problem": "9" * 500, "answer": "1"}])
    weightless = copied(model, tmp_path)
    (weightless / "model.safetensors").unlink()
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    out = tmp_path / "out"
    drawing = "--model", model, "--problems", problems, "--output", out
    for argv, message in [
        (("--model", model, "--problems", long, "--output", out), "problem 'long-0': the prompt has"),
        (("--model", model, "--problems", tmp_path / "none.jsonl", "--output", out), "none.jsonl cannot be read"),
        (("--model", model, "--problems", empty, "--output", out), "empty.jsonl: no problems"),
        ((*drawing, "--samples", 0), "argument --samples: '0' is not a whole number above 0"),
        ((*drawing, "--top-p", 0), "argument --top-p: '0' is not a share above 0 and at most 1"),
        ((*drawing, "--top-p", 1.01), "argument --top-p: '1.01' is not a share"),
        ((*drawing, "--temperature", "nan"), "argument --temperature: 'nan' is not a number from 0 up"),
        ((*drawing, "--sample", 1), "unrecognized arguments: --sample"),
        (("--model", model, "--problems", problems), "give --model and --output"),
        (("--score", problems, "--problems", problems, "--model", model), "without --model"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            main(*argv)
    assert not out.exists()
    finished = run_python("evaluate.py", "--model", weightless, "--problems", problems, "--output", out)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ") and "weights" in finished.stderr and finished.stderr.count("\n") == 1


def test_scoring_our_own_samples_gives_our_own_table(model, problems, tmp_path):
    [ours] = run(model, problems, tmp_path / "out")["results"]
    samples = next((tmp_path / "out").rglob("samples.jsonl"))
    [row] = score(samples, problems, "--output", tmp_path / "scored")
    same = set(ours) - {"model", "path", "settings"}
    assert {key: row[key] for key in same} == {key: ours[key] for key in same}
    assert next((tmp_path / "scored").rglob("samples.jsonl")).read_bytes() == samples.read_bytes()


def test_scoring_what_other_engines_write(problems, tmp_path, capsys):
    right = [rf"<think>Wait, Wait.</think> \boxed{{{2 * i}}}" for i in range(5)]
    forms = [
        {"id": "s0", "response": [right[0], "no box"]},
        {"id": "s1", "outputs": [{"text": right[1], "finish_reason": "stop", "token_ids": [1, 2]}, {"text": right[1]}]},
        {"id": "s2", "responses": ["no", "none"]},
        {"id": "s3", "sample": 1, "response": right[3]},
        {"id": "s4", "response": right[4]},
        {"id": "s3", "sample": 0, "response": r"\boxed{1} \ud800"},
        {"id": "s4", "response": r"\boxed{8.0}"},
    ]
    path = write(tmp_path / "vllm.jsonl", forms)
    [row] = score(path, problems, "--output", tmp_path / "out")
    assert row["pass@1"] == pytest.approx(6 / 10) and row["pass@k"]["2"] == pytest.approx(4 / 5)
    assert row["sem"] == pytest.approx(0)  # both columns: 3 of 5
    # Problems: 1/2, 1, 0, 1/2, 1, mean 0.6. Squared deviations 0.01, 0.16, 0.36, 0.01, 0.16: sum 0.7.
    assert row["sem_problems"] == pytest.approx((0.7 / 4 / 5) ** 0.5)
    assert row["boxed"] == 7 / 10
    assert (row["truncated"], row["mean_tokens"], row["waits_per_token"]) == (None, None, None)
    assert row["waits_per_response"] == pytest.approx(2 * 5 / 10)
    scored = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert [s["correct"] for s in scored if s["id"] == "s3"] == [False, True]
    capsys.readouterr()
    score(path, problems, "--samples", "1", "--limit", "1")
    assert capsys.readouterr().out.splitlines()[1].split()[2:6] == ["1", "100.0", "-", "-"]
    score(path, problems, "--samples", "1")  # 3 of 5 right: sqrt(0.6 * 0.4 / 4); 4 of 5 in a box
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split()[2:6] == ["5", "60.0", "-", "24.5"] and " 80.0 %" in line

    outputs = [{"text": "a", "finish_reason": "length", "token_ids": [1, 2, 3]}]
    whole = [{"id": f"s{i}", "outputs": outputs} for i in range(5)]
    rows = score(write(tmp_path / "whole.jsonl", whole), problems, "--output", tmp_path / "out")
    assert [(r["truncated"], r["mean_tokens"]) for r in rows if "whole" in r["model"]] == [(1.0, 3.0)]


@pytest.mark.parametrize("truncated, key, reasons", [
    (1, "finish_reason", ["length", "max_tokens", "MAX_TOKENS", "max_new_tokens", "FinishReason.MAX_TOKENS",
                          "max_output_tokens", {"type": "length", "length": 9}]),
    (0, "finish_reason", ["stop", "eos_token", "end_turn", {"type": "stop"}]), (None, "finish_reason", [None, 3]),
    (1, "stop_reason", ["max_tokens"]), (0, "stop_reason", ["end_turn"]), (1, "done_reason", ["length"]),
])  # fmt: skip
def test_truncation_by_the_names_of_other_engines(problems, tmp_path, truncated, key, reasons):
    for number, reason in enumerate(reasons):
        rows = [{"id": f"s{i}", "outputs": [{"text": "a", key: reason}]} for i in range(5)]
        path = write(tmp_path / f"{number}.jsonl", rows)
        [row] = score(path, problems, "--output", tmp_path / f"{number}")
        assert row["truncated"] == truncated


@pytest.mark.parametrize("text, counted", [
    (r"<think>maybe \boxed{0}? let me", (0, 1)),
    (r"<think>\boxed{9}</think> <think>\boxed{0}", (0, 1)),
    (r"<think>\boxed{9}</think> \boxed{0}", (1, 1)),
    (r"\boxed{0} <think>or \boxed{9}", (1, 0)),
])  # fmt: skip
def test_a_box_in_a_thought_that_never_ends_is_no_answer(problems, tmp_path, text, counted):
    path = write(tmp_path / "s.jsonl", [{"id": "s0", "response": text}])
    for flags, correct in zip(((), ("--open-thought-counts",)), counted):
        [row] = score(path, problems, "--limit", 1, "--output", tmp_path / "out", *flags)
        assert (row["pass@1"], row["open_thought_counts"]) == (correct, bool(flags))


def test_warnings_where_no_thought_ends_and_where_nothing_is_correct(problems, tmp_path, capsys):
    def warnings(text, *flags):
        rows = [{"id": f"s{i}", "response": text.replace("N", str(2 * i))} for i in range(5)]
        score(write(tmp_path / "s.jsonl", rows), problems, *flags)
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]

    nothing_correct, open_thoughts = warnings(r"<think>\n so \boxed{N}")
    assert "sums" in nothing_correct and "0 of 5 responses are judged correct" in nothing_correct
    assert "5 of 5 responses never close the thought" in open_thoughts and "--prefill ''" in open_thoughts
    assert warnings(r"<think>\n so \boxed{N}", "--open-thought-counts") == []
    assert warnings(r"<think>\n so</think> \boxed{N}") == [] == warnings(r"\boxed{N}")
    assert len(warnings(r"\boxed{N1}")) == 1


def test_a_prompt_that_opens_the_thought_counts(model, problems, tmp_path):
    """With --prefill '' the opening tag stands in the chat template's prompt alone."""
    changed = copied(model, tmp_path)
    config = json.loads((changed / "tokenizer_config.json").read_text())
    config["chat_template"] += "{% if add_generation_prompt %}<think>{% endif %}"
    (changed / "tokenizer_config.json").write_text(json.dumps(config))
    (changed / "chat_template.jinja").unlink(missing_ok=True)
    args = ["--model", str(changed), "--problems", str(problems), "--output", str(tmp_path / "out"), "--prefill", ""]
    args, cpu = evaluate.parse_arguments(args), evaluate.torch.device("cpu")
    for path, expected in ((changed, [False, True]), (model, [True, True])):
        [opened] = evaluate.Model(str(path), [read_benchmark(problems)], args, cpu).stores
        texts = r"maybe \boxed{0}? let", r"so</think> \boxed{0}"
        assert [opened.scored({"id": "s0", "response": text})["correct"] for text in texts] == expected


@pytest.mark.parametrize("rows, message", [
    ([{"id": "s0", "response": "a"}], "problem 's1' of sums lacks sample 0 of 1"),
    ([{"id": f"s{i}", "response": ["a"] * (2 - i // 4)} for i in range(5)], "problem 's4' of sums lacks sample 1 of 2"),
    ([{"id": "other", "response": "a"}], "line 1: id 'other'"), ([{}], "line 1: no key 'id'"),
    ([{"id": None, "response": "a"}], "line 1: no key 'id'"), ([{"problem_id": "s0"}], "line 1: no key 'id'"),
    ([], "bad.jsonl: no samples"), ([{"id": "s0", "text": "a"}], "line 1: expected 'response'"),
    ([{"id": "s0", "response": [3]}], "line 1: expected 'response'"),
    ([{"id": "s0", "sample": 0, "response": "a"}] * 2, "line 2: sample 0 of id 's0' occurs twice"),
    ([{"id": "s0", "sample": -1, "response": "a"}], "line 1: 'sample' is '-1'"),
    ([{"id": "s0", "sample": True, "response": "a"}], "line 1: 'sample' is 'True'"),
    ([{"id": "s0", "sample": "1", "response": "a"}], "line 1: 'sample' is '1'"),
])  # fmt: skip
def test_samples_that_cannot_be_scored_are_named(problems, tmp_path, rows, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        score(write(tmp_path / "bad.jsonl", rows), problems, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_where_one_of_two_benchmarks_lacks_samples(problems, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"id": "o0", "problem": "1", "answer": "1"}])
    samples = write(tmp_path / "some.jsonl", [{"id": f"s{i}", "response": "a"} for i in range(5)])
    with pytest.raises(ValueError, match="problem 'o0' of other lacks sample 0 of 1"):
        score(samples, problems, other, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scored_again_it_changes_no_byte_and_other_samples_are_refused(problems, tmp_path):
    rows = [{"id": f"s{i}", "response": rf"\boxed{{{i}}}", "finish_reason": 3} for i in range(5)]
    samples = write(tmp_path / "some.jsonl", rows)
    score(samples, problems, "--output", tmp_path / "out")
    files = files_in(tmp_path / "out")
    score(samples, problems, "--output", tmp_path / "out")
    assert files == files_in(tmp_path / "out")
    write(samples, [{"id": f"s{i}", "response": "b"} for i in range(5)])
    with pytest.raises(ValueError, match="has samples made with samples_digest"):
        score(samples, problems, "--output", tmp_path / "out")
    assert files == files_in(tmp_path / "out")


def test_redi_is_imported_before_torch():
    """It sets environment variables that torch reads while it is imported."""
    watch = """
import sys
class Watch:
    def find_spec(self, name, *rest):
        if name == 'torch':
            print('redi' in sys.modules)
sys.meta_path.insert(0, Watch())
import evaluate"""
    found = run_python("-c", watch)
    assert found.stdout == "True\n", found.stderr


def test_help_tells_the_defaults_that_there_are(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    printed = capsys.readouterr().out
    assert r"(default: <think>\n)" in printed and "(default: 0)" in printed and "(default: None)" not in printed
    assert "python evaluate.py --score samples.jsonl" in printed  # laid out as it was written


def test_hostile_responses_are_scored_in_bounded_time(shared_data, tmp_path):
    hostile = read(shared_data / "answers" / "hostile.jsonl")
    rows = [{"id": str(i), "problem": "p", "answer": row["gold"] or "0"} for i, row in enumerate(hostile)]
    responses = [{"id": str(i), "response": rf"\boxed{{{row['pred']}}}"} for i, row in enumerate(hostile)]
    samples = write(tmp_path / "samples.jsonl", responses)
    started = time.process_time()
    score(samples, write(tmp_path / "hostile.jsonl", rows), "--output", tmp_path / "out")
    assert time.process_time() - started < 60
    scored = read(next((tmp_path / "out").rglob("samples.jsonl")))
    assert len(scored) == len(hostile)
    assert not [row for row, verdict in zip(hostile, scored) if row["expect"] is False and verdict["correct"]]
