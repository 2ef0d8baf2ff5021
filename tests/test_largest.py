"""A budget of what skipping may cost: the plan that is found keeps to it on the text that decides, and skips more where more is allowed."""

from __future__ import annotations

import dataclasses

import pytest

from moyu.calibration.context import Context
from moyu.calibration.largest import Allowed, _between, largest
from moyu.calibration.settings import Settings
from moyu.errors import UserError
from moyu.measure.evaluation import evaluate
from tiny import lettered


@pytest.fixture(scope="module")
def context():
    settings = Settings(methods=("levels", "teal"), weights="q8_0", window=64, boundary=24, calibration=4, test=4)
    return Context.of(lettered(), settings)


def measured(context, plan):
    return evaluate(context.loaded.model, plan, context.split.validation, matched=False, anatomy=context.anatomy)


@pytest.mark.parametrize("method", ["levels", "teal"])
def test_the_plan_keeps_to_the_kl_and_skips_more_where_more_is_allowed(context, method):
    stages, read = [], []
    for most in (0.003, 0.008):
        plan = largest(context, method, Allowed("kl", most), lambda *stage: stages.append(stage))
        found = measured(context, plan)
        search = plan.calibration["search"]
        assert search["max_kl"] == most and search["kl"] == pytest.approx(float(found.method.kl.mean()), rel=1e-4)
        assert most / 3 < search["kl"] <= most
        read.append(found.byte_fraction)
    assert read[1] < read[0] - 0.005 < 1  # a head without sites is most of these bytes
    assert stages[-1][1] == stages[-1][2], "the search ends at its count"


def test_a_rise_of_perplexity_is_a_budget_as_well(context):
    plan = largest(context, "levels", Allowed("ppl_increase", 0.01))
    found = measured(context, plan)
    assert found.method.perplexity / found.dense.perplexity - 1 == pytest.approx(
        plan.calibration["search"]["ppl_increase"], abs=1e-6
    )
    assert plan.calibration["search"]["ppl_increase"] <= 0.01


@pytest.mark.parametrize("asked", [{"learn_bias": 2}, {"allocation": "fisher"}])
def test_what_else_is_asked_for_is_done_for_a_method_that_divides(context, asked):
    settings = dataclasses.replace(context.settings, **asked)
    plan = largest(dataclasses.replace(context, settings=settings), "levels", Allowed("kl", 0.03), steps=2)
    assert (plan.compensation == "learned bias") is ("learn_bias" in asked)
    assert ("chosen" in plan.calibration["allocation"]) is ("allocation" in asked)  # as `calibrate_allocated` notes it


def test_what_costs_too_much_at_its_least_is_refused(context):
    with pytest.raises(UserError, match="exceeds a KL of 1e-12"):
        largest(context, "teal", Allowed("kl", 1e-12), steps=2)


def test_the_next_amount_lies_where_the_cost_is_about_what_is_allowed():
    assert _between((0.0, 0.0), (1.0, float("inf")), 0.1) == 0.5
    assert _between((0.2, 0.001), (0.4, 0.1), 0.01) == pytest.approx(0.2 + 0.2 * 0.4888, rel=1e-2)
    assert _between((0.2, 0.001), (0.4, 0.1), 0.0999) == pytest.approx(0.38), "inside, so that the search goes on"
