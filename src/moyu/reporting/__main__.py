"""`python -m moyu.reporting`: write the committed records' tables and plots into docs and README.md."""

import json
import re
from pathlib import Path

from moyu import records, zoo
from moyu.reporting import evidence, scoreboard

RESULTS = Path("docs/results")


def replace(page: Path, marker: str, text: str) -> None:
    """Put `text` between the page's `<!-- marker: ... -->` and `<!-- /marker -->`."""
    block = rf"(<!-- {marker}: [^\n]*-->\n).*?(<!-- /{marker} -->)"
    page.write_text(re.sub(block, lambda m: f"{m[1]}{text}\n{m[2]}", page.read_text(), flags=re.DOTALL))


def draw(rows: list[records.Record], file: Path) -> None:
    """The plot of a scoreboard."""
    file.write_text(scoreboard.plot([r for r in rows if isinstance(r, records.Cell)]) + "\n")


rows = records.read(RESULTS / "trinity.jsonl")
replace(Path("docs/scoreboard.md"), "scoreboard", scoreboard.markdown(rows))
replace(Path("README.md"), "scoreboard", scoreboard.brief(rows))
draw(rows, RESULTS / "trinity.svg")

rows = records.read(RESULTS / "evidence.jsonl")
parts = evidence.sections(
    rows,
    records.read(RESULTS / "studies.jsonl"),
    json.loads((RESULTS / "evidence-training.json").read_text()),
    {name: zoo.describe(name) for name in zoo.names()},
)
for marker, text in parts.items():
    replace(Path("docs/evidence.md"), marker, text)
draw(rows, RESULTS / "evidence.svg")
