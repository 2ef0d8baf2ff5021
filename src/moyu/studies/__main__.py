"""`python -m moyu.studies docs/results/studies.jsonl`: the tables of docs/paper.md and the README's sentence.

Also writes Figure 1 as the registry has it now: the drawing of docs/kinds.md, and the table in it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from moyu import records
from moyu.reporting.paper import KINDS, drawing, table
from moyu.studies.running import markdown, sentence


def main() -> None:
    """Print them."""
    rows = [r for r in records.read(Path(sys.argv[1])) if isinstance(r, records.Study)]
    print(markdown(rows), sentence(rows), sep="\n\n")
    docs = Path(sys.argv[1]).parent.parent
    (docs / "results" / "figure1.svg").write_text(drawing())
    page = docs / "kinds.md"
    page.write_text(re.sub(KINDS, lambda m: f"{m[1]}{table()}\n{m[2]}", page.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
