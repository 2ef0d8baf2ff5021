"""Coverage: every causal LM of the installed transformers is built tiny, dissected and checked, each in its own process."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from moyu import records
from moyu.errors import UserError
from moyu.files import atomic_write_bytes, key_of, locked
from moyu.records import Coverage
from moyu.research.coverage import page as pages

SECONDS = 90  # the most time for one type
MEMORY = 8 << 30  # the most address space for one type, in bytes; torch alone maps about 4 GB
JOBS = 2
DEFINITION = 1  # of the examination: one more wherever what it checks changes


def names() -> list[str]:
    """All known types."""
    from moyu.research.coverage import shrinking  # torch and transformers; reading records does without

    return shrinking.names()


def run(
    only: Sequence[str],
    path: Path,
    *,
    jobs: int = JOBS,
    again: bool = False,
    stage: Callable[[str, int, int], None] = lambda name, done, total: None,
) -> list[Coverage]:
    """Examine the types of `only` (empty: all) and store one record of each in `path`. Types with a record are skipped.

    Records of other versions of torch, transformers or the examination do not count. Returns the types' records by name.
    """
    key = made_from()
    before = records.read(path) if path.exists() else []
    kept = {r.architecture: r for r in before if isinstance(r, Coverage) and r.made_from == key}
    wanted = sorted(only) or names()
    missing = [t for t in wanted if again or t not in kept]
    for done, fields in enumerate(survey(missing, jobs=jobs)):
        stage("coverage", done + 1, len(missing))
        record = records.stamp(kind="coverage", seed=0, dtype="float32", made_from=key, **fields)
        assert isinstance(record, Coverage)
        kept[record.architecture] = record
        records.append(path, record)
    with locked(path):  # what another process has examined meanwhile stays
        rows = records.read(path) if path.exists() else []
        kept = {r.architecture: r for r in rows if isinstance(r, Coverage) and r.made_from == key} | kept
        records.write(path, [kept[name] for name in sorted(kept)])
    return [kept[name] for name in wanted]


def made_from() -> str:
    """What a record follows from beside its type: models are built tiny, with random weights of seed 0."""
    versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers")}
    return key_of(settings=versions, definition=DEFINITION)


def write_page(rows: Sequence[Coverage], path: Path) -> None:
    """Write docs/coverage.md from records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write_bytes(path, pages.page(rows).encode())


def verdict(rows: Sequence[Coverage]) -> str:
    """How many are supported, of the types that build and have a feed-forward network."""
    taken, networks = pages.share(rows)
    return f"taken: {taken} of {networks} types that build and have a feed-forward network"


def survey(types: Sequence[str], *, jobs: int = JOBS, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Examine types, `jobs` at a time. Yields the fields of each as soon as it is done.

    Each type has a process of its own, forked from one that has already imported torch and transformers. A process that takes
    longer than `seconds` or more memory than MEMORY is ended, and its type fails with that reason.
    """
    known = set(names())
    unknown = [t for t in types if t not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 3, 0.0)
        raise UserError(f"transformers has no causal LM of type {unknown[0]!r}", f"did you mean {', '.join(near)}?")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["moyu.research.coverage.preload"])
    waiting, running = list(types), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(name, there), daemon=True)
            process.start()
            there.close()
            running[here] = (name, process, time.monotonic())
        for here in wait(list(running), timeout=min(1.0, seconds)):
            name, process, start = running.pop(here)  # pyright: ignore[reportArgumentType]
            yield _collect(name, here, process, start)  # pyright: ignore[reportArgumentType]
        for here, (name, process, start) in list(running.items()):
            if time.monotonic() - start > seconds:
                process.kill()
                process.join()
                del running[here]
                yield _failed(name, f"took more than {seconds:.0f} s", start)


def _collect(name: str, here: Connection, process: Any, start: float) -> dict[str, Any]:
    try:
        fields = here.recv()
    except EOFError:
        process.join()
        return _failed(name, f"its process ended with code {process.exitcode}", start)
    process.join()
    return fields | {"seconds": round(time.monotonic() - start, 2)}


def _failed(name: str, reason: str, start: float) -> dict[str, Any]:
    seconds = round(time.monotonic() - start, 2)
    return {"architecture": name, "status": "fails", "taken": False, "reason": reason, "seconds": seconds}


def _child(name: str, there: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HF_HUB_OFFLINE"] = "1"
    checks = importlib.import_module("moyu.research.coverage.checks")
    try:
        fields = checks.examine(name)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{os.path.basename(place.filename)}:{place.lineno}"
        fields = {"architecture": name, "status": "fails", "taken": False}
        fields["reason"] = f"{type(error).__name__}: {checks.first_line(error)} ({where})"
    there.send(fields)
    there.close()
    os._exit(0)  # without waiting for threads that the type has started
