"""The chat page in a real browser: phone and desk, light and dark, and nothing asked of any other machine."""

from __future__ import annotations

import pytest

from integrations.serving import embedded, running

HOSTILE = "<img src=http://example.invalid/x onerror=alert(1)> reads a file"


@pytest.fixture(scope="module")
def server():
    with running(*embedded("relu", None), context=512, new_tokens=512) as found:
        yield found


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_a_conversation_on_the_page(browser, server, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 700}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda m: messages.append(m.text))
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(server.url)
    page.locator("#model option").wait_for(state="attached")
    page.fill("#tokens", "12")
    page.fill("#temperature", "0")
    for turn in (0, 1):
        page.fill("#text", HOSTILE)
        page.press("#text", "Enter")
        page.locator("article.assistant small").nth(turn).wait_for()
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
    page.fill("#tokens", "350")
    page.fill("#text", "x")
    cancelled = server.engine.metrics.cancelled._value.get()
    page.click("#send")
    page.get_by_role("button", name="Stop").click()
    server.waits_for(lambda: server.engine.metrics.cancelled._value.get() == cancelled + 1)
    page.click("#reset")
    assert page.locator("article").count() == 0
    assert all(url.startswith(server.url) or url.startswith("data:") for url in requests)
    assert [m for m in messages if "400" not in m] == []
    page.close()
