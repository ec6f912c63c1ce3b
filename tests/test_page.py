"""The page of log-probs: its numbers against a naive computation, what it refuses, and the page in a browser."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from redi.analysis import page
from redi.example import water_tank
from redi.hub.weights import load_pretrained
from redi.tokenizer import Tokenizer
from tests import tiny

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<think>\nA naïve 🙂 </script><script>document.title = 'run'</script><!-- &lt;b&gt;\n</think>\n\\boxed{4}"


def write_pairs(path, texts, rows=()) -> None:
    """Pairs of (chosen, rejected) texts with the ids 0, 1, …, before other rows."""
    pairs = [{"id": i, "prompt": "What is 1 + 2?", "chosen": chosen, "rejected": rejected}
             for i, (chosen, rejected) in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, *rows]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models, before and after, and pairs.jsonl, whose first row is hostile."""
    folder = tmp_path_factory.mktemp("page")
    for seed, name in enumerate(("before", "after")):
        tiny.write_model(folder / name, seed=seed, max_position_embeddings=2048)
    tiny.write_rows(folder, examples=11)
    rows = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines())
    write_pairs(folder / "pairs.jsonl", [(HOSTILE, HOSTILE.replace("4", "3"))], rows)
    return folder


def make(folder, output, *flags, data="pairs.jsonl", after="after") -> dict:
    """The content of the page that the command writes."""
    page.main(["--before", str(folder / "before"), "--after", str(folder / after), "--data", str(folder / data),
               "--output", str(output), *map(str, flags)])
    html = output.read_text()
    [content] = [line for line in html.splitlines() if line.startswith('<script type="application/json"')]
    assert html.count("</script>") == 2
    return json.loads(content.partition(">")[2].removesuffix("</script>"))


def read(folder) -> list[page.Pair]:
    settings = page.TokenSettings(True, 800, 19000, 2048)
    return list(page.read_pairs(folder / "pairs.jsonl", [Tokenizer.from_pretrained(folder / "after")], settings))


@pytest.fixture(scope="module")
def expected(folder) -> list[list[tuple]]:
    """By pair and side: (token ids, log-probs of all tokens under both models (2, n, V), those of the ids (2, n)),
    from all logits at once, in fp64."""
    models, found = [load_pretrained(folder / name) for name in ("before", "after")], []
    for one in read(folder):
        found.append([])
        for ids in one.responses:
            logits = [tiny.all_logits(model, torch.tensor(one.prompt + ids))[len(one.prompt) - 1 :] for model in models]
            log_probs = torch.stack(logits).double().log_softmax(-1)
            found[-1].append((ids, log_probs, log_probs[:, range(len(ids)), ids].numpy()))
    return found


def test_scores_equal_a_naive_computation(folder, expected, monkeypatch):
    monkeypatch.setattr(page, "logit_rows", lambda vocab_size, on_cuda: 7)
    model = load_pretrained(folder / "after")
    for one, sides in zip(read(folder)[:4], expected):
        for ids, (_, (_, log_probs), (_, logps)) in zip(one.responses, sides):
            found, order = page.score_response(model, one.prompt, ids), log_probs.argsort(descending=True)
            np.testing.assert_allclose(found.logps, logps, atol=1e-5)
            assert found.ranks.tolist() == [row.index(id) + 1 for row, id in zip(order.tolist(), ids)]
            assert found.top_ids.tolist() == order[:, :5].tolist()
            np.testing.assert_allclose(found.top_logps, log_probs.gather(1, order[:, :5]), atol=1e-5)


def test_the_page_holds_both_models_numbers(folder, expected, tmp_path):
    content, tokenizer = make(folder, tmp_path / "a.html"), Tokenizer.from_pretrained(folder / "after")
    text, changes = content["vocabulary"].__getitem__, [one["change"] for one in content["pairs"]]
    assert changes == sorted(changes, reverse=True) and len(changes) == len(expected)
    for shown in content["pairs"]:
        sides, fork = expected[shown["row"]], shown["fork"]
        first, second = (ids for ids, _, _ in sides)
        assert first[:fork] == second[:fork] and first[fork] != second[fork]
        for side, (ids, log_probs, logps) in zip(shown["sides"], sides):
            assert "".join(map(text, side["tokens"])) == tokenizer.decode(ids, skip_special_tokens=False)
            assert side["special"] == [len(ids) - 1]
            likeliest = log_probs.topk(5)
            np.testing.assert_allclose(side["logps"], 1000 * logps, atol=0.51)
            np.testing.assert_allclose(side["sums"], logps.sum(1), atol=0.006)
            np.testing.assert_allclose(side["probs"], 1000 * likeliest.values.exp().flatten(1), atol=0.51)
            for found, ids in zip(side["alternatives"], likeliest.indices.flatten(1).tolist()):
                assert list(map(text, found)) == [tokenizer.decode([id], False) for id in ids]
        moved = np.concatenate([np.abs(new - old) for _, _, (old, new) in sides])
        assert shown["change"] == pytest.approx(moved.mean(), abs=6e-4)


