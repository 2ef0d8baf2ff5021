"""Run studies one after another, store finished ones, and turn findings into records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from moyu import records
from moyu.files import locked
from moyu.measure.environment import device_name
from moyu.research import studies
from moyu.research.studies.base import Progress, Setup, Study
from moyu.research.studies.verdicts import Finding, judge

MODELS = ("relu", "gelu", "swiglu")
Announce = Callable[[Study, str | None], None]


def plan(names: Sequence[str], models: Sequence[str], quick: bool) -> list[tuple[Study, str | None]]:
    """Studies and the models they run on, in order.

    Without names: all, except, where not quick, those that train. Without models: the embedded ones, of which quick takes
    one. A study of matched models runs once on all of them.
    """
    chosen = [studies.study(n) for n in (names or studies.names())]
    if not names and not quick:
        chosen = [s for s in chosen if not s.trains]
    matched = models or MODELS[: 2 if quick else None]
    models = models or MODELS[: 1 if quick else None]
    out: list[tuple[Study, str | None]] = []
    for study in chosen:
        if study.needs == "nothing":
            out.append((study, None))
        elif study.needs == "matched models":
            out.append((study, ", ".join(matched)))
        else:
            out += [(study, model) for model in models]
    return out


def run(
    names: Sequence[str],
    models: Sequence[str],
    out: Path,
    *,
    quick: bool = False,
    seed: int = 0,
    again: bool = False,
    device: str = "cpu",
    announce: Announce = lambda study, model: None,
    progress: Progress = lambda what, done, total: None,
) -> list[records.Study]:
    """Run studies and keep their records in `out`/studies.jsonl. Studies with a record of the same weights are not run again.

    again: repeat the analysis, from stored observations.
    """
    file = out / "studies.jsonl"
    wanted = plan(names, models, quick)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for study, model in wanted:
        setup = Setup(
            model, quick, seed, out / "parts", device, _prefixed(progress, study, model), definition=study.definition
        )
        row = next(
            (r for r in _there(file) if (r.name, r.model, r.made_from) == (study.name, model, setup.made_from)), None
        )
        if row is None or again:
            announce(study, model)
            started = time.monotonic()
            row = record(study, setup, study.analyse(study.observe(setup)), time.monotonic() - started)
            with locked(file):  # what another process has written meanwhile stays
                others = [
                    r for r in _there(file) if (r.name, r.model, r.quick, r.seed) != (row.name, model, quick, seed)
                ]
                records.write(file, [*others, row])
        rows.append(row)
    return rows


def _there(file: Path) -> list[records.Study]:
    return [r for r in records.read(file) if isinstance(r, records.Study)] if file.exists() else []


def _prefixed(progress: Progress, study: Study, model: str | None) -> Progress:
    title = study.name if model is None else f"{study.name}, {model}"
    return lambda what, done, total: progress(f"{title}: {what}", done, total)


def record(study: Study, setup: Setup, finding: Finding, seconds: float) -> records.Study:
    """The record of a finding; the verdict is computed here and nowhere else."""
    conditions = []
    for condition in study.conditions:
        found = finding.estimates.get(condition.name)
        measured: dict[str, Any] = {}
        if found is not None:
            power = condition.power(found)
            measured = {"value": found.value, "interval": [found.low, found.high], "units": found.units, "power": power}
        conditions.append(
            {
                "name": condition.name,
                "meaning": condition.meaning,
                "rule": condition.rule,
                "verdict": condition.verdict(found),
                **measured,
            }
        )
    controls = [
        {
            "name": c.name,
            "meaning": c.meaning,
            "rule": c.rule,
            "value": _finite(finding.controls.get(c.name)),
            "passed": c.passed(finding.controls.get(c.name, math.nan)),
        }
        for c in study.controls
    ]
    row = records.stamp(
        kind="study",
        name=study.name,
        model=setup.model,
        seed=setup.seed,
        made_from=setup.made_from,
        device=device_name(setup.device),
        quick=setup.quick,
        verdict=judge(study.conditions, study.controls, finding),
        claim=study.claim,
        prediction=study.prediction,
        refutation=study.refutation,
        effect=conditions[0].get("value"),
        interval=conditions[0].get("interval"),
        conditions=conditions,
        controls=controls,
        nulls={k: v for k, v in finding.nulls.items() if math.isfinite(v)},
        details=_plain(finding.details),
        notes=list(finding.notes),
        seconds=round(seconds, 1),
    )
    assert isinstance(row, records.Study)
    return row


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """Details for JSON: rounded numbers, null for numbers that are not finite."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def statement(study: Study) -> str:
    """The text of a study before it runs."""
    lines = [f"{study.name}: {study.claim}", f"  predicts    {study.prediction}", f"  refuted by  {study.refutation}"]
    lines += [f"  condition   {c.name} ({c.meaning}): {c.rule}" for c in study.conditions]
    lines += [f"  control     {c.name} ({c.meaning}): {c.rule}" for c in study.controls]
    return "\n".join(lines)


