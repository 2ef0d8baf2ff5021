"""Everything once, as `moyu study --quick` runs it: too small for verdicts, enough to see that each study still runs."""

import pytest

from moyu import records
from moyu.reporting import paper
from moyu.research import studies
from moyu.research.studies import running


@pytest.mark.slow
def test_every_study_runs_to_a_verdict(tmp_path):
    rows = running.run([], [], tmp_path, quick=True)
    assert [r.name for r in rows] == studies.names()
    assert all(r.quick and r.nulls and r.conditions for r in rows)
    by_name = {r.name: r for r in rows}
    assert by_name["theorem"].verdict == "HOLDS"
    exact = {c.name: c for c in by_name["figure2"].controls}
    assert exact["identity"].passed and exact["same sets"].passed
    assert {c.name: c.passed for c in by_name["prefix_swap"].controls} == {"floor": True}
    assert records.read(tmp_path / "studies.jsonl") == rows
    assert paper.section(rows) is not None
