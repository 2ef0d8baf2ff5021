"""One self-contained HTML page from records, without scripts or network access."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment as Jinja
from jinja2 import PackageLoader, StrictUndefined
from markupsafe import Markup

from moyu import records
from moyu.errors import UserError
from moyu.files import atomic_write_text
from moyu.records import (
    Cell,
    Coverage,
    Environment,
    Generation,
    Kernel,
    MethodRecord,
    ModelRecord,
    Profile,
    Quality,
    Record,
    Study,
)  # fmt: skip
from moyu.reporting import columns, figures, paper, scoreboard, summary
from moyu.reporting.differences import marked
from moyu.reporting.figures import Figure
from moyu.reporting.groups import quality_groups, speed_groups, task_groups


def render(rows: Iterable[Record]) -> str:
    """The page as HTML. Raises UserError without records."""
    rows = list(rows)
    if not rows:
        raise UserError("there are no records to report", "make some with `moyu run`")
    jinja = Jinja(
        loader=PackageLoader("moyu.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.globals |= {"columns": columns, "number": columns.number, "fixed": columns.fixed, "percent": columns.percent}
    return jinja.get_template("report.html.j2").render(**view(rows))


def write_report(rows: Iterable[Record], path: Path) -> None:
    """Write the page, whole or not at all. Raises UserError without records."""
    atomic_write_text(path, render(rows))


def write_scoreboard(rows: Sequence[Record], out: Path) -> None:
    """Write a scoreboard's records, tables, plot and page into a folder."""
    records.write(out / "records.jsonl", rows)
    atomic_write_text(out / "trinity.md", scoreboard.markdown(rows) + "\n")
    atomic_write_text(out / "trinity.svg", scoreboard.plot(rows) + "\n")
    write_report(rows, out / "report.html")


def view(rows: Sequence[Record]) -> dict[str, Any]:
    """The variables of the template."""
    palette = figures.colours([r.method for r in rows if isinstance(r, Quality)])
    quality, speed = [], []
    for group in quality_groups(rows):
        chosen = columns.used(columns.QUALITY, group.rows)
        shown = [figures.quality(group.rows, palette), figures.layers(group.rows)]
        quality.append((group, chosen, columns.heads(chosen), _there(shown)))
    for group in speed_groups(rows):
        chosen = columns.used(columns.SPEED, group.rows)
        shown = [figures.speedup(group.rows), figures.read_rate(group.rows)]
        speed.append((group, chosen, columns.heads(chosen), _there(shown)))
    profiles = [r for r in rows if isinstance(r, Profile)]
    about = [r for r in rows if isinstance(r, ModelRecord)]
    return {
        "models": list(dict.fromkeys(r.model for r in about if r.weights == "trained"))
        or list(dict.fromkeys(r.model for r in about)),
        "dates": _span([r.date for r in rows]),
        "headline": summary.headline(rows),
        "warnings": summary.warnings(rows),
        "notes": summary.notes(rows),
        "quality": quality,
        "speed": speed,
        "tasks": task_groups(rows),
        "scoreboard": scoreboard.tables(rows),
        "scoreboard_plot": scoreboard.plot(rows) if any(isinstance(r, Cell) for r in rows) else None,
        "profiles": [(p, _there([figures.needed_by_layer(p), figures.needed_by_position(p)])) for p in profiles],
        "prompts": _prompts([r for r in rows if isinstance(r, Generation)]),
        "kernels": [r for r in rows if isinstance(r, Kernel)],
        "paper": paper.section([r for r in rows if isinstance(r, Study)]),
        "coverage": [r for r in rows if isinstance(r, Coverage)],
        "environment": environment(rows),
        "corpora": _corpora(rows),
        "commands": list(dict.fromkeys(r.command for r in rows if isinstance(r, Environment) and r.command)),
    }


def environment(rows: Sequence[Record]) -> list[tuple[str, str]]:
    """Where the records come from. Values that differ between records are all listed."""

    def values(found: Iterable[Any], between: str = ", ") -> str:
        return between.join(dict.fromkeys(str(v) for v in found if v is not None))

    machines = [r for r in rows if isinstance(r, Environment)]
    packages = dict.fromkeys(p for r in rows for p in r.versions)
    commits = [(r.commit[:12] + (" with uncommitted changes" if r.dirty else "")) for r in rows if r.commit]
    table = [
        ("Device", values(r.device for r in rows)),
        ("System", values(f"{r.platform}, {r.cores} cores" for r in machines)),
        ("Threads", values(r.threads for r in rows)),
        ("Weights' type", values(r.dtype for r in rows)),
        *((p, values(r.versions.get(p) for r in rows)) for p in packages),
        ("Commit", values(commits)),
        ("Seed", values(r.seed for r in rows)),
        ("Plans", values(f"{r.method} {r.plan}" for r in rows if isinstance(r, Quality) and r.plan)),
        ("KV cache", values((_cache(r) for r in rows if isinstance(r, MethodRecord) and r.kv_bytes), "; ")),
        ("Date", _span([r.date for r in rows])),
    ]
    return [(name, value) for name, value in table if value]


def _cache(record: MethodRecord) -> str:
    """Bytes of keys and values that a step reads, by context."""
    sizes = ", ".join(f"{k.bytes / 1e6:,.0f} MB at {k.context:,}" for k in record.kv_bytes)
    return f"{record.model}, policy {record.kv_policy}: {sizes} tokens of context"


def _there(candidates: Sequence[Figure | None]) -> list[Figure]:
    return [f for f in candidates if f is not None]


def _span(dates: Sequence[str]) -> str:
    first, last = min(dates), max(dates)
    day, end, start, stop = first[:10], last[:10], first[11:16], last[11:16]
    if day != end:
        return f"{day} {start} to {end} {stop} UTC"
    return f"{day} {start} UTC" if start == stop else f"{day} {start} to {stop} UTC"


def _prompts(rows: Sequence[Generation]) -> list[tuple[str, str, list[tuple[Generation, Markup | None, Markup]]]]:
    """Generations by model and prompt: model, prompt, (record, dense where it ran, sparse)."""
    found: dict[tuple[str, str], list[tuple[Generation, Markup | None, Markup]]] = {}
    for r in rows:
        found.setdefault((r.model, r.prompt), []).append((r, *marked(r)))
    return [(model, prompt, members) for (model, prompt), members in found.items()]


def _corpora(rows: Sequence[Record]) -> list[tuple[str, str]]:
    """Each text once: the kinds of records that used it, and its fingerprint."""
    found: dict[str, dict[str, None]] = {}
    for r in rows:
        if isinstance(r, ModelRecord) and r.corpus:
            found.setdefault(", ".join(f"{k} {v}" for k, v in r.corpus.items()), {})[r.kind] = None
    return [(", ".join(kinds), text) for text, kinds in found.items()]
