"""MkDocs' hook: pages that live outside docs/, notebooks as pages, and links that hold in the repository as well as on the site.

A page is written with links that work where it lies (`../benchmarks/cpu/README.md`). Here each is turned into one between pages of the
site; one that leads to a file that the site does not have is a warning, which `mkdocs build --strict` refuses.
"""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {  # file in the repository -> page of the site
    "CONTRIBUTING.md": "extend.md",
    "CHANGELOG.md": "changes.md",
    **{f"benchmarks/{name}/README.md": f"benchmarks/{name}.md" for name in ("cpu", "gpu", "kernels", "quants")},
}
NOTEBOOKS = "docs/notebooks"
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
BLOCK = re.compile(r"(```.*?```)", re.DOTALL)
log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of OUTSIDE."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    for notebook in sorted((ROOT / NOTEBOOKS).glob("*.ipynb")):
        files.remove(files.get_file_from_path(f"notebooks/{notebook.name}"))
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=page_of(notebook)))
    return files


def page_of(notebook: Path) -> str:
    """A notebook as Markdown: its text, its code, and what the code printed."""
    parts = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += ["```text\n" + "".join(o["text"]).rstrip() + "\n```" for o in cell.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turn a page's links; code stays as it is."""
    where = PurePosixPath(page.file.src_uri)
    lies = Path(page.file.abs_src_path or Path(config.docs_dir) / where).parent  # a notebook's page is no file

    def turned(match: re.Match[str]) -> str:
        target, sign, anchor = match[2].partition("#")
        if not target or re.match(r"[a-z]+:", target):
            return match[0]
        path = Path(os.path.normpath(lies / target))
        known = OUTSIDE.get(str(path.relative_to(ROOT))) if path.is_relative_to(ROOT) else None
        if known is None and path.is_relative_to(config.docs_dir):
            known = re.sub(r"\.ipynb$", ".md", path.relative_to(config.docs_dir).as_posix())
        if known is None:
            log.warning("%s: the site has no page for %r", where, target)
            return match[0]
        return f"{match[1]}{os.path.relpath(known, where.parent)}{sign}{anchor}{match[3]}"

    return "".join(part if BLOCK.fullmatch(part) else LINK.sub(turned, part) for part in BLOCK.split(markdown))
