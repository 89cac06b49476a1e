"""The page at ``/`` in a real browser: it streams an answer and shows what every layer read while it does."""

import shutil
from importlib.util import find_spec

import httpx
import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_a_browser = pytest.mark.skipif(
    BROWSER is None or find_spec("playwright") is None,
    reason="needs a browser (apt install chromium) and playwright (pip install 'kvoffload[test]')",
)
STRIPS = ("read", "hits", "completed")


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium):
    """Opens the page of a server; nothing may go wrong in its console, and nothing may go anywhere else."""
    pages, complaints, asked = [], [], []

    def go(served):
        page = chromium.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: asked.append((served.url, request.url)))
        page.goto(served.url + "/")
        pages.append(page)
        return page

    go.complaints = complaints
    yield go
    for page in pages:
        page.close()
    assert [url for own, url in asked if not url.startswith((own + "/", "data:"))] == []
    assert [told for told in complaints if "401" not in told] == []


def say(page, text, *, n=12, budget="25%"):
    page.fill("#prompt", text)
    page.fill("#max", str(n))
    page.fill("#budget", budget)
    page.click("#send")


def shows(page, selector, text):
    """Wait until an element contains a text; the page's policy forbids what wait_for_function does."""
    from playwright.sync_api import expect

    expect(page.locator(selector)).to_contain_text(text, timeout=30_000)


def values(page, strip):
    """What a strip's cells show, 0 to 1."""
    return page.eval_on_selector_all(
        f"#{strip} > div", "cells => cells.map(cell => Number(cell.style.getPropertyValue('--value')))"
    )


TEXT = "Tell me of rivers and of the sea. " * 6


@in_a_browser
def test_an_answer_streams_in_and_every_layer_shows_what_it_read(visit, serve):
    served = serve(gpu_cache="64KiB")
    page = visit(served)
    say(page, TEXT)
    shows(page, "#status", "done")
    with served.client() as client:
        messages = [{"role": "user", "content": TEXT}]
        answer = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, extra_body={"kvoffload": {"budget": "25%"}}
        )
    assert page.text_content(".turn.assistant") == answer.choices[0].message.content
    assert f"{answer.usage.prompt_tokens} prompt tokens" in page.text_content("#status")
    n_layers = served.service.scheduler._runtime.loaded.config.num_hidden_layers
    for strip in STRIPS:
        cells = values(page, strip)
        assert len(cells) == n_layers
        assert all(0 <= value <= 1 for value in cells)
        assert max(cells) > 0, strip
        assert page.text_content(f"#{strip}-now")
    assert page.get_attribute("#read > div", "title").endswith(" tok")


@in_a_browser
def test_the_strips_change_while_the_answer_comes_and_stop_ends_it(visit, serve):
    served = serve()
    page = visit(served)
    say(page, TEXT, n=4000)
    seen = set()
    for _ in range(200):
        page.wait_for_selector("#completed > div")
        seen.add(tuple(values(page, "completed")))
        if len(seen) > 3:
            break
    assert len(seen) > 3
    assert page.is_enabled("#stop")
    page.click("#stop")
    served.until_idle()
    shows(page, "#status", "stopped")
    assert page.is_enabled("#send")


@in_a_browser
def test_what_a_model_says_is_text_and_never_markup(visit, serve, monkeypatch):
    hostile = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"
    monkeypatch.setattr("kvoffload.models.sampling.TextStream.push", lambda stream, token: hostile)
    page = visit(serve())
    say(page, hostile, n=3)
    shows(page, "#status", "done")
    assert page.text_content(".turn.user") == hostile
    assert page.text_content(".turn.assistant").startswith(hostile * 3)
    assert page.query_selector_all(".turn img, .turn script") == []
    assert page.title() == "kvoffload"


@in_a_browser
def test_with_a_key_the_page_opens_and_asks_for_it(visit, serve):
    page = visit(serve(api_key="a secret"))
    shows(page, "#status", "no API key")
    page.fill("#key", "wrong")
    page.press("#key", "Tab")
    shows(page, "#status", "wrong API key")
    page.fill("#key", "a secret")
    page.press("#key", "Tab")
    shows(page, "#model", "tiny")
    say(page, "Rivers.", n=2)
    shows(page, "#status", "done")


@in_a_browser
def test_a_refusal_is_shown(visit, serve):
    page = visit(serve())
    say(page, "Rivers.", budget="much")
    page.wait_for_selector("#status.failed")
    assert "'much' is not a budget" in page.text_content("#status")
    assert visit.complaints
    visit.complaints.clear()  # the browser's own line about the status 400


def test_the_page_may_load_nothing_from_anywhere_else(served):
    page = httpx.get(served.url + "/")
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for path in ("/", "/page.js", "/page.css"):
        text = httpx.get(served.url + path).text
        assert "://" not in text
        assert "innerHTML" not in text
