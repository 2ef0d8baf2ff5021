"""Two texts side by side, token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import SequenceMatcher

from markupsafe import Markup, escape

from moyu.records import Generation


def marked(record: Generation) -> tuple[Markup | None, Markup]:
    """Dense and sparse text, with `<mark>` around the tokens that differ; None where dense did not run."""
    if record.dense_tokens is None or record.dense_text is None:
        return None, escape(record.sparse_text)
    dense, sparse = _pieces(record.dense_tokens, record.dense_text), _pieces(record.sparse_tokens, record.sparse_text)
    same = SequenceMatcher(None, dense, sparse, autojunk=False)
    out: list[list[Markup]] = [[], []]
    for kind, a, b, c, d in same.get_opcodes():
        for side, part in zip(out, (dense[a:b], sparse[c:d]), strict=True):
            text = escape("".join(part))
            side.append(Markup("<mark>{}</mark>").format(text) if part and kind != "equal" else text)
    return Markup("").join(out[0]), Markup("").join(out[1])


def _pieces(tokens: Sequence[str], text: str) -> list[str]:
    """The tokens if they add up to the text (a character may span several tokens), else its words."""
    return list(tokens) if "".join(tokens) == text else re.findall(r"\s+|\S+", text)
