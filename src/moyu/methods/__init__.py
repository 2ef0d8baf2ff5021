"""The registry: one list, everything else is generated from it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import Any

from moyu.errors import UserError
from moyu.methods.base import Method

METHODS: dict[str, str] = {
    "relu-zero": "moyu.methods.relu_zero:ReluZero",
    "cett": "moyu.methods.cett:Cett",
    "cats": "moyu.methods.cats:Cats",
    "teal": "moyu.methods.teal:Teal",
    "griffin": "moyu.methods.griffin:Griffin",
    "tda": "moyu.methods.tda:Tda",
    "popularity": "moyu.methods.popularity:Popularity",
    "random": "moyu.methods.random:Random",
    "oracle": "moyu.methods.oracle:Oracle",
}


def names() -> list[str]:
    """Every registered method."""
    return list(METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a registered method; UserError names the nearest ones where there is none."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.3) or names()
        raise UserError(f"unknown method {name!r}", f"did you mean {', '.join(near)}? `moyu methods` lists all")
    module, _, attribute = METHODS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def table() -> list[dict[str, Any]]:
    """What each method declares of itself, a row a method: for the CLI, README and docs."""
    keys = ("family", "granularity", "exact", "needs_calibration", "trains", "paper")
    rows = []
    for name in METHODS:
        cls = method_class(name)
        summary = (importlib.import_module(cls.__module__).__doc__ or "").partition("\n")[0]
        knobs = {f.name: f.default for f in dataclasses.fields(cls)}
        rows.append({"method": name, **{k: getattr(cls, k) for k in keys}, "knobs": knobs, "summary": summary})
    return rows


def method(name: str, **knobs: Any) -> Method:
    """A method by name with its knobs; UserError for an unknown name, knob or value."""
    cls = method_class(name)
    legal = [f.name for f in dataclasses.fields(cls)]
    for knob in knobs:
        if knob not in legal:
            near = difflib.get_close_matches(knob, legal, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(legal) or 'no knobs'}"
            raise UserError(f"method {name!r} has no knob {knob!r}", hint)
    try:
        return cls(**knobs)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name!r}: {error}", "see `moyu methods --json` for its knobs") from error


def markdown() -> str:
    """The method table of the README."""
    lines = ["| method | family | decides | exact | what it does | source |", "|---|---|---|---|---|---|"]
    for row in table():
        exact = "yes" if row["exact"] else "no"
        name, summary = row["method"], row["summary"].rstrip(".")
        lines.append(f"| `{name}` | {row['family']} | {row['granularity']} | {exact} | {summary} | {row['paper']} |")
    return "\n".join(lines)