def summary(row: records.Study) -> str:
    """The text of a study after it ran."""
    about = f" on {row.model}" if row.model else ""
    lines = [f"{row.verdict:12s} {row.name}{about}{' (quick: too small to count)' if row.quick else ''}"]
    for c in row.conditions:
        if c.value is None or c.interval is None or c.power is None:
            lines.append(f"  {c.verdict:12s} {c.name}: not measured")
            continue
        low, high = c.interval
        lines.append(
            f"  {c.verdict:12s} {c.name}: {c.value:.4g} [{low:.4g}, {high:.4g}], {c.units} units, power {c.power:.2f}"
        )
    lines += [f"  null         {name}: {value:.4g}" for name, value in row.nulls.items()]
    for c in row.controls:
        value = "-" if c.value is None else f"{c.value:.4g}"
        lines.append(f"  control      {c.name}: {value}, {c.rule}{'' if c.passed else ', NOT PASSED'}")
    return "\n".join(lines)


def verdict_line(rows: Iterable[records.Study]) -> str:
    """All verdicts in one line."""
    found: dict[str, list[str]] = {"HOLDS": [], "FAILS": [], "INCONCLUSIVE": []}
    for row in rows:
        found[row.verdict].append(row.name + (f" ({row.model})" if row.model else ""))
    return "; ".join(f"{verdict}: {', '.join(names) or 'none'}" for verdict, names in found.items())


def markdown(rows: Iterable[records.Study]) -> str:
    """The verdicts as the tables of docs/paper.md: one line per condition; failed controls are named."""
    lines = [
        "| study | model | verdict | condition | estimate, 95 % | units | power | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        failed = ", ".join(f"control `{c.name}` not passed" for c in row.controls if not c.passed)
        for index, c in enumerate(row.conditions):
            head = f"| `{row.name}` | {row.model or '-'} | **{row.verdict}** " if index == 0 else "| | | "
            if c.value is None or c.interval is None:
                lines.append(f"{head}| {c.name} | not measured | | | {c.verdict} |")
                continue
            estimate = f"{c.value:.3g} ({c.interval[0]:.3g} to {c.interval[1]:.3g})"
            said = c.verdict + (f"; {failed}" if failed and index == 0 else "")
            lines.append(f"{head}| {c.name} | {estimate} | {c.units} | {c.power:.2f} | {said} |")
    return "\n".join(lines)


def sentence(rows: Iterable[records.Study]) -> str:
    """All verdicts in one sentence: failed and open claims first."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        found.setdefault(row.verdict, {}).setdefault(row.name, []).extend([row.model] if row.model else [])
    parts = []
    for verdict in ("FAILS", "INCONCLUSIVE", "HOLDS"):
        names = [f"`{n}`" + (f" ({', '.join(m)})" if m else "") for n, m in found.get(verdict, {}).items()]
        parts.append(f"**{verdict}** {', '.join(names) or 'none'}")
    return "; ".join(parts) + "."
