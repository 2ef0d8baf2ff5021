"""What the name of a model means, and whether there is such a model here: known before torch is imported."""

from __future__ import annotations

import difflib
from pathlib import Path

from moyu.errors import UserError
from moyu.model import zoo


def gguf_file(name: str) -> Path | None:
    """The GGUF file that `name` is; None for a zoo name, a folder or a hub id."""
    path = Path(name)
    return path if name not in zoo.names() and (name.endswith(".gguf") or path.is_file()) else None


def check_name(name: str) -> None:
    """Refuse a name that is neither a zoo name, a file, a folder nor like a hub id. Whether the hub has it is not asked."""
    if name in zoo.names() or Path(name).exists():
        return
    if name.endswith(".gguf"):
        raise UserError(f"cannot read {name!r} (No such file or directory)", _neighbours(Path(name)))
    if name.count("/") != 1 or name.startswith((".", "/")):
        near = difflib.get_close_matches(name, zoo.names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"no model {name!r}",
            f"{hint}give a zoo name ({', '.join(zoo.names())}), a local folder, a GGUF file or a hub id",
        )


def _neighbours(path: Path) -> str:
    """The next step where a GGUF file is missing: the nearest one of its folder, if there is one."""
    files = [p.name for p in path.parent.glob("*.gguf")] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, files, n=1)
    return f"did you mean {str(path.parent / near[0])!r}?" if near else "give a GGUF file that can be read"
