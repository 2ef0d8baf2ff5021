"""Documents of a text, and windows of them: scored ones, one a document, and others for the importance matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from moyu.errors import UserError
from moyu.measure.documents import documents as split
from moyu.measure.text import read_text
from moyu.measure.windows import Windows

LONG = 40  # characters: a line that says where it comes from
SHARED = 0.1  # of the scored documents' long lines may stand in the calibration text: licences, imports


@dataclass(frozen=True)
class Texts:
    """What is scored, and what the importance matrix is measured on; they have no document in common."""

    scored: Windows
    calibration: Windows
    rest: str = ""  # the calibration text without what is scored, for those who calibrate plans


def documents(file: Path) -> list[str]:
    """The documents of a text file."""
    return split(file, read_text(file))


def texts(
    tokenizer: PreTrainedTokenizerBase,
    scored: Path,
    calibration: Path,
    *,
    count: int,
    length: int,
    prompt: int,
    chunks: int,
    chunk: int,
) -> Texts:
    """The first `length` tokens of the first `count` documents that are as long, and `chunks` windows of `chunk` other tokens.

    Documents that are scored are left out of the calibration text, so that both may come from one file. Raises UserError where
    fewer than two documents are long enough, and where other calibration documents have the scored ones' lines.
    """
    chosen, rows = [], []
    for document in documents(scored):
        ids = encode(tokenizer, document)
        if len(ids) >= length and len(rows) < count:
            chosen.append(document)
            rows.append(ids[:length])
    if len(rows) < 2:
        raise UserError(f"{scored} has {len(rows)} documents of {length} tokens", "give more, or a smaller --window")
    others = [d for d in documents(calibration) if d not in chosen]
    if (share := overlap(chosen, others)) > SHARED:
        raise UserError(f"{share:.0%} of the scored text is in {calibration}", "calibrate on other text")
    own = [ids[i : i + chunk] for d in others for ids in [encode(tokenizer, d)] for i in range(0, len(ids), chunk)]
    own = [ids for ids in own if len(ids) == chunk]
    if not own:
        raise UserError(f"{calibration} has no {chunk} tokens besides those that are scored", "give more text")
    step = max(1, len(own) // chunks)  # from all of the text
    return Texts(
        Windows(torch.tensor(rows), prompt, {"file": scored.name}, tuple(range(len(rows)))),
        Windows(torch.tensor(own[::step][:chunks]), 0, {"file": calibration.name}),
        "".join(others),
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a document, with BOS before them if there is one."""
    ids: Any = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def overlap(scored: Sequence[str], others: Sequence[str]) -> float:
    """The share of the scored documents' long lines that also stand in the others."""
    known = {line.strip() for text in others for line in text.splitlines()}
    long = [line.strip() for text in scored for line in text.splitlines() if len(line.strip()) >= LONG]
    return sum(line in known for line in long) / max(1, len(long))
