"""The importance matrix: E[x^2] of the inputs of every linear, by the tensor of the GGUF file that holds its weight.

The file is llama.cpp's (`llama-imatrix`): a GGUF file whose `general.type` is `imatrix`, with the sums of squares `NAME.in_sum2` and the
number of summed tokens `NAME.counts` of each tensor NAME; `llama-quantize --imatrix` takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from moyu.measure.windows import Windows
from moyu.model.architectures import ARCHITECTURES
from moyu.model.gguf.configuration import target
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import File, read
from moyu.model.quantised import QuantisedLinear

SUMS, COUNTS = ".in_sum2", ".counts"
HEAD, TABLE = "output.weight", "token_embd.weight"


def linears(file: File, model: nn.Module) -> dict[str, nn.Module]:
    """The linear that holds each matrix of the layers, by the name of its tensor."""
    architecture = ARCHITECTURES[Metadata(file).architecture]
    modules, found = dict(model.named_modules()), {}
    for name in file.tensors:
        place = (target(architecture, name) or "").removesuffix(".weight")
        if name.startswith("blk.") and isinstance(modules.get(place), nn.Linear | QuantisedLinear):
            found[name] = modules[place]
    return found


@torch.no_grad()
def measure(file: File, model: Any, windows: Windows, batch: int = 4) -> dict[str, np.ndarray]:
    """E[x^2] over all positions of the windows, (n,) float32 by tensor; of the head too."""
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares = x.detach().double().square().flatten(0, -2).sum(0)  # (n,)
        sums[name] = sums.get(name, torch.zeros(())) + squares

    hooks = [module.register_forward_pre_hook(_seen(name, add)) for name, module in linears(file, model).items()]
    try:
        for tokens in windows.tokens.split(batch):
            last = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state  # (B, T, d)
            add(HEAD if HEAD in file.tensors else TABLE, last)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: (total / windows.tokens.numel()).float().numpy() for name, total in sums.items()}


def _seen(name: str, add: Callable[[str, Tensor], None]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    """A hook that hands over a module's input."""
    return lambda _, given: add(name, given[0])


class _Writer(gguf.GGUFWriter):
    """A file without an architecture."""

    def add_architecture(self) -> None:
        """It is no model."""


def write(path: Path, matrix: Mapping[str, np.ndarray], windows: Windows) -> None:
    """Write llama.cpp's file."""
    chunks, size = windows.tokens.shape
    writer = _Writer(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [windows.source["file"]])
    writer.add_uint32("imatrix.chunk_count", chunks)
    writer.add_uint32("imatrix.chunk_size", size)
    for name in sorted(matrix):  # in llama.cpp's order
        writer.add_tensor(name + SUMS, (matrix[name] * (chunks * size)).astype(np.float32)[None])
        writer.add_tensor(name + COUNTS, np.array([[chunks * size]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(path: Path) -> dict[str, np.ndarray]:
    """E[x^2] of such a file, (n,) float32 by tensor."""
    file = read(path)
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    return {
        name: (file.values(name + SUMS).flatten() / file.values(name + COUNTS).flatten()).numpy().copy()
        for name in names
    }
