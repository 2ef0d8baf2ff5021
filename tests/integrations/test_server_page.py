"""The chat page in a real browser: phone and desk, light and dark, and nothing asked of any other machine."""

from __future__ import annotations

import pytest

from integrations.serving import embedded, running
from reporting.test_page import ARGUMENTS, browser

__all__ = ["browser"]
HOSTILE = "<img src=http://example.invalid/x onerror=alert(1)> reads a file"


@pytest.fixture(scope="module")
def server():
    with running(*embedded("relu", None)) as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_a_conversation_on_the_page(browser, server, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda m: messages.append(m.text))
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(server.url)
    page.wait_for_function("document.getElementById('model').options.length === 1")
    page.fill("#tokens", "12")
    page.fill("#temperature", "0")
    for turn in (1, 2):
        page.fill("#text", HOSTILE)
        page.press("#text", "Enter")
        page.wait_for_function(f"document.querySelectorAll('article.assistant small').length === {turn}")
    assert page.locator("article.user").first.inner_text() == HOSTILE
    assert "12 written" in page.locator("article.assistant small").first.inner_text()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(21, 23, 26)") == (scheme == "dark")
    page.fill("#tokens", "100000")
    page.fill("#text", "x")
    page.click("#send")
    page.wait_for_selector("article.error")
    assert "set max_tokens to" in page.locator("article.error").inner_text()
    page.fill("#tokens", "200")
    page.fill("#text", "x")
    page.click("#send")
    page.wait_for_function("document.getElementById('send').textContent === 'Stop'")
    page.click("#send")
    server.waits_for(lambda: server.idle)
    page.click("#reset")
    assert page.locator("article").count() == 0
    assert all(url.startswith(server.url) or url.startswith("data:") for url in requests)
    assert [m for m in messages if "400" not in m] == []
    page.close()
