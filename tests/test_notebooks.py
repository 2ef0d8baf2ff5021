"""The notebooks run on a machine that has no pretrained model, and what they show is what a run printed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def script():
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "scripts" / "notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if p.stem == "first_plan" else ()) for p in NOTEBOOKS],
    ids=lambda p: p.stem,
)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOYU_MODELS", str(tmp_path))
    ran = script().run(path)
    assert all(cell["outputs"] for cell in script().code(ran)[1:]), "a cell shows nothing"
    if path.stem == "first_plan":
        assert "an embedded model takes its place" in str(script().code(ran)[0]["outputs"])


def test_the_notebooks_show_what_they_printed():
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        cells = script().code(json.loads(path.read_text(encoding="utf-8")))
        assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "run `make notebooks`"
