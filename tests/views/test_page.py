"""The page in a real browser: Chromium without a window, driven by playwright."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import TINY
from test_serve import LONG, Running

from quill.interop import pretrained
from quill.views import insides

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

EVIL = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"


@pytest.fixture
def running(folder, text, call):
    """A server of a run that reads bytes, so that every text is one of its prompts."""
    Path("text.txt").write_text(text, encoding="utf-8")
    assert call("prepare", "tiny", "--input=text.txt", "--tokenizer=byte")[0] == 0
    assert call("train", *TINY, "--sample_at_eval=12")[0] == 0
    running = Running()
    yield running
    running.close()


@pytest.fixture(params=[1600, 320])
def page(running, request):
    """The page, wide and as on a phone. It fails a test that logs an error, or asks elsewhere."""
    wrong = []
    with sync_api.sync_playwright() as playwright:
        options = {"executable_path": CHROMIUM, "args": ["--no-sandbox"]}
        with playwright.chromium.launch(**options) as browser:
            page = browser.new_page(viewport={"width": request.param, "height": 800})
            page.set_default_timeout(20_000)
            page.on("console", lambda m: m.type in ("error", "warning") and wrong.append(m.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("request", lambda r: r.url.startswith(running.url) or wrong.append(r.url))
            page.goto(running.url)
            yield page
            assert page.title() == "Quill: out"
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width == request.param, "it scrolls sideways"
    expected = ("data:,", "Failed to load resource: the server responded with a status of 400")
    assert [line for line in wrong if not line.startswith(expected)] == []


def write(page, prompt: str, n_tokens: int, n_samples: int) -> None:
    page.fill("#prompt", prompt)
    page.fill("[name=max_tokens]", str(n_tokens))
    page.fill("[name=n]", str(n_samples))
    page.press("#prompt", "Control+Enter")


def test_write_and_stop(page, running):
    write(page, "the", 30, 3)
    page.locator(".state", has_text="length").nth(2).wait_for()
    answer = running.client.completions.create(
        model="out",
        prompt="the",
        max_tokens=30,
        n=3,
        seed=1337,
        temperature=0.8,
        extra_body={"top_k": 200},
    )
    shown = page.locator("#samples .written").all_text_contents()
    assert shown == [choice.text for choice in answer.choices]
    write(page, "the", LONG, 2)
    page.locator("#samples .written", has_text="e").first.wait_for()
    page.press("body", "Escape")
    page.locator(".state", has_text="stopped").nth(1).wait_for()
    running.wait_until_idle()


def test_choose_a_token_and_step_back(page, running):
    page.fill("#prompt", "the k")
    page.click("#tab-choose")
    second = page.locator("#candidates button").nth(1)
    token = int(second.get_attribute("data-id"))
    second.click()
    taken = f"the k{bytes([token]).decode()}"
    page.locator("#chosen", has_text=taken).wait_for()
    read = running.post("/page/read", {"text": taken, "temperature": 0.8, "top_k": 200}).json()
    page.locator(f"#candidates li:first-child button[data-id='{read['next'][0]['id']}']").wait_for()
    page.click("#back")
    sync_api.expect(page.locator("#chosen")).to_have_text("the k")
    page.click("#forward")
    sync_api.expect(page.locator("#chosen")).to_have_text(taken)
    page.locator("#back").evaluate("back => { for (let i = 0; i < 9; i++) back.click(); }")
    sync_api.expect(page.locator("#chosen")).to_have_text("the k")
    for shorter in ("the ", "the", "th", "t"):
        page.click("#back")
        sync_api.expect(page.locator("#chosen")).to_have_text(shorter)
    sync_api.expect(page.locator("#back")).to_be_disabled()


def test_a_token_shows_the_models_own_attention(page):
    page.click("#tab-see")
    page.fill("#see-text", "the king and queen")  # two more than the context of 16
    page.click("#see-form button")
    sync_api.expect(page.locator(".token")).to_have_count(18)
    assert page.locator(".token:disabled").count() == 2
    page.locator(".token").nth(10).click()
    head = page.get_by_label("layer 1, head 0")
    head.click()
    sync_api.expect(head).to_have_attribute("aria-pressed", "true")
    shown = page.locator(".token").evaluate_all("tokens => tokens.map((t) => t.dataset.value)")
    model = pretrained.from_folder(Path("out")).build().eval()
    ids = torch.tensor([*b"the king and queen"][2:11])
    with torch.no_grad():
        maps = insides.attention_maps(model, ids)
    wanted = [0, 0, *maps[1, 0, -1].tolist()]
    assert [float(value) for value in shown[:11]] == pytest.approx(wanted, abs=2e-5)
    assert shown[11:] == [""] * 7
    assert page.locator("#lens tr").count() == 3 and page.locator("#neighbours li").count() == 10
    page.locator(".token").nth(10).press("ArrowRight")
    assert page.evaluate("document.activeElement.textContent") == "d"


def test_the_samples_of_the_evaluations(page):
    page.focus("#tab-write")
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    page.locator("#curves .val").wait_for()
    slider = page.locator("#evaluation")
    sync_api.expect(page.locator("#evaluation-step")).to_contain_text("step 6")
    late = page.locator("#evaluation-sample").text_content()
    slider.focus()
    slider.press("Home")
    sync_api.expect(page.locator("#evaluation-step")).to_contain_text("step 0")
    assert page.locator("#evaluation-sample").text_content() != late
    with Path("out/metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "val_loss": 1.25, "train_loss": 1.5, "sample": "new"}\n')
    sync_api.expect(page.locator("#train-state")).to_contain_text("1.2500 at step 9")


def test_a_text_is_shown_and_never_run(page):
    write(page, EVIL, 5, 1)
    page.locator(".state", has_text="length").wait_for()
    page.get_by_text("Choose from here").click()
    sync_api.expect(page.locator("#chosen")).to_contain_text(EVIL)
    page.click("#tab-write")
    page.get_by_text("See this text").click()
    page.locator(".token").first.wait_for()
    with Path("out/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 9, "val_loss": 1.25, "sample": EVIL}) + "\n")
    page.click("#tab-train")
    sync_api.expect(page.locator("#evaluation-sample")).to_have_text(EVIL)
    assert page.locator("main img, main script").count() == 0


def test_an_error_is_shown_and_goes_away(page):
    page.fill("#prompt", "the")
    page.fill("[name=temperature]", "0.5")
    page.evaluate("document.querySelector('#prompt-form').noValidate = true")
    write(page, "the", 10**6, 1)
    sync_api.expect(page.locator("#error")).to_contain_text("max_tokens is at most 4,096")
    write(page, "the", 3, 1)
    sync_api.expect(page.locator("#error")).to_be_hidden()
    page.evaluate("console.clear()")
