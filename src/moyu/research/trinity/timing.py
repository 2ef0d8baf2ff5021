"""Speed of the methods of a scoreboard, on random weights of a published shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moyu import methods, records
from moyu.calibration.settings import Stage, quiet
from moyu.calibration.speed import bench_shape
from moyu.files import key_of
from moyu.measure.environment import device_name
from moyu.research.trinity.asked import QUANTISE, Asked
from moyu.research.trinity.board import DEFINITION

SHAPE, SHAPE_LAYERS = "llama-3.2-1b", 4


def timed(asked: Asked, out: Path, rows: Sequence[records.Record], stage: Stage = quiet) -> list[records.Record]:
    """Speed on a random-weight shape of the methods that have cells, each at the largest byte fraction asked for.

    All of them and dense alternate in one run, whose records are kept; a pass that stops finds the plans that took training.
    """
    names = [n for n in asked.names() if n != QUANTISE and methods.method_class(n).family != "reference"]
    names = [n for n in names if any(isinstance(r, records.Cell) and r.method == n and r.kl is not None for r in rows)]
    if not names:
        return []
    shape, layers = ("tiny", 2) if asked.quick else (SHAPE, SHAPE_LAYERS)
    fraction = max(asked.fractions())
    run = key_of(
        weights=[shape, layers, asked.seed],  # random ones, which follow from these
        settings=[fraction, asked.device, asked.backend, {n: methods.method(n).knobs() for n in names}],
        machine=[device_name(asked.device), torch.get_num_threads()],
        definition=DEFINITION,
    )
    folder = out / ("speed-quick" if asked.quick else "speed")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{run}.jsonl"
    if not file.exists():
        found = bench_shape(
            shape,
            dict.fromkeys(names, 0.0),
            byte_fraction=fraction,
            keep=folder / "plans",
            layers=layers,
            rounds=3,
            backend=asked.backend,
            device=asked.device,
            seed=asked.seed,
            stage=stage,
        )
        records.write(file, found)
    return records.read(file)
