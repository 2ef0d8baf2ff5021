"""The columns of the tables, defined once for the page, its glossary and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from moyu.records import Quality, Record, Speed

NONE = "–"


@dataclass(frozen=True)
class Column:
    """A column: the heading above it (`group`), its title, and the text of a record's cell."""

    group: str
    title: str
    text: Callable[[Any], str]
    short: str = ""  # group and title in one, for the terminal; "": not in the terminal


def number(value: float | None, digits: int = 3) -> str:
    """At least `digits` significant digits; an exponent only from a million on and below 0.0001."""
    if value is None:
        return NONE
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.1e}"
    whole = (
        len(str(int(abs(value)))) if abs(value) >= 1 else 0 if abs(value) >= 0.1 else -1 if abs(value) >= 0.01 else -2
    )
    return f"{value:,.{max(0, digits - whole)}f}"


def fixed(value: float | None, digits: int = 2) -> str:
    """A number with `digits` decimals."""
    return NONE if value is None else f"{value:,.{digits}f}"


def percent(value: float | None) -> str:
    """A fraction in percent, with one decimal if it is not whole."""
    if value is None:
        return NONE
    return f"{value:.0%}" if abs(value * 100 - round(value * 100)) < 0.05 else f"{value:.1%}"


def tenths(value: float | None) -> str:
    """A fraction in percent with one decimal."""
    return NONE if value is None else f"{value:.1%}"


def with_error(value: float, error: float | None) -> str:
    """A value and its standard error."""
    return number(value) if error is None else f"{number(value)} ± {number(error, 2)}"


def times(value: float | None) -> str:
    """A ratio of speeds."""
    return NONE if value is None else f"{value:.2f}×"


def gain(record: Speed) -> float:
    """The speed-up from skipping: over dense on the same kernels, or over the dense baseline if those were not timed."""
    return record.speedup if record.tok_s_kernels is None else record.tok_s / record.tok_s_kernels


def label(record: Quality | Speed) -> str:
    """The method and its compensation."""
    if isinstance(record, Speed) and record.method == "dense" and record.tok_s_kernels is not None:
        return "dense, kernels"
    if not isinstance(record, Quality) or not record.compensation:
        return record.method
    return f"{record.method} + {'bias' if record.compensation is True else record.compensation}"


def target(record: Quality) -> str:
    """The target: a sparsity or a byte fraction."""
    if record.target_byte_fraction is not None:
        return f"{record.target_byte_fraction:.2f} of bytes"
    return percent(record.target_sparsity)


QUALITY = (
    Column("Units skipped", "target", target, "target"),
    Column("Units skipped", "realised", lambda r: tenths(r.realized_sparsity), "realised"),
    Column("Bytes read", "fraction", lambda r: fixed(r.byte_fraction), "bytes"),
    Column("Bytes read", "ideal", lambda r: fixed(r.ideal_byte_fraction), "ideal\nbytes"),
    Column("Perplexity", "dense", lambda r: number(r.ppl_dense), "ppl\ndense"),
    Column("Perplexity", "sparse", lambda r: number(r.ppl), "ppl"),
    Column("Perplexity", "random", lambda r: number(r.ppl_random), "ppl\nrandom"),
    Column("Perplexity", "oracle", lambda r: number(r.ppl_oracle), "ppl\noracle"),
    Column("KL, nats per token", "sparse", lambda r: fixed(r.kl, 3), "KL"),
    Column("KL, nats per token", "random", lambda r: fixed(r.kl_random, 3), "KL\nrandom"),
    Column("KL, nats per token", "oracle", lambda r: fixed(r.kl_oracle, 3), "KL\noracle"),
    Column("Top-1", "agreement", lambda r: tenths(r.top1_agreement), "top-1"),
)

SPEED = (
    Column("Units skipped", "realised", lambda r: tenths(r.realized_sparsity), "realised"),
    Column("Bytes read", "fraction", lambda r: fixed(r.byte_fraction), "bytes"),
    Column("Bytes read", "MB per token", lambda r: number(r.step_bytes and r.step_bytes / 1e6), "MB"),
    Column("Tokens per second", "dense", lambda r: number(r.tok_s_dense), "tok/s\ndense"),
    Column("Tokens per second", "sparse", lambda r: number(r.tok_s), "tok/s"),
    Column("Speed-up", "measured", lambda r: times(r.speedup), "speed-up"),
    Column("Speed-up", "from skipping", lambda r: times(r.tok_s_kernels and gain(r)), "from\nskipping"),
    Column("Speed-up", "limit by bytes", lambda r: times(r.speedup_limit), "limit"),
    Column("Weight reading", "GB/s", lambda r: number(r.gb_s), "GB/s"),
    Column("Weight reading", "of ceiling", lambda r: f"{r.ceiling_share:.0%}", "of\nceiling"),
    Column("Milliseconds per token", "median", lambda r: number(r.p50 * 1e3), "ms"),
    Column("Milliseconds per token", "p20 to p80", lambda r: f"{number(r.p20 * 1e3)} to {number(r.p80 * 1e3)}"),
    Column("First token, ms", "dense", lambda r: number(r.first_token_s_dense and r.first_token_s_dense * 1e3)),
    Column("First token, ms", "sparse", lambda r: number(r.first_token_s and r.first_token_s * 1e3), "first\ntoken"),
)


def used(columns: Sequence[Column], rows: Sequence[Record]) -> list[Column]:
    """The columns that are not empty."""
    return [c for c in columns if any(c.text(r) != NONE for r in rows)]


def heads(columns: Sequence[Column]) -> list[tuple[str, list[Column]]]:
    """Columns by group, in order."""
    return [(group, list(members)) for group, members in groupby(columns, lambda c: c.group)]
