"""Text to token windows: a user's file, or the zoo's own held-out corpus."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moyu import zoo
from moyu.calibration import Windows
from moyu.errors import UserError
from moyu.models import Loaded


@dataclass(frozen=True)
class Split:
    """Calibration and test windows that share no text."""

    calibration: Windows
    test: Windows
    test_bytes: int  # bytes of text that the scored positions of `test` predict


def windows_for(
    loaded: Loaded,
    file: Path | None,
    *,
    length: int,
    prompt: int,
    calibration: int,
    test: int,
    seed: int = 0,
) -> Split:
    """Windows for a model: from `file` (its first half calibrates, its second half tests), else from the zoo's corpus.

    Raises UserError where the text is missing, empty or shorter than one window a half.
    """
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"windows of {length} tokens, but {loaded.name!r} reads at most {limit}", f"use --window {limit}"
        )
    if file is None:
        return _from_corpus(loaded, length, prompt, calibration, test, seed)
    text = read_text(file)
    half = len(text) // 2
    source = {"file": file.name, "sha256": hashlib.sha256(text.encode()).hexdigest()[:16]}
    first = _windows(loaded, [text[:half]], length, prompt, calibration, source | {"part": "first half"}, seed)
    second = _windows(loaded, [text[half:]], length, prompt, test, source | {"part": "second half"}, seed)
    return Split(first, second, scored_bytes(loaded, second))


def read_text(file: Path) -> str:
    """A user's text; UserError where it cannot be read or is empty."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read text {str(file)!r} ({error.strerror})", "give a readable text file to --text"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{str(file)!r} is not UTF-8 text", "convert it, or give another file to --text") from error
    if not text.strip():
        raise UserError(f"text {str(file)!r} is empty", "give a file with text to --text")
    return text


def _from_corpus(loaded: Loaded, length: int, prompt: int, calibration: int, test: int, seed: int) -> Split:
    parts = []
    for documents, count, name in (
        (zoo.corpus.train_documents(max_bytes=calibration * length * 8), calibration, "train"),
        (zoo.corpus.held_out("test", max_bytes=test * length * 12), test, "test"),
    ):
        source: Mapping[str, Any] = {"corpus": "python", "split": name, **zoo.corpus.fingerprint(documents)}
        parts.append(_windows(loaded, [d.text for d in documents], length, prompt, count, source, seed))
    return Split(parts[0], parts[1], scored_bytes(loaded, parts[1]))


def _windows(
    loaded: Loaded, texts: Iterable[str], length: int, prompt: int, count: int, source: Mapping[str, Any], seed: int
) -> Windows:
    """`count` windows (fewer where the text ends), spread over the documents, each beginning with BOS where there is one."""
    tokenizer = loaded.tokenizer
    bos = tokenizer.bos_token_id
    step = length - (bos is not None)
    rows: list[list[int]] = []
    total = 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        rows += [([] if bos is None else [bos]) + ids[i : i + step] for i in range(0, len(ids) - step + 1, step)]
    if not rows:
        raise UserError(
            f"the text has {total} tokens, fewer than one window of {length}",
            "give a longer text, or a smaller --window",
        )
    random.Random(seed).shuffle(rows)
    return Windows(torch.tensor(rows[:count]), prompt, source)


def scored_bytes(loaded: Loaded, windows: Windows) -> int:
    """UTF-8 bytes of the tokens that the scored positions predict."""
    spans = loaded.tokenizer.batch_decode(windows.tokens[:, windows.prompt + 1 :])
    return sum(len(s.encode()) for s in spans)
