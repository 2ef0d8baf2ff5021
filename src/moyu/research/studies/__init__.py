"""The paper's claims as experiments that can fail: one module per claim.

Each states its prediction and its refutation before it runs. Verdicts are computed from intervals by the rules of
`moyu.research.studies.verdicts`.
"""

from __future__ import annotations

import difflib
import importlib

from moyu.errors import UserError
from moyu.research.studies.base import Study

STUDIES: dict[str, str] = {
    "texts": "moyu.research.studies.texts:Texts",
    "theorem": "moyu.research.studies.theorem:Theorem",
    "root_cause": "moyu.research.studies.root_cause:RootCause",
    "over_activation": "moyu.research.studies.over_activation:OverActivation",
    "router_diversity": "moyu.research.studies.router_diversity:RouterDiversity",
    "prefix_swap": "moyu.research.studies.prefix_swap:PrefixSwap",
    "importance": "moyu.research.studies.importance:ImportanceStudy",
    "inertia": "moyu.research.studies.inertia:Inertia",
    "semantics": "moyu.research.studies.semantics:Semantics",
    "decay": "moyu.research.studies.decay:Decay",
    "dominance": "moyu.research.studies.dominance:Dominance",
    "figure1": "moyu.research.studies.figure1:Figure1",
    "figure2": "moyu.research.studies.figure2:Figure2",
    "decoding": "moyu.research.studies.decoding:Decoding",
}


def names() -> list[str]:
    """Every study, in the order in which they run."""
    return list(STUDIES)


def study(name: str) -> Study:
    """A study by name. Raises UserError, with the nearest names, for an unknown one."""
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
