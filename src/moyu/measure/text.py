"""From text to token windows: a user's file, or the zoo's corpus."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from moyu.errors import UserError
from moyu.measure.documents import documents, pieces
from moyu.measure.windows import Windows
from moyu.model import zoo
from moyu.model.loading import Loaded
from moyu.model.prompts import require_known

DOCUMENT = 8  # characters for each token of a window, in a piece that stands for a document

# What a user may give as a text: a file, the text itself, or its documents.
Text = str | Path | Sequence[str]

# Parts of a user's text: name, position in words, and end as a fraction.
PARTS = (("calibration", "first half", 1 / 2), ("validation", "third quarter", 3 / 4), ("test", "last quarter", 1.0))


@dataclass(frozen=True)
class Split:
    """Three sets of windows without common text: plans are fitted on the first, chosen on the second, reported on the third."""

    calibration: Windows
    validation: Windows
    test: Windows


def windows_for(
    loaded: Loaded,
    text: Text | None,
    *,
    length: int,
    prompt: int,
    calibration: int,
    test: int,
    seed: int = 0,
    by_document: bool = False,
) -> Split:
    """Windows for a model, from the parts of `text`, or from the splits of the zoo's corpus without a text.

    text: a file, the text itself, or a list of documents, none of whose windows reaches into the next. calibration, test: the most
    windows of these parts; validation has as many as test. by_document: windows lie inside one document (of a file: an article of
    WikiText, a line of JSON), parts are of whole documents, and one text is cut into pieces that stand for documents. Raises
    UserError if the text is missing or empty, or if one of its parts is shorter than a window or holds special tokens alone.
    """
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise UserError(
            f"windows of {length} tokens, but {loaded.name!r} reads at most {limit}", f"use --window {limit}"
        )
    if text is None:
        return _from_corpus(loaded, length, prompt, calibration, test, seed)
    given, source = _documents(text)
    whole = sum(map(len, given))
    placed = _placed(text, given, length) if by_document else None
    windows, start = {}, 0
    for name, part, end in PARTS:
        stop, count = round(whole * end), calibration if name == "calibration" else test
        texts = _between(given, start, stop) if placed is None else [d for at, d in placed if start <= at < stop]
        windows[name] = _windows(
            loaded, texts, f"the text's {part}", length, prompt, count, source | {"part": part}, seed
        )
        start = stop
    return Split(**windows)


def _placed(text: Text, given: Sequence[str], length: int) -> list[tuple[int, str]]:
    """The documents of a text, each with its place in characters as a share of the text's length."""
    found, whole = list(given), sum(map(len, given))
    if len(given) == 1:
        is_file = isinstance(text, Path) or (isinstance(text, str) and os.path.isfile(text))
        found = documents(Path(text) if is_file else Path(), given[0])  # pyright: ignore[reportArgumentType]
    if len(found) == 1:
        found = pieces(given[0], DOCUMENT * length)
    size, at, placed = sum(map(len, found)), 0, []
    for document in found:
        placed.append((round(at * whole / size), document))
        at += len(document)
    return placed


def _documents(text: Text) -> tuple[Sequence[str], dict[str, Any]]:
    """The documents of a text and what records say of it. Raises UserError for a text that is missing or empty.

    A string is a file's name where there is such a file, and where it is a single word: no text that calibrates is so short.
    """
    source = {}
    if isinstance(text, Path) or (isinstance(text, str) and (os.path.isfile(text) or len(text.split()) == 1)):
        source, text = {"file": Path(text).name}, read_text(Path(text))
    given = [text] if isinstance(text, str) else list(text)
    if wrong := [d for d in given if not isinstance(d, str)]:
        raise UserError(f"a document is {wrong[0]!r:.60}, not a string", "give a text, a list of texts, or a file")
    if not any(d.strip() for d in given):
        raise UserError("the text is empty", "give some 100 kB of text like the text you want")
    return given, source | {"sha256": hashlib.sha256("".join(given).encode()).hexdigest()[:16]}


def _between(documents: Iterable[str], start: int, stop: int) -> Iterator[str]:
    """The characters from `start` to `stop` of all documents in a row, document by document."""
    for document in documents:
        if start < len(document) and stop > 0:
            yield document[max(0, start) : stop]
        start, stop = start - len(document), stop - len(document)


def read_text(file: Path) -> str:
    """A user's text. Raises UserError if it cannot be read or is empty."""
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
    documents = {
        "train": zoo.corpus.train_documents(max_bytes=calibration * length * 8),
        "validation": zoo.corpus.held_out("validation", max_bytes=test * length * 12),
        "test": zoo.corpus.held_out("test", max_bytes=test * length * 12),
    }
    parts = []
    for name, files in documents.items():
        source = {"corpus": "python", "split": name, **zoo.corpus.fingerprint(files)}
        count = calibration if name == "train" else test
        texts = [d.text for d in files]
        parts.append(_windows(loaded, texts, f"the corpus' {name} split", length, prompt, count, source, seed))
    return Split(*parts)


def _windows(
    loaded: Loaded,
    texts: Iterable[str],
    what: str,
    length: int,
    prompt: int,
    count: int,
    source: Mapping[str, Any],
    seed: int,
) -> Windows:
    """At most `count` windows, drawn from all documents. Each begins with BOS if the tokenizer has one."""
    tokenizer = loaded.tokenizer
    bos = tokenizer.bos_token_id
    step = length - (bos is not None)
    rows: list[tuple[int, list[int]]] = []
    total = 0
    for document, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        total += len(ids)
        starts = range(0, len(ids) - step + 1, step)
        rows += [(document, ([] if bos is None else [bos]) + ids[i : i + step]) for i in starts]
    if not rows:
        raise UserError(
            f"{what} has {total} tokens, fewer than one window of {length}",
            "give a longer text, or a smaller --window",
        )
    random.Random(seed).shuffle(rows)
    chosen = rows[:count]
    if {token for _, ids in chosen for token in ids} <= set(tokenizer.all_special_ids):
        raise UserError(f"{what} is special tokens alone", "give a text with words to --text")
    ids = require_known(loaded, torch.tensor([ids for _, ids in chosen]))
    return Windows(ids, prompt, source, tuple(document for document, _ in chosen))


def scored_bytes(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, prompt: int) -> int:
    """UTF-8 bytes of the tokens (B, T) that positions from `prompt` on predict. Special tokens have no bytes.

    Tokens are decoded together with the token before them, because some tokenizers strip a leading space.
    """

    def size(ids: Tensor) -> int:
        return sum(len(text.encode()) for text in tokenizer.batch_decode(ids, skip_special_tokens=True))

    return size(tokens[:, prompt:]) - size(tokens[:, prompt : prompt + 1])
