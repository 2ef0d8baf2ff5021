"""What docs/paper.md says is what the committed records say."""

from pathlib import Path

import pytest

from moyu import records
from moyu.research import studies
from moyu.research.studies.running import markdown, sentence

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def rows():
    return records.read(ROOT / "docs" / "results" / "studies.jsonl")


def test_every_study_was_run_in_full(rows):
    assert {r.name for r in rows} == set(studies.names())
    assert not any(r.quick for r in rows)


def test_documented_verdicts_are_the_records(rows):
    page = (ROOT / "docs" / "paper.md").read_text()
    assert markdown(rows) in page and sentence(rows) in page, "run `python -m moyu.research.pages`"


def test_recorded_verdicts_follow_from_the_stated_rules(rows):
    for row in rows:
        study = studies.study(row.name)
        assert [c.rule for c in row.conditions] == [c.rule for c in study.conditions], row.name
        found = {c.verdict for c in row.conditions}
        passed = all(c.passed for c in row.controls)
        expected = "FAILS" if "FAILS" in found else "HOLDS" if found == {"HOLDS"} else "INCONCLUSIVE"
        assert row.verdict == (expected if passed else "INCONCLUSIVE"), row.name
