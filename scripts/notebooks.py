"""Run the notebooks of docs/notebooks and keep what they print: `make notebooks`. Their cells are plain Python, run one after another."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of code."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def run(path: Path) -> dict[str, Any]:
    """The notebook with the outputs of a run. What a cell raises is raised here."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(code(notebook), 1):
        printed = io.StringIO()
        source = compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec", dont_inherit=True)
        with contextlib.redirect_stdout(printed):
            exec(source, names)
        lines = printed.getvalue().splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    return notebook


def main() -> None:
    """All notebooks, or those that are named."""
    for path in map(Path, sys.argv[1:] or sorted(map(str, FOLDER.glob("*.ipynb")))):
        print(path, flush=True)
        path.write_text(json.dumps(run(path), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
