"""docs/evidence.md says what its records say."""

import json
from pathlib import Path

from moyu import records
from moyu.model import zoo
from moyu.research import evidence

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def test_the_page_shows_the_committed_records():
    facts = json.loads((RESULTS / "evidence-training.json").read_text())
    rows = records.read(RESULTS / "evidence.jsonl")
    embedded = {name: zoo.describe(name) for name in zoo.names()}
    parts = evidence.sections(rows, records.read(RESULTS / "studies.jsonl"), facts, embedded)
    page = (ROOT / "docs" / "evidence.md").read_text()
    for name, text in parts.items():
        assert text in page, f"{name}: run `python -m moyu.research.pages`"


def test_larger_models_are_matched_and_trained():
    facts = json.loads((RESULTS / "evidence-training.json").read_text())
    assert len({(f["tokens"], f["batch"], f["seed"]) for f in facts.values()}) == 1
    for name, own in facts.items():
        assert own["bits_per_byte"]["held_out"] < 1 < own["bits_per_byte"]["shuffled_text"]
        zeros = [sum(series[0]) / len(series[0]) for _, series in own["on_the_way"]]
        assert (zeros[-1] > zeros[0] + 0.3) is name.startswith("relu")
