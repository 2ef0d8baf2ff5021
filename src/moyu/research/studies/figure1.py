"""Figure 1, drawn from the registry: the four kinds of dynamic activation and their methods.

A panel shows where the selector sits, what trains it, its granularity and what it skips, all as the methods declare it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from moyu import methods
from moyu.measure.statistics import Interval
from moyu.model.dissect import dissect
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.verdicts import Condition, Finding
from moyu.research.training import build

KINDS: dict[str, dict[str, str]] = {  # family -> panel
    "threshold": {
        "kind": "TDA",
        "name": "threshold dynamic activation",
        "selector": "a cut on the values of the token",
        "trained": "nothing: the cut is calibrated",
    },
    "router_off_loop": {
        "kind": "RODA",
        "name": "router-off-the-loop dynamic activation",
        "selector": "a predictor before the network",
        "trained": "the predictor, on activations of the frozen model",
    },
    "router_in_loop": {
        "kind": "RIDA",
        "name": "router-in-the-loop dynamic activation",
        "selector": "a router inside the network",
        "trained": "router and model together",
    },
    "sequence": {
        "kind": "sRIDA",
        "name": "sequential dynamic activation",
        "selector": "the prompt's own forward pass",
        "trained": "nothing: the prompt decides",
    },
}
OUTSIDE = ("static", "reference", "own")  # nulls, bounds and methods outside the paper


class Figure1(Study):
    """The taxonomy."""

    name: ClassVar[str] = "figure1"
    needs: ClassVar = "nothing"
    claim: ClassVar[str] = "Four kinds of dynamic activation cover the methods there are."
    prediction: ClassVar[str] = (
        "Every dynamic method of the registry declares one of the four families, and each has a member."
    )
    refutation: ClassVar[str] = (
        "A dynamic method that fits none of them. A kind without a member leaves the claim open."
    )
    conditions: ClassVar = (
        Condition(
            "methods placed", "share of the registry's dynamic methods in one of the four kinds", "above", 0.99, 0.01
        ),
        Condition("kinds filled", "share of the four kinds that have a member", "above", 0.99, 0.0),
    )

    def observe(self, setup: Setup) -> Observed:
        rows = [r for r in methods.table() if r["family"] not in OUTSIDE]
        return {"method": np.array([r["method"] for r in rows]), "family": np.array([r["family"] for r in rows])}

    def analyse(self, observed: Observed) -> Finding:
        families = [str(f) for f in observed["family"]]
        placed = float(np.mean([f in KINDS for f in families]))
        filled = float(np.mean([f in families for f in KINDS]))
        return Finding(
            {
                "methods placed": Interval(placed, placed, placed, len(families)),
                # A kind that is empty here may have methods elsewhere, so it widens the interval to the top.
                "kinds filled": Interval(filled, filled, 1.0, len(KINDS)),
            },
            nulls={"kinds that a random family would fill": 1 / len(KINDS)},
            details={"panels": panels(dict(zip(observed["method"].tolist(), families, strict=True)))},
            notes=(
                "a count, not a sample: intervals are degenerate; kinds and their members are our reading of the paper",
            ),
        )


def panels(families: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """One panel per kind: its declaration, members, granularities and what they skip; of the registry or as given."""
    families = {r["method"]: r["family"] for r in methods.table()} if families is None else families
    out = []
    for family, words in KINDS.items():
        members = [m for m, f in families.items() if f == family and m in methods.METHODS]
        classes = [methods.method_class(m) for m in members]
        out.append(
            {
                **words,
                "members": members,
                "granularity": sorted({c.granularity for c in classes}),
                "skips": skips(members),
            }
        )
    return out


def skips(members: list[str]) -> list[str]:
    """What the members skip on a gated network, from the sites they declare."""
    if not members:
        return []
    block = dissect(build("swiglu", 0).eval()).blocks[1]
    return sorted({site.skips for m in members for site in methods.method(m).sites(block)})
