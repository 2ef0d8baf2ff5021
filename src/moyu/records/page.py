"""The tables of docs/records.md, from the schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from moyu.records import parts
from moyu.records.schema import KINDS, MethodRecord, ModelRecord, Stamped, kind_of


def schema_markdown() -> str:
    """The fields of every kind of record, as the tables of docs/records.md."""
    shared = [
        ("Every record", Stamped),
        ("A record about a model", ModelRecord),
        ("A record about a method", MethodRecord),
    ]
    kinds = [(f"`{kind_of(k)}`", k) for k in KINDS]
    objects = [
        ("`protocol`", parts.Protocol),
        ("`kv_bytes` of a record about a method", parts.KvBytes),
        ("`search` of `quality`", parts.Search),
        ("`correction` of `generation`", parts.Correction),
        ("`layers` of `profile`", parts.LayerNeed),
        ("`token_curve` of `profile`", parts.PositionNeed),
        ("`conditions` of `study`", parts.Condition),
        ("`controls` of `study`", parts.Control),
    ]
    return "\n".join(_section(title, model) for title, model in shared + kinds + objects)


def _section(title: str, model: type[BaseModel]) -> str:
    """A heading, the fields that it extends, and one row per field of its own."""
    schema = model.model_json_schema()
    base = {ModelRecord: "a record about a model", MethodRecord: "a record about a method", Stamped: "every record"}
    above = next((f" The fields of {base[b]}, and:" for b in model.__mro__[1:] if b in base), "")
    lines = [
        f"### {title}",
        "",
        f"{schema['description']}{above}",
        "",
        "| field | type | | meaning |",
        "|---|---|---|---|",
    ]
    for name in model.__annotations__:
        if name in schema["properties"] and name != "kind":
            entry = schema["properties"][name]
            meaning = entry.get("description", "").replace("|", "\\|")
            need = "required" if name in schema.get("required", ()) else ""
            lines.append(f"| `{name}` | {_type(entry)} | {need} | {meaning} |")
    return "\n".join([*lines, ""])


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "anyOf" in entry:
        return " or ".join(_type(e) for e in entry["anyOf"])
    if "enum" in entry:
        return " or ".join(f"`{v}`" for v in entry["enum"])
    if "$ref" in entry:
        return "object"
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    return " ".join([entry["type"], *(f"{sign} {entry[key]:g}" for key, sign in bounds.items() if key in entry)])
