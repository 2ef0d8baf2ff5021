"""Records in files, one JSON object per line: validated when they are made, written and read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from moyu.errors import UserError, place_of
from moyu.files import atomic_write_bytes, locked, parse_json
from moyu.measure.environment import machine
from moyu.records.schema import KINDS, Record, kind_of
from moyu.records.stamping import stamped

FILE = "records.jsonl"  # beside a plan: what was measured of it


def stamp(**fields: Any) -> Record:
    """A record of these fields and the fields of every record. Raises ValueError, which names the wrong field."""
    base: dict[str, Any] = dict(stamped())
    if fields.get("kind") == "environment":
        base |= machine()
    return validate(base | fields)


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def validate(fields: Any) -> Record:
    """A record from plain values. Raises ValueError like ``quality.kl must be >= 0, not -1.0``."""
    try:
        return _adapter().validate_python(fields)
    except ValidationError as error:
        raise ValueError("; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    place = place_of(error["loc"])
    value, context, legal = error["input"], error.get("ctx", {}), [kind_of(k) for k in KINDS]
    for bound, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if bound in context:
            return f"{place} must be {sign} {context[bound]:g}, not {value!r}"
    match error["type"]:
        case "missing":
            return f"{place} is missing"
        case "extra_forbidden":
            return f"{place} is not a field of this record"
        case "value_error":
            return f"{place}: {context['error']}"
        case "union_tag_not_found":
            return f"kind is missing, one of {', '.join(legal)}"
        case "union_tag_invalid":
            near = get_close_matches(context["tag"], legal, n=1, cutoff=0.3)
            return f"kind {context['tag']!r} is unknown" + (
                f", did you mean {near[0]!r}?" if near else f", one of {', '.join(legal)}"
            )
    return f"{place or 'record'}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {value!r}"


def _line(record: Record) -> bytes:
    plain = record.model_dump(mode="python")
    validate(plain)  # a record that was built without checks must not reach a file
    return json.dumps({"kind": plain.pop("kind"), **plain}, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write(path: Path, records: Iterable[Record]) -> None:
    """Write all records, or leave the old file as it was. Raises ValueError for a wrong record, OSError from the disk."""
    atomic_write_bytes(path, b"".join(_line(r) for r in records))


def append(path: Path, record: Record) -> None:
    """Append one line and sync it to disk; processes that write to one file take turns.

    Raises UserError if the last line is truncated; an OSError leaves no partial line.
    """
    line = _line(record)
    with locked(path), open(path, "ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                read(path)  # raises UserError if the last line is truncated
                line = b"\n" + line
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def read(path: Path | str) -> list[Record]:
    """All records of a file. Raises UserError like ``records.jsonl:12: quality.kl must be >= 0, not -1.0``."""
    return list(_parse(Path(path)))


def _parse(path: Path) -> Iterator[Record]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"no records in {str(path)!r} ({error.strerror})", "`moyu run` writes them") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            plain = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                raise UserError(f"{where}: the last line is truncated", "delete it, or run again") from error
            raise UserError(f"{where}: not JSON ({error})", "delete the line, or run again") from error
        try:
            yield validate(plain)
        except ValueError as error:
            raise UserError(f"{where}: {error}", "fields are in docs/records.md") from error
