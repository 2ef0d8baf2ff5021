"""Files that are whole or not there: write beside, then rename. And what is found again by what it was made from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path`; on any error the old file stays and nothing is left behind."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8, as `atomic_write_bytes` does."""
    atomic_write_bytes(path, text.encode())


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. ValueError for what is none, for bytes that are not UTF-8, and for a text that is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process that asks for `path` here is inside: read, change and write it. The lock is a file beside it."""
    with open(path.parent / f".{path.name}.lock", "ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def key_of(**made_from: Any) -> str:
    """16 hex digits over all that a result was made from, by which it is found again.

    That is: the digest of the weights (`weights`), the text, the settings, and the version of the definition of what is computed.
    """
    return hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
