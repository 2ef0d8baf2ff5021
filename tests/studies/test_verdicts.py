"""The rule between an interval and a verdict, and every study against data whose answer is known."""

import numpy as np
import pytest

from moyu import records
from moyu.measure.statistics import Interval
from moyu.research import studies, theory
from moyu.research.studies.base import Setup
from moyu.research.studies.running import record, statement, summary, verdict_line
from moyu.research.studies.theorem import Theorem
from moyu.research.studies.verdicts import Condition, Control, Finding, judge
from studies.synthetic import CASES

ABOVE = Condition("effect", "size", "above", 0.0, 0.1)
BELOW = Condition("effect", "size", "below", 0.0, 0.1)
WITHIN = Condition("effect", "size", "within", 1.0, 0.1)


def _interval(low, high):
    return Interval((low + high) / 2, low, high, 10)


@pytest.mark.parametrize(
    ("condition", "low", "high", "verdict"),
    [
        (ABOVE, 0.05, 0.3, "HOLDS"),
        (ABOVE, -0.05, 0.05, "FAILS"),  # no effect, by equivalence
        (ABOVE, 0.01, 0.05, "FAILS"),  # significant, and too small to matter
        (ABOVE, -0.4, -0.2, "FAILS"),
        (ABOVE, -0.2, 0.3, "INCONCLUSIVE"),  # holds 0: p > 0.05 alone decides nothing
        (BELOW, -0.3, -0.05, "HOLDS"),
        (BELOW, -0.05, 0.05, "FAILS"),
        (BELOW, -0.3, 0.2, "INCONCLUSIVE"),
        (WITHIN, 0.95, 1.05, "HOLDS"),
        (WITHIN, 1.2, 1.3, "FAILS"),
        (WITHIN, 0.95, 1.3, "INCONCLUSIVE"),
    ],
)
def test_rule(condition, low, high, verdict):
    assert condition.verdict(_interval(low, high)) == verdict


def test_what_was_not_measured_decides_nothing():
    assert ABOVE.verdict(None) == "INCONCLUSIVE"


def test_one_failure_fails_and_a_broken_instrument_says_nothing():
    good, bad, open_ = _interval(0.05, 0.3), _interval(-0.05, 0.05), _interval(-0.2, 0.3)
    two = (ABOVE, Condition("other", "size", "above", 0.0, 0.1))
    assert judge(two, (), Finding({"effect": good, "other": good})) == "HOLDS"
    assert judge(two, (), Finding({"effect": good, "other": bad})) == "FAILS"
    assert judge(two, (), Finding({"effect": good, "other": open_})) == "INCONCLUSIVE"
    control = Control("floor", "noise", "at most", 0.01)
    for value, verdict in ((0.0, "HOLDS"), (0.5, "INCONCLUSIVE"), (float("nan"), "INCONCLUSIVE")):
        assert judge((ABOVE,), (control,), Finding({"effect": good}, {"floor": value})) == verdict


def test_every_study_has_cases_nulls_and_a_statement():
    assert list(CASES) == studies.names()
    for name in studies.names():
        item = studies.study(name)
        text = statement(item)
        assert item.name == name and item.claim in text and item.refutation in text
        assert all(c.rule in text for c in item.conditions)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("case", ["HOLDS", "FAILS", "INCONCLUSIVE"])
def test_known_answers(name, case, monkeypatch):
    monkeypatch.setattr(theory.bootstrap, "__kwdefaults__", {"resamples": 150, "seed": 0})  # ten times as fast
    item = studies.study(name)
    observed = CASES[name][["HOLDS", "FAILS", "INCONCLUSIVE"].index(case)]
    row = record(item, Setup(None), item.analyse(observed), 1.0)
    assert row.verdict == case, summary(row)
    assert row.nulls and all(np.isfinite(v) for v in row.nulls.values())
    assert row.interval is not None and all(c.power is not None for c in row.conditions if c.value is not None)
    assert records.validate(row.model_dump()) == row


@pytest.mark.parametrize("broken", ["labels", "mean"])
def test_theorem_turns_red_when_an_assumption_is_broken(broken):
    class Small(Setup):
        def size(self, full, quick):
            return 20_000

    item = Theorem(broken=broken)
    assert judge(item.conditions, item.controls, item.analyse(item.observe(Small(None)))) == "FAILS"


def test_theorem_holds():
    item = Theorem()
    finding = item.analyse(item.observe(Setup(None, quick=True)))
    assert judge(item.conditions, item.controls, finding) == "HOLDS"
    assert finding.nulls["cells where a wrong sign is significant"] == 0


def test_negative_verdicts_stand_beside_the_others():
    setup = Setup("m")
    vars(setup)["made_from"] = "0" * 16  # there is no such model
    rows = [
        record(studies.study("dominance"), setup, studies.study("dominance").analyse(c), 1.0)
        for c in CASES["dominance"]
    ]
    line = verdict_line(rows)
    assert line == "HOLDS: dominance (m); FAILS: dominance (m); INCONCLUSIVE: dominance (m)"
    assert "too small to count" not in summary(rows[0])
