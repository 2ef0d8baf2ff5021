"""The report: what it says, what it leaves out, and that nothing in a record can break it."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from moyu.errors import UserError
from moyu.reporting import render, tables, write_report
from moyu.reporting.summary import headline, warnings
from reporting.sample import METHODS, environment, full, generation, make, profile, quality, speed

SECTIONS = ["summary", "quality", "speed", "over-activation", "generations", "kernels", "studies", "coverage"]
ALWAYS = ["environment", "reproduce", "glossary"]
HOSTILE = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</pre><img src=http://example.invalid/x>"


class _Page(HTMLParser):
    """Tags, ids and text; fails where tags do not match."""

    VOID = ("meta", "col", "img", "br")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.ids, self.text = [], [], [], ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [v for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_full_run_fills_every_section():
    page = _Page(render(full()))
    assert [s for s in SECTIONS + ALWAYS if s not in page.ids] == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 8  # quality, layers, 2 × (speed-up, reading), needed by layer and by position
    assert "random weights: speed only" in page.text
    for name, *_ in METHODS:
        assert name in page.text


@pytest.mark.parametrize(
    ("rows", "present"),
    [
        ([quality()], {"summary", "quality"}),
        ([speed()], {"summary", "speed"}),
        ([profile()], {"summary", "over-activation"}),
        ([generation()], {"summary", "generations"}),
        ([environment()], {"summary"}),
    ],
)
def test_parts_without_records_are_left_out(rows, present):
    ids = _Page(render(rows)).ids
    assert {s for s in SECTIONS if s in ids} == present
    assert [s for s in ALWAYS if s not in ids] == []


def test_optional_numbers_may_be_missing():
    bare = dict.fromkeys(
        ["ppl_random", "kl_random", "ppl_oracle", "kl_oracle", "bits_per_byte_dense", "byte_fraction", "protocol"]
    )
    page = _Page(
        render([quality(**bare, sparsity_by_layer=[]), profile(layers=[], token_curve=[]), speed(gb_s_dense=None)])
    )
    assert "oracle" not in page.text.split("Glossary")[0].lower()


def test_no_records_is_an_error_with_a_next_step(tmp_path: Path):
    with pytest.raises(UserError, match="moyu run"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_method_below_its_floor_has_a_status_and_no_numbers():
    empty = dict.fromkeys(
        ["realized_sparsity", "byte_fraction", "tokens", "ppl_dense", "ppl", "kl", "top1_agreement", "ppl_random"]
    )
    empty |= dict.fromkeys(["kl_random", "ppl_oracle", "kl_oracle", "bits_per_byte_dense", "bits_per_byte"])
    row = quality(METHODS[1], **empty, sparsity_by_layer=[], status="n/a (floor 0.64)", floor=0.64)
    page = _Page(render([quality(), row]))
    assert "n/a (floor 0.64)" in page.text
    assert "no method could meet the target" in " ".join(headline([row]))


def test_simulated_and_skipped_quality_do_not_share_a_table():
    text = _Page(render([quality(), quality(METHODS[1], simulated=False)])).text
    assert "swiglu, simulated by masking" in text and "swiglu, really skipped" in text


def test_records_are_text_never_markup():
    rows = [
        environment(command=HOSTILE, device=HOSTILE, notes=[HOSTILE]),
        quality(model=HOSTILE, method=HOSTILE, corpus={HOSTILE: HOSTILE}),
        speed(model=HOSTILE, method=HOSTILE, context=HOSTILE, backend=HOSTILE),
        generation(
            prompt=HOSTILE,
            sparse_text=HOSTILE,
            dense_text="",
            dense_tokens=[],
            sparse_tokens=[HOSTILE],
            first_difference=0,
        ),
        make(kind="study", name=HOSTILE, verdict="FAILS"),
        make(kind="coverage", architecture=HOSTILE, taken=False, reason=HOSTILE),
    ]
    page = _Page(render(rows))
    assert not {"script", "img"} & set(page.tags)
    assert HOSTILE in page.text


def test_differences_are_marked_from_the_first_one_on():
    html = render([generation(METHODS[2], 10)])
    assert html.count("<mark>") == 6
    assert "<mark>" not in render([generation()])
    pieces = generation(METHODS[2], 10, dense_tokens=["\ufffd", "\ufffd"])  # a character may span several tokens
    assert "with open(<mark>" not in render([pieces]) and "<mark>" in render([pieces])


def test_the_headline_claims_what_the_records_hold():
    first, *rest = headline([*(quality(m) for m in METHODS), *(speed(m) for m in METHODS)])
    assert "Of 6 plans on swiglu, cett" in first and "0.69" in first and "simulated" in first
    told, recommended = rest
    assert recommended == "Recommended for swiglu: dense. The fastest of the plans below 0.1 nats has 0.76× its speed."
    assert (
        "Measured on swiglu: cett with 49.7% of its units skipped decodes at 0.76× the speed of dense, which is slower"
        in told
    )
    faster = speed(METHODS[0], plan="other", realized_sparsity=0.8, tok_s=344.0, speedup=2.0)
    assert "0.76×" in headline([quality(), speed(), faster])[1]  # not a speed at another sparsity than the quality's
    assert "no method here saves bytes and stays below" in headline([quality(METHODS[5])])[0]
    assert "with random weights" in headline([speed(shape=True)])[0]
    kernels = headline([speed(tok_s_kernels=200.0)])[0]
    assert (
        "cett with 49.7% of its units skipped decodes at 0.66× the speed of MOYU's own dense loop, which is slower"
        in kernels
    )
    assert "That loop has 1.16× the speed of the baseline" in kernels
    free = quality(method="oracle", family="reference", byte_fraction=0.3)
    assert "oracle" not in headline([quality(), free])[0]


def test_the_plan_that_is_recommended_stays_close_and_is_about_as_fast_as_the_fastest():
    rows = [quality(m) for m in METHODS]
    shape = [speed(m, shape=True) for m in METHODS]
    assert (
        "Recommended for swiglu: cett, which reads the fewest bytes of the plans below 0.1 nats" in headline(rows)[-1]
    )
    assert "cett, the closest of the fast plans: 0.0210 nats at " in headline([*rows, *shape])[-1]
    assert "with random weights" in headline([*rows, *shape, *(speed(m) for m in METHODS)])[-1], (
        "swiglu is too small to time"
    )
    fast, close = quality(METHODS[1]), quality()
    timed = [speed(METHODS[1], shape=True, tok_s=48.6, speedup=2.0), speed(shape=True, tok_s=36.45, speedup=1.5)]
    assert "cats, the closest" in headline([fast, close, *timed])[-1], (
        "a plan that is much slower is not taken for its KL"
    )
    assert "none of these plans" in headline([quality(METHODS[5])])[-1]


def test_warnings_name_what_must_be_known():
    said = " ".join(warnings([*full(), quality(METHODS[1], kl=0.99)]))
    assert "popularity, cats at 51.2% on swiglu: KL above 0.5" in said
    assert "cats at 51.2% on swiglu: no better than its matched random" in said
    assert "swiglu reads 46 MB per token" in said and "skipping is slower than dense" in said
    fast = speed(METHODS[0], tok_s=1000.0, speedup=1000 / 172, ceiling_share=1.2)
    assert "faster than its bytes allow" in " ".join(warnings([fast]))
    assert "so the rest is not from skipping" in headline([fast])[0]
    assert "noisy" in " ".join(warnings([speed(p80=1.0)]))
    assert "from a cache" in " ".join(warnings([fast]))
    assert warnings([quality()]) == []
    assert "fewer than 1,000 tokens were scored" in warnings([quality(tokens=381)])[0]
    assert "more than one state" in warnings([quality(), quality(commit=None)])[0]


def test_the_terminal_shows_every_table():
    shown = tables(full())
    assert [t.row_count for t in shown] == [6, 6, 6]
    with (console := Console(width=100)).capture() as printed:
        console.print(*shown)
    assert "…" not in printed.get()
    assert all(name in printed.get() for name, *_ in METHODS)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (1280, "dark")])
def test_the_page_in_a_browser(browser, tmp_path: Path, width, scheme):
    path = tmp_path / "report.html"
    write_report([*full(), quality(METHODS[0], model="x" * 90), generation(prompt=HOSTILE)], path)
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    messages, requests = [], []
    page.on("console", lambda m: messages.append(m.text))
    page.on("pageerror", lambda e: messages.append(str(e)))
    page.on("request", lambda r: requests.append(r.url))
    page.goto(path.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert messages == []
    assert requests == [path.as_uri()]
    for section in SECTIONS + ALWAYS:
        assert page.locator(f"#{section} h2").is_visible()
    boxes = page.evaluate("[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)")
    assert boxes and all(200 < w <= width for w in boxes)
    outside = """[...document.querySelectorAll('svg text')].filter(t => {
        const a = t.getBoundingClientRect(), b = t.closest('svg').getBoundingClientRect();
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1;
    }).map(t => t.textContent)"""
    assert page.evaluate(outside) == []
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 26)"
    assert dark == (scheme == "dark")
    page.close()
