"""Every method has a page whose head is what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moyu import methods
from moyu.reporting import method_pages

FOLDER = Path(__file__).parents[2] / "docs" / "methods"
SECTIONS = ["Formula", "Knobs", "When to use it", "Weaknesses"]


def test_there_is_a_page_a_method():
    assert sorted(p.stem for p in FOLDER.glob("*.md")) == sorted(methods.names())


@pytest.mark.parametrize("name", methods.names())
def test_head_is_what_the_registry_says(name):
    text = (FOLDER / f"{name}.md").read_text()
    head = re.search(method_pages.HEAD, text, re.DOTALL)
    assert head is not None
    assert f"{head[1]}{method_pages.head(name)}\n<!-- /head -->" == head[0], "run `python -m moyu.research.pages`"


@pytest.mark.parametrize("name", methods.names())
def test_page_is_written(name):
    text = (FOLDER / f"{name}.md").read_text()
    parts = dict(re.findall(r"^## ([^\n]+)\n\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE))
    assert [title for title in parts if title != "What it did here"] == SECTIONS
    assert re.search(r"<!-- /head -->\n\n\w.{100}", text, re.DOTALL)  # what it does
    assert all(len(part) > 20 for part in parts.values())
    assert method_pages.TO_WRITE not in text
    assert (
        "score" in parts["Formula"]
        or "keep" in parts["Formula"]
        or "skip" in parts["Formula"]
        or "S(v)" in parts["Formula"]
    )
    for knob in methods.method(name).knobs():
        assert f"- `{knob}` (" in parts["Knobs"]
    for link in re.findall(r"\]\((\S+?\.md)\)", text):
        assert (FOLDER / link).exists(), link
