"""A griffe extension for the API page: parameters (`name: ...` at the start of a docstring's line) become items of a list."""

from __future__ import annotations

import re
from typing import Any

import griffe

PARAMETER = re.compile(r"^(\w+(?:, \w+)*): ", re.MULTILINE)


class Parameters(griffe.Extension):
    """Turns the lines of every docstring."""

    def on_instance(self, *, obj: Any, **others: Any) -> None:
        """A module, class, function or attribute was read."""
        if obj.docstring is not None:
            obj.docstring.value = PARAMETER.sub(r"\n- `\1`: ", obj.docstring.value)
