"""Groups of records that may share a table. Masked and skipped, trained and random never share one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from moyu.records import Quality, Record, Speed, Task
from moyu.reporting.columns import number, tenths, with_error


@dataclass(frozen=True)
class Group:
    """Rows of one table."""

    title: str
    caption: str
    rows: list[Any]


def quality_groups(records: Iterable[Record]) -> list[Group]:
    """Quality records by model, protocol, dtype and whether they are simulated, in their order."""
    found: dict[Any, list[Quality]] = {}
    for r in records:
        if isinstance(r, Quality):
            key = (r.model, r.protocol.model_dump_json() if r.protocol else None, r.dtype, r.simulated)
            found.setdefault(key, []).append(r)
    return [Group(_quality_title(rows[0]), _quality_caption(rows), rows) for rows in found.values()]


def without_prompt(record: Quality) -> bool:
    """Whether a record belongs to the second table, where every position is sparse (token-level methods)."""
    return record.protocol is not None and record.protocol.table == "token"


def speed_groups(records: Iterable[Record]) -> list[Group]:
    """Speed records by model, context, dtype, device and back end, in their order."""
    found: dict[Any, list[Speed]] = {}
    for r in records:
        if isinstance(r, Speed):
            key = (r.weights, r.model, r.context, r.dtype, r.device, r.backend, r.batch, r.layers, r.dense_baseline)
            found.setdefault(key, []).append(r)
    return [Group(_speed_title(rows[0]), _speed_caption(rows), rows) for rows in found.values()]


@dataclass(frozen=True)
class Tasks:
    """Tasks of one model: one line per metric, one column per plan."""

    title: str
    caption: str
    methods: list[str]
    lines: list[list[str]]  # task, metric, documents, dense, then each method


def task_groups(records: Iterable[Record]) -> list[Tasks]:
    """Tasks by model, dtype and harness, in their order; dense and every plan side by side."""
    found: dict[Any, list[Task]] = {}
    for r in records:
        if isinstance(r, Task):
            found.setdefault((r.model, r.dtype, r.harness), []).append(r)
    return [_tasks(rows) for rows in found.values()]


def _tasks(rows: list[Task]) -> Tasks:
    plans = list(dict.fromkeys((r.method, r.plan) for r in rows))
    heads = [
        m if sum(m == other for other, _ in plans) == 1 else f"{m} {(p or '')[:4]}" for m, p in plans
    ]  # two plans of one method by their hash
    lines: dict[Any, dict[Any, Task]] = {}
    for r in rows:
        lines.setdefault((r.asked, r.task, r.metric), {})[r.method, r.plan] = r
    cells = []
    for own in lines.values():
        r = next(iter(own.values()))
        sparse = [own.get(plan) for plan in plans]
        dense = with_error(r.value_dense, r.stderr_dense)
        cells.append(
            [r.task, r.metric, str(r.samples), dense]
            + ["" if s is None else with_error(s.value, s.stderr) for s in sparse]
        )
    skipped = {
        m: r.realized_sparsity
        for m, r in zip(heads, (next(iter(lines.values())).get(p) for p in plans), strict=True)
        if r
    }
    how = ", ".join(f"{m} {tenths(s)}" for m, s in skipped.items())
    return Tasks(
        f"Tasks of {rows[0].model} by {rows[0].harness}, simulated by masking",
        f"Value ± standard error over documents. Contexts are dense, scored positions sparse; units skipped: {how}.",
        heads,
        cells,
    )


def _quality_title(record: Quality) -> str:
    how = "simulated by masking" if record.simulated else "really skipped"
    return f"Quality of {record.model}{' without a dense prompt' if without_prompt(record) else ''}, {how}"


def _quality_caption(rows: list[Quality]) -> str:
    first, parts = rows[0], []
    if first.protocol:
        p, t = first.protocol.prompt, first.protocol.window
        parts.append(
            f"Windows of {t} tokens: the first {p} dense, the rest sparse and scored"
            if p
            else f"Windows of {t} tokens, all sparse and scored"
        )
    scored = [r for r in rows if r.tokens is not None]
    if scored:
        counts = sorted({r.tokens or 0 for r in scored})
        parts.append(
            f"{counts[-1]:,} tokens scored" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,} tokens scored"
        )
    bits = next((r.bits_per_byte_dense for r in scored if r.bits_per_byte_dense is not None), None)
    if bits is not None:
        parts.append(f"dense: {number(bits)} bits per byte")
    if first.dtype:
        parts.append(first.dtype)
    return "; ".join(parts) + "." if parts else ""


def _speed_title(record: Speed) -> str:
    if record.weights == "random":
        return f"Speed of {record.model}, random weights: speed only"
    return f"Speed of {record.model}, " + ("the model itself" if record.context == "model itself" else record.context)


def _speed_caption(rows: list[Speed]) -> str:
    r = rows[0]
    ceilings = sorted({x.read_ceiling_gb_s for x in rows})
    ceiling = number(ceilings[0]) if len(ceilings) == 1 else f"{number(ceilings[0])} to {number(ceilings[-1])}"
    layers = f"; {r.layers} layers" if r.layers else ""
    dtype = f"; {r.dtype}" if r.dtype else ""
    peak = max((x.peak_bytes or 0 for x in rows), default=0)
    memory = f"; peak memory {peak / 1e9:.1f} GB" if peak else ""
    return (
        f"Measured on {r.device}, {r.threads} threads, back end {r.backend}, batch {r.batch}; "
        f"dense is {r.dense_baseline}; read ceiling {ceiling} GB/s{layers}{dtype}{memory}."
    )
