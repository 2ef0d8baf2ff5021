"""`python -m moyu.research.pages`: write every generated part of README.md and docs from the registry and docs/results."""

from __future__ import annotations

import json
import re
from pathlib import Path

from moyu import methods, records
from moyu.model import zoo
from moyu.reporting import advice, beside_files, method_pages, scoreboard
from moyu.reporting.paper import kinds_drawing
from moyu.research import evidence
from moyu.research.studies import figure1
from moyu.research.studies.running import markdown, sentence

RESULTS = Path("docs/results")
STYLE = (  # of the drawing as a separate file: grey is readable on light and dark backgrounds
    "text{font:12px sans-serif;fill:#888}.cell{fill:#888}.reference{stroke:#888;stroke-width:1.3;stroke-dasharray:4 3}"
    ".mark{stroke:#888;stroke-width:2.5}.solid{fill:#2a7de1}"
)


def drawing() -> str:
    """Figure 1 by the present registry, as an SVG file that is readable on light and dark backgrounds."""
    svg = str(kinds_drawing(figure1.panels()).svg)
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="660" ', 1).replace(
        "><text", f"><style>{STYLE}</style><text", 1
    )


def table() -> str:
    """The four kinds by the present registry, with one line per method."""
    lines = ["| kind | method | decides once a | skips |", "|---|---|---|---|"]
    for panel in figure1.panels():
        for place, name in enumerate(panel["members"]):
            kind = "" if place else f"**{panel['kind']}**, {panel['name']}"
            granularity, skips = methods.method_class(name).granularity, ", ".join(figure1.skips([name]))
            lines.append(f"| {kind} | [`{name}`](methods/{name}.md) | {granularity} | {skips or 'nothing in SwiGLU'} |")
    return "\n".join(lines)


def replace(page: Path, marker: str, text: str) -> None:
    """Put `text` between the page's `<!-- marker: ... -->` and `<!-- /marker -->`."""
    part = rf"(<!-- {marker}: [^\n]*-->\n).*?(<!-- /{marker} -->)"
    page.write_text(re.sub(part, lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text(), flags=re.DOTALL))


def draw(rows: list[records.Record], file: Path) -> None:
    """The plot of a scoreboard."""
    file.write_text(scoreboard.plot(rows) + "\n")


def main() -> None:
    """Write all generated parts. Run it in the root of a checkout."""
    readme, docs = Path("README.md"), RESULTS.parent
    replace(docs / "methods.md", "methods", methods.markdown())
    method_pages.write(docs / "methods")

    rows = records.read(RESULTS / "quants.jsonl")
    for page in (readme, docs / "plans.md"):
        replace(page, "gains", beside_files.markdown(rows))
    (RESULTS / "levels.svg").write_text(beside_files.picture(rows) + "\n")

    real = records.read(RESULTS / "trinity-real.jsonl")
    replace(docs / "should-i-use-it.md", "gains", advice.gains(rows))
    replace(docs / "should-i-use-it.md", "others", advice.others(real))
    replace(docs / "scoreboard.md", "real", scoreboard.markdown(real))
    draw(real, RESULTS / "trinity-real.svg")

    rows = records.read(RESULTS / "trinity.jsonl")
    replace(docs / "scoreboard.md", "scoreboard", scoreboard.markdown(rows))
    draw(rows, RESULTS / "trinity.svg")

    studies = [r for r in records.read(RESULTS / "studies.jsonl") if isinstance(r, records.Study)]
    replace(docs / "paper.md", "verdicts", markdown(studies))
    replace(docs / "paper.md", "studies", sentence(studies))
    replace(docs / "kinds.md", "kinds", table())
    (RESULTS / "figure1.svg").write_text(drawing())

    rows = records.read(RESULTS / "evidence.jsonl")
    larger = json.loads((RESULTS / "evidence-training.json").read_text())
    parts = evidence.sections(rows, studies, larger, {name: zoo.describe(name) for name in zoo.names()})
    for marker, text in parts.items():
        replace(docs / "evidence.md", marker, text)
    draw(rows, RESULTS / "evidence.svg")


if __name__ == "__main__":
    main()