def test_the_overview_is_of_all_scored_pairs(folder, expected, tmp_path):
    content = make(folder, tmp_path / "a.html", "--limit", 10, "--pairs", 2, "--pick", "first")
    overview, moved = content["overview"], {}
    assert content["scored"] == 10 and {one["row"] for one in content["pairs"]} == {0, 1}
    for s, side in enumerate(overview["sides"]):
        responses, profile = [sides[s] for sides in expected[:10]], [[] for _ in range(20)]
        deltas = [new - old for _, _, (old, new) in responses]
        for (ids, _, _), values in zip(responses, deltas):
            for t, (id, value) in enumerate(zip(ids, values)):
                profile[20 * t // len(ids)].append(value)
                moved.setdefault(id, ([], []))[s].append(value)
        flat = np.concatenate(deltas)
        np.testing.assert_allclose(side["logps"], [logps.mean(1) for _, _, logps in responses], atol=6e-4)
        np.testing.assert_allclose(side["profile"], list(map(np.mean, profile)), atol=6e-4)
        assert sum(side["histogram"]) == len(flat)
        assert side["histogram"][20] == pytest.approx((abs(flat) < 0.125).sum(), abs=1)
        assert side["histogram"][0] == pytest.approx((flat < -4.875).sum(), abs=1)
    lowest = min(overview["movers"], key=lambda mover: sum(mover["sums"]))
    id = min(moved, key=lambda id: sum(map(sum, moved[id])))
    assert lowest["context"][1] == Tokenizer.from_pretrained(folder / "after").decode([id], False)
    assert lowest["sums"] == pytest.approx(list(map(sum, moved[id])), abs=2e-3)
    assert lowest["counts"] == list(map(len, moved[id]))


def test_verdicts_come_from_the_checker(folder, tmp_path):
    (tmp_path / "problems.jsonl").write_text('{"id": "0", "problem": "1 + 2", "answer": ["2", "3"]}\n')
    flags = "--pick", "first", "--pairs", 1
    without = make(folder, tmp_path / "a.html", *flags)["pairs"][0]
    assert [(side["answer"], side.get("reason")) for side in without["sides"]] == [("4", None), ("3", None)]
    judged = make(folder, tmp_path / "a.html", *flags, "--problems", tmp_path / "problems.jsonl")["pairs"][0]
    assert judged["golds"] == ["2", "3"] and [side["correct"] for side in judged["sides"]] == [False, True]
    assert judged["sides"][0]["reason"].startswith("not equal: ")


def test_the_data_are_read_as_the_run_did_unless_a_flag_says_otherwise(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "after", tmp_path / "run/final")
    settings = {"prefill": "<think>", "system_prompt": "Be brief.", "append_end_of_text": "True", "dtype": "bfloat16",
                "max_prompt_tokens": "700", "max_response_tokens": "400", "max_tokens": "900"}
    (tmp_path / "run/run.json").write_text(json.dumps({"settings": settings}))
    used = []
    monkeypatch.setattr(page, "read_pairs", lambda path, tokenizers, settings: used.append(settings) or [])
    for after, flags in ((folder / "after", []), (tmp_path / "run/final", []),
                         (tmp_path / "run/final", ["--max-response-tokens", 50, "--prefill", r"<a>\n"])):
        with pytest.raises(ValueError, match="no pair within"):
            make(folder, tmp_path / "a.html", *flags, after=after)
    of_run = page.TokenSettings(True, 700, 400, 900, "<think>", "Be brief.", True)
    overridden = dataclasses.replace(of_run, max_response=50, prefill="<a>\n")
    assert used == [page.TokenSettings(True, 800, 19000, 2048), of_run, overridden]


@pytest.mark.parametrize("flags, message", [
    (["--data", "positives.jsonl"], "positives.jsonl, line 1: .*completion"),
    (["--before", "stranger"], "pairs.jsonl, line 1: .*stranger.* same tokenizer"),
    (["--max-response-tokens", "3"], "pairs.jsonl holds no pair within 800 .* 3 of response"),
    (["--problems", "other.jsonl"], "other.jsonl has none of the pairs' ids"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    (["--after", "empty"], "empty.*tokenizer.json"),
])  # fmt: skip
def test_bad_input_is_one_sentence(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir(exist_ok=True)
    (folder / "other.jsonl").write_text('{"id": "unknown", "problem": "p", "answer": "5"}\n')
    tiny.write_model(folder / "stranger", texts=["other texts make other merges: 1 + 2 = 3"], vocab_size=300)
    usual = ["--before", "before", "--after", "after", "--data", "pairs.jsonl", "--output", "bad.html"]
    with pytest.raises(ValueError, match=message) as raised:
        page.main([*usual, *flags])
    assert "\n" not in str(raised.value) and not (folder / "bad.html").exists()


@pytest.fixture
def browse():
    """Open a page; at the end there must have been no console message, no error, and no request but the page's."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright of tests/requirements.txt")
    if CHROMIUM is None:
        pytest.skip("needs a Chromium on the PATH: apt-get install chromium")
    messages, requests = [], []
    with api.sync_playwright() as playwright, playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]) as browser:

        def open_page(path, width=1280, scheme="light"):
            opened = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            opened.on("console", lambda message: messages.append(message.text))
            opened.on("pageerror", lambda error: messages.append(str(error)))
            opened.on("request", lambda request: requests.append(request.url))
            opened.goto(path.as_uri())
            return opened

        yield open_page
    assert messages == [] and len(requests) == 1


@pytest.mark.peers("playwright")
def test_a_browser_shows_tokens_details_and_colours(folder, tmp_path, browse):
    make(folder, tmp_path / "a.html", "--pick", "first", "--pairs", 1)
    opened = browse(tmp_path / "a.html")
    chosen, detail = opened.locator(".response").first, opened.locator("#detail")
    token = chosen.locator(".token").nth(5)
    assert chosen.inner_text().translate({ord("⏎"): None, ord("◌"): None}) == HOSTILE + "<|im_end|>"
    assert opened.title() != "run" and chosen.locator(".special").all_inner_texts() == ["<|im_end|>"]
    assert opened.locator(".response .fork").count() == 2 and detail.is_hidden()
    token.click()
    assert all(words in detail.inner_text() for words in ("token 6 of ", "log π", "rank", "likeliest after"))
    assert detail.locator(".alternative").count() == 10
    opened.keyboard.press("ArrowRight")
    assert "token 7 of " in detail.inner_text()
    opened.keyboard.press("Escape")
    assert detail.is_hidden()
    chosen.locator(".token").nth(3).hover()
    assert "token 4 of " in detail.inner_text()
    colours = set()
    for name in ("delta", "before", "after"):
        opened.locator(f"label:has([value={name}])").click()
        style = "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
        colours.add(tuple(chosen.locator(".token").evaluate_all(style)))
    assert len(colours) == 3


@pytest.mark.peers("playwright")
@pytest.mark.parametrize("width, scheme", [(1280, "dark"), (390, "light")])
def test_the_examples_page_fits_dark_and_narrow_screens(tmp_path, monkeypatch, browse, width, scheme):
    monkeypatch.setattr(water_tank, "TRAIN_PROBLEMS", 30)
    water_tank.write_data(tmp_path, seed=1)
    for seed, name in enumerate(("before", "after")):
        water_tank.write_model(tmp_path / name, seed)
    make(tmp_path, tmp_path / "a.html", "--problems", tmp_path / "teacher.jsonl")
    opened = browse(tmp_path / "a.html", width, scheme)
    assert opened.locator(".token").count() > 20 and opened.locator("#charts svg").count() == 3
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    opened.locator("summary").nth(1).click()
    opened.locator(".chips button").last.click()
    assert opened.locator(".response").count() == 4 and opened.locator("#detail").is_visible()
    assert "token" in opened.evaluate("document.activeElement.className")


@pytest.mark.peers("playwright")
def test_fifty_pairs_of_a_thousand_tokens_are_small_and_fold(folder, tmp_path, monkeypatch, browse):
    text, rng = "Let me think step by step: 1 + 2 = 3. " * 77, np.random.default_rng(0)
    write_pairs(tmp_path / "large.jsonl", [(text + str(i), text + str(i + 1)) for i in range(50)])

    def random_scores(model, prompt, response):
        n = len(response)
        tops = rng.integers(0, 300, (n, 5)), np.log(rng.dirichlet(np.ones(9), n)[:, :5])
        return page.Scores(-rng.exponential(1, n), rng.integers(1, 300, n), *tops)

    monkeypatch.setattr(page, "score_response", random_scores)
    content = make(folder, tmp_path / "a.html", "--pairs", 50, data=tmp_path / "large.jsonl")
    assert len(content["pairs"]) == 50 and 1000 <= len(content["pairs"][0]["sides"][0]["tokens"]) < 1100
    assert (tmp_path / "a.html").stat().st_size <= 10e6
    opened = browse(tmp_path / "a.html")
    assert opened.locator(".token").count() == 1200  # of the first pair only
    opened.locator(".more").first.click()
    assert 1600 < opened.locator(".token").count() < 1700
