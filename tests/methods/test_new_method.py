"""CONTRIBUTING's method: one file and one line, and it calibrates, applies, decodes natively and gets its page."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import moyu
from moyu import methods
from moyu.engine.applied import Applied
from moyu.kernels import cpu
from moyu.methods.needs import needs
from moyu.plan import Plan
from moyu.reporting import method_pages
from test_equality import one_pass, padded, plan_for, stepwise
from tiny import build

GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"


@pytest.fixture
def relative(tmp_path, monkeypatch):
    """The method of the guide, in a file of its own and a line of the list."""
    (text,) = re.findall(r"```python\n(\"\"\"Relative.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "relative.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(methods.METHODS, "relative", "relative:Relative")
    yield methods.method("relative")
    sys.modules.pop("relative", None)


def test_it_ranks_by_its_formula_and_survives_a_file(relative, tmp_path):
    model = build("llama")
    plan = plan_for(model, relative)
    assert {site.key for site in plan.sites()} == {f"layer{n}.mid.columns.down" for n in range(3)}
    loaded = Plan.load(plan.save(tmp_path / "plan"))
    assert loaded.hash == plan.hash and loaded.method == relative
    ids, mask = padded(3)
    expected, actual = one_pass(model, loaded, ids, mask), stepwise(model, loaded, ids, mask)
    assert (expected - actual)[mask.bool()].abs().max() < 1e-10
    site, params = next(iter(loaded.parts.values()))
    x = torch.randn(4, site.units, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = x.abs() / params.buffers["usual"]
    assert torch.allclose(relative.score(x, None, site, params, {}), by_hand)
    with pytest.raises(moyu.UserError, match="floor must be above 0, not 0"):
        methods.method("relative", floor=0)


def test_it_decodes_natively(relative):
    if cpu.unavailable() is not None:
        pytest.skip("the CPU kernels are not built")
    model = build("llama", torch.float32)
    plan = plan_for(model, relative)
    asked = {word for site, params in plan.parts.values() for word in needs(relative, site, params)}
    assert asked == {"columns by magnitude", "factors"}
    with Applied(model, plan) as applied:
        assert applied.native is not None, applied.general_because
    ids, mask = padded(1)
    expected, actual = (stepwise(model, plan, ids, mask, backend=b) for b in ("reference", "auto"))
    assert (expected - actual).abs().max() < 1e-4 * expected.abs().max()


def test_its_page_is_begun(relative, tmp_path, monkeypatch):
    monkeypatch.setattr(methods, "METHODS", {"relative": methods.METHODS["relative"]})
    method_pages.write(tmp_path)
    text = (tmp_path / "relative.md").read_text()
    assert "| reads beside the model | 0.1% of a gated block's weights at 50 % |" in text
    assert "score_j = |a_j|" in text and "- `floor` (1e-06): the least usual size." in text
    assert text.count(method_pages.TO_WRITE) == 2
    method_pages.write(tmp_path)  # what is there stays
    assert (tmp_path / "relative.md").read_text() == text
