"""Records: one JSON object per line, validated when made, when written and when read."""

from moyu.records.page import schema_markdown
from moyu.records.parts import Correction, KvBytes, LayerNeed, PositionNeed, Protocol, Search
from moyu.records.schema import (
    Cell,
    Comparison,
    Coverage,
    Environment,
    Generation,
    Kernel,
    MethodRecord,
    ModelRecord,
    Profile,
    Quality,
    Record,
    Speed,
    Stamped,
    Study,
    Task,
)
from moyu.records.store import FILE, append, read, stamp, validate, write

__all__ = [
    "FILE",
    "Cell",
    "Comparison",
    "Correction",
    "Coverage",
    "Environment",
    "Generation",
    "Kernel",
    "KvBytes",
    "LayerNeed",
    "MethodRecord",
    "ModelRecord",
    "PositionNeed",
    "Profile",
    "Protocol",
    "Quality",
    "Record",
    "Search",
    "Speed",
    "Stamped",
    "Study",
    "Task",
    "append",
    "read",
    "schema_markdown",
    "stamp",
    "validate",
    "write",
]
