"""The larger matched models beside the embedded ones: training and studies, for docs/evidence.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moyu import records
from moyu.reporting import scoreboard
from moyu.research.studies.root_cause import SERIES

LARGER = "-100m"  # suffix of the larger model to the name of its embedded model
SHOWN = ("exact zeros", "near zero", "participation", "lowers the loss", "impurity", "loss")


def trained(larger: Mapping[str, Mapping[str, Any]], embedded: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per model, from the training.json of both sizes."""
    lines = [
        "| model | parameters | tokens | bits per byte, held out | at random initialisation | on shuffled words |",
        "|---|---|---|---|---|---|",
    ]
    for name, facts in ((n, f) for size in (embedded, larger) for n, f in size.items()):
        bits = facts["bits_per_byte"]
        lines.append(
            f"| {name} | {facts['parameters'] / 1e6:.1f} M | {facts['tokens'] / 1e6:.0f} M | {bits['held_out']:.3f} | "
            f"{bits['random_initialisation']:.2f} | {bits['shuffled_text']:.2f} |"
        )
    return "\n".join(lines)


def on_the_way(larger: Mapping[str, Mapping[str, Any]]) -> str:
    """Changes during training: means over layers, and the last layer's share of neurons that lower the loss."""
    lines = [
        f"| model | steps | {' | '.join(SHOWN)} | the last layer's share |",
        f"|---|---|{'---|' * (len(SHOWN) + 1)}",
    ]
    for name, facts in larger.items():
        for step, series in facts["on_the_way"]:
            found = dict(zip(SERIES, series, strict=True))
            means = " | ".join(f"{sum(found[s]) / len(found[s]):.3f}" for s in SHOWN)
            lines.append(f"| {name} | {step} | {means} | {found['lowers the loss'][-1]:.3f} |")
    return "\n".join(lines)


def beside(larger: Iterable[records.Record], embedded: Iterable[records.Record]) -> str:
    """All conditions of the larger models' studies beside the embedded models', with both verdicts."""
    known = {(r.name, r.model): r for r in embedded if isinstance(r, records.Study)}
    lines = ["| study | model | condition | embedded | 100 M | verdicts |", "|---|---|---|---|---|---|"]
    for row in larger:
        if not isinstance(row, records.Study) or row.model is None:
            continue
        small = known.get((row.name, row.model.removesuffix(LARGER)))
        own = {} if small is None else {c.name: c for c in small.conditions}
        for c in row.conditions:
            before = own.get(c.name)
            verdicts = f"{'-' if before is None else before.verdict}, {c.verdict}"
            lines.append(
                f"| `{row.name}` | {row.model.removesuffix(LARGER)} | {c.name} | {_estimate(before)} | {_estimate(c)} | {verdicts} |"
            )
    return "\n".join(lines)


def _estimate(condition: Any) -> str:
    if condition is None or condition.value is None:
        return "-"
    low, high = condition.interval
    return f"{condition.value:.3g} ({low:.3g} to {high:.3g})"


def sections(
    rows: Sequence[records.Record],
    embedded_rows: Sequence[records.Record],
    larger: Mapping[str, Mapping[str, Any]],
    embedded: Mapping[str, Mapping[str, Any]],
) -> dict[str, str]:
    """The generated parts of docs/evidence.md, by marker."""
    return {
        "trained": trained(larger, embedded),
        "on the way": on_the_way(larger),
        "studies": beside(rows, embedded_rows),
        "scoreboard": scoreboard.markdown(rows),
    }
