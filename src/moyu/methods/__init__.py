"""The registry: one list, everything else is generated from it."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from typing import TYPE_CHECKING, Any

from moyu.errors import UserError

if TYPE_CHECKING:  # it imports torch, and names are checked without
    from moyu.methods.base import Method

METHODS: dict[str, str | type[Method]] = {  # name -> "module:Class", imported on use, or the class itself
    "relu-zero": "moyu.methods.relu_zero:ReluZero",
    "cett": "moyu.methods.cett:Cett",
    "cats": "moyu.methods.cats:Cats",
    "chess": "moyu.methods.chess:Chess",
    "countdown": "moyu.methods.countdown:Countdown",
    "teal": "moyu.methods.teal:Teal",
    "wina": "moyu.methods.wina:Wina",
    "was": "moyu.methods.was:Was",
    "r-sparse": "moyu.methods.r_sparse:RSparse",
    "larosa": "moyu.methods.larosa:Larosa",
    "prox": "moyu.methods.prox:Prox",
    "deja-vu": "moyu.methods.deja_vu:DejaVu",
    "deja-vu-heads": "moyu.methods.deja_vu_heads:DejaVuHeads",
    "polar": "moyu.methods.polar:Polar",
    "moefication": "moyu.methods.moefication:Moefication",
    "lte": "moyu.methods.lte:Lte",
    "griffin": "moyu.methods.griffin:Griffin",
    "tda": "moyu.methods.tda:Tda",
    "clada": "moyu.methods.clada:Clada",
    "estimate": "moyu.methods.estimate:Estimate",
    "levels": "moyu.methods.levels:Levels",
    "popularity": "moyu.methods.popularity:Popularity",
    "static-norm": "moyu.methods.static_norm:StaticNorm",
    "levels-static": "moyu.methods.levels_static:LevelsStatic",
    "shortlist": "moyu.methods.shortlist:Shortlist",
    "random": "moyu.methods.random:Random",
    "random-popular": "moyu.methods.random_popular:RandomPopular",
    "oracle": "moyu.methods.oracle:Oracle",
    "oracle-greedy": "moyu.methods.oracle_greedy:OracleGreedy",
}

_KINDS = {(bool,): "true or false", (int, float): "a number", (str,): "a word"}  # of a knob, by its default


def names() -> list[str]:
    """Every registered method."""
    return list(METHODS)


def check_name(name: str) -> None:
    """Refuse a method that is not registered; UserError names the nearest ones. Imports nothing."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=3, cutoff=0.3) or names()
        raise UserError(f"unknown method {name!r}", f"did you mean {', '.join(near)}? `moyu methods` lists all")


def method_class(name: str) -> type[Method]:
    """The class of a registered method; UserError names the nearest ones where there is none."""
    check_name(name)
    found = METHODS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(importlib.import_module(module), attribute)
    return found


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
    fields = {f.name: f for f in dataclasses.fields(cls)}
    legal = list(fields)
    for knob, value in knobs.items():
        if knob not in legal:
            near = difflib.get_close_matches(knob, legal, n=1, cutoff=0.3)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(legal) or 'no knobs'}"
            raise UserError(f"method {name!r} has no knob {knob!r}", hint)
        _check_kind(name, fields[knob], value)
    try:
        return cls(**knobs)
    except (TypeError, ValueError) as error:
        raise UserError(f"method {name!r}: {error}", "see `moyu methods --json` for its knobs") from error


def _check_kind(name: str, knob: dataclasses.Field, value: Any) -> None:
    """Refuse a value of another kind than the knob's default; None where the knob may be None."""
    if value is None and "None" in str(knob.type):
        return
    for types, kind in _KINDS.items():
        if type(knob.default) in types and type(value) not in types:
            raise UserError(f"method {name!r}: {knob.name} must be {kind}, not {value!r}", f"e.g. {knob.default!r}")


def markdown() -> str:
    """The table of docs/methods.md."""
    lines = ["| method | family | decides | exact | what it does | source |", "|---|---|---|---|---|---|"]
    for row in table():
        exact = "yes" if row["exact"] else "no"
        name, summary = f"[`{row['method']}`](methods/{row['method']}.md)", row["summary"].rstrip(".")
        lines.append(f"| {name} | {row['family']} | {row['granularity']} | {exact} | {summary} | {row['paper']} |")
    return "\n".join(lines)
