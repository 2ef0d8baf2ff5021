"""The paper's claims as experiments that can fail: one module a claim.

Each says what it predicts and what refutes it before it runs; its verdict is computed from intervals by the rules of
`moyu.studies.verdicts`, never by hand.
"""

from __future__ import annotations

import difflib
import importlib

from moyu.errors import UserError
from moyu.studies.base import Study

STUDIES: dict[str, str] = {
    "texts": "moyu.studies.texts:Texts",
    "theorem": "moyu.studies.theorem:Theorem",
    "root_cause": "moyu.studies.root_cause:RootCause",
    "over_activation": "moyu.studies.over_activation:OverActivation",
    "router_diversity": "moyu.studies.router_diversity:RouterDiversity",
    "prefix_swap": "moyu.studies.prefix_swap:PrefixSwap",
    "importance": "moyu.studies.importance:ImportanceStudy",
    "inertia": "moyu.studies.inertia:Inertia",
    "semantics": "moyu.studies.semantics:Semantics",
    "decay": "moyu.studies.decay:Decay",
    "dominance": "moyu.studies.dominance:Dominance",
    "figure1": "moyu.studies.figure1:Figure1",
    "figure2": "moyu.studies.figure2:Figure2",
    "decoding": "moyu.studies.decoding:Decoding",
}


def names() -> list[str]:
    """Every study, in the order in which they run."""
    return list(STUDIES)


def study(name: str) -> Study:
    """A study by name; UserError names the nearest ones where there is none."""
    if name not in STUDIES:
        near = difflib.get_close_matches(name, STUDIES, n=3, cutoff=0.3) or names()
        raise UserError(f"unknown study {name!r}", f"did you mean {', '.join(near)}? `moyu study --list` lists all")
    module, _, attribute = STUDIES[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)()
    except ModuleNotFoundError as error:
        if error.name in ("statsmodels", "pandas"):
            raise UserError(f"studies need {error.name}", "pip install 'moyu-llm[studies]'") from error
        raise
