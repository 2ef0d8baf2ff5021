"""What every record carries: where and when a number was measured."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TypedDict

from moyu.measure.environment import environment


class Stamp(TypedDict):
    """The fields of `records.Stamped`."""

    commit: str | None
    dirty: bool | None
    versions: dict[str, str]
    device: str
    threads: int
    dtype: str | None
    seed: int | None
    date: str
    notes: list[str]


def stamped(
    *, device: str | None = None, dtype: str | None = None, seed: int | None = None, notes: Sequence[str] = ()
) -> Stamp:
    """The stamp of a record that is made now; device: the processor where it is None."""
    import torch  # takes seconds; reading and reporting records does without

    here = environment()
    return {
        "commit": here["commit"],
        "dirty": here["dirty"],
        "versions": here["versions"],
        "device": device or here["device"],
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "seed": seed,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "notes": list(notes),
    }
