"""The page on the four kinds is what the registry declares."""

from __future__ import annotations

import re
from pathlib import Path

from moyu import methods
from moyu.research.pages import drawing, table
from moyu.research.studies.figure1 import OUTSIDE

DOCS = Path(__file__).parents[2] / "docs"


def test_page_and_drawing_are_the_registrys():
    page = (DOCS / "kinds.md").read_text()
    assert f"-->\n{table()}\n<!-- /kinds -->" in page, "run `python -m moyu.research.pages`"
    assert (DOCS / "results" / "figure1.svg").read_text() == drawing(), "run `python -m moyu.research.pages`"


def test_every_dynamic_method_has_its_place():
    placed = re.findall(r"\[`([\w-]+)`\]", table())
    assert placed and sorted(placed) == sorted(r["method"] for r in methods.table() if r["family"] not in OUTSIDE)
    assert all(name in drawing() for name in ("teal", "polar", "lte", "clada"))
