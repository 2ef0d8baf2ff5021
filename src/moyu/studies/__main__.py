"""`python -m moyu.studies docs/results/studies.jsonl`: the tables of docs/paper.md and the README's sentence."""

from __future__ import annotations

import sys
from pathlib import Path

from moyu import records
from moyu.studies.running import markdown, sentence


def main() -> None:
    """Print them."""
    rows = [r for r in records.read(Path(sys.argv[1])) if isinstance(r, records.Study)]
    print(markdown(rows), sentence(rows), sep="\n\n")


if __name__ == "__main__":
    main()
