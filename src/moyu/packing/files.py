"""From a model by name, a folder or a GGUF file to the packed file."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from moyu.errors import UserError
from moyu.measure.text import windows_for
from moyu.model import loading
from moyu.model.gguf.converting import convert
from moyu.model.gguf.reader import read
from moyu.model.named import gguf_file
from moyu.packing import choosing, packer

BITS = 5.0  # where nothing is asked


def make(
    model: str,
    out: Path,
    *,
    bits: float | None = None,
    kind: str | None = None,
    head: str | None = None,
    text: Path | None = None,
    windows: int = 64,
    window: int = 256,
    seed: int = 0,
    stage: packer.Stage | None = None,
) -> dict[str, Any]:
    """Pack a model into the file `out`, and say what it is.

    bits: a weight, scales included, of the matrices that are packed; kind: one type for all, with `head` for the head. Raises UserError.
    """
    if bits is not None and kind is not None:
        raise UserError("--bits and --type both say how many bits a weight has", "give one of them")
    if head is not None and kind is None:
        raise UserError("--head is the type of the head beside --type", "give --type, or leave it out")
    if out.suffix != ".gguf":
        raise UserError(f"{str(out)!r} is no name of a GGUF file", f"write --out {out.with_suffix('.gguf')}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write into {str(out.parent)!r}", "make the folder, or choose another --out")
    loaded = loading.load(model)
    if (source := gguf_file(model)) is not None and out.exists() and out.samefile(source):
        raise UserError(f"{str(out)!r} is the model itself", "choose another --out")
    split = windows_for(loaded, text, length=window, prompt=0, calibration=windows, test=1, seed=seed)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        if source is None:
            source = convert(loaded.model, loaded.tokenizer, Path(folder) / "whole.gguf", Path(model).name)
        del loaded
        file = read(source)
        packer.require_whole(file)
        if kind is None:
            asked = BITS if bits is None else bits
            chosen = choosing.choose(file, split.calibration, asked, seed=seed, stage=stage)
        else:
            chosen = packer.kinds(file, kind, head)
        if not chosen:
            raise UserError(
                f"no matrix of {model!r} has rows of whole groups of 32 weights", "there is nothing to pack"
            )
        packer.pack(file, out, chosen, split.calibration, stage)
    packed = read(out)
    total, weights = packer.weight_bytes(packed, chosen)
    return {
        "file": str(out),
        "bytes": out.stat().st_size,
        "bits": round(8 * total / weights, 3),
        "types": packed.formats(),
    }
