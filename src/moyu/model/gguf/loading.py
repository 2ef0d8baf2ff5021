"""Load a model from a GGUF file: weights as they are stored, configuration and tokenizer from the file."""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from moyu.model.architectures import ARCHITECTURES
from moyu.model.gguf.configuration import configuration
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import DTYPES, File, read
from moyu.model.gguf.sources import sources
from moyu.model.gguf.tokenizer import tokenizer_of
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import FORMATS, IN_FILES, Stored, mapped

KINDS = {name.upper(): FORMATS[name] for name in IN_FILES}


def load(path: Path, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer of a file. Raises UserError for a damaged file and for an unsupported architecture."""
    file = read(path)
    tokenizer = tokenizer_of(file)
    return load_model(file, dtype), tokenizer


@torch.no_grad()
def load_model(file: File, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A causal LM with the file's weights, for inference.

    Quantised matrices are kept bit for bit; quants and scales are stored apart. Quantised weights that no module of MOYU holds,
    as the stacked ones of routed experts, become plain numbers. Matrices of 16 and 32 bits stay views of the mapped file, except
    a Llama's q and k, whose rows change places. dtype: the type to compute in. By default it is the type that all matrices share;
    if they differ or are quantised it is float32, which represents the values of every type exactly.
    """
    config = configuration(file)
    architecture = ARCHITECTURES[Metadata(file).architecture]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    found = sources(file, empty, architecture)
    kinds = {file.tensors[name].kind for name in file.tensors if len(file.tensors[name].shape) > 1}
    dtype = dtype or (DTYPES.get(next(iter(kinds))) if len(kinds) == 1 else None) or torch.float32
    state: dict[str, Tensor] = {}
    blocks: dict[str, Stored] = {}
    for parameter, source in found.items():
        if source.held:
            (name,) = source.names
            blocks[parameter] = _blocks(source.file, name, source.heads)
            state[parameter] = torch.zeros((), dtype=dtype).expand(source.file.tensors[name].shape)  # takes no memory
            continue
        parts = [_values(source.file, name, dtype) for name in source.names]
        weight = parts[0] if source.how is None else source.how(*parts)
        if parameter.endswith("norm.weight") and architecture.norms_from:
            weight = weight.float() - architecture.norms_from
        weight = in_halves(weight, source.heads) if source.heads else weight
        state[parameter] = weight.to(dtype).view(empty.get_parameter(parameter).shape)
        for name in source.names:
            mapped.let_go(source.file.stored(name))
    model = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    for parameter, weight in blocks.items():
        _keep(model, parameter.removesuffix(".weight"), weight, dtype)
    return model.eval()


def _values(file: File, name: str, dtype: torch.dtype) -> Tensor:
    """A tensor of the file in its shape: its own numbers, or those that blocks stand for in `dtype`."""
    entry = file.tensors[name]
    if entry.kind in DTYPES:
        return file.values(name)
    matrix = (prod(entry.shape[:-1]), entry.shape[-1])
    return KINDS[entry.kind].read(file.stored(name), matrix).values(dtype).view(entry.shape)


def _blocks(file: File, name: str, heads: int) -> Stored:
    """A quantised matrix of the file, scales and quants apart. heads: rows of that many heads change places (0: none do)."""
    entry, stored = file.tensors[name], file.stored(name)
    weight = KINDS[entry.kind].read(in_halves(stored, heads) if heads else stored, (entry.shape[0], entry.shape[1]))
    mapped.let_go(stored)
    return weight


def _keep(model: PreTrainedModel, place: str, blocks: Stored, dtype: torch.dtype) -> None:
    """Replace an embedding or a linear by a module that holds quantised weights."""
    module = model.get_submodule(place)
    if not isinstance(module, nn.Embedding):
        model.set_submodule(place, QuantisedLinear(blocks, module.bias, dtype))  # pyright: ignore[reportArgumentType]
        return
    # Gemma multiplies embeddings by a factor: inside the embedding in newer versions of transformers, behind it in older ones.
    scale = float(getattr(module, "scalar_embed_scale", 1.0))
    embedding = QuantisedEmbedding(blocks, dtype) if scale == 1 else _Scaled(blocks, dtype, scale)
    model.set_submodule(place, embedding)
    if model.config.tie_word_embeddings:
        head = QuantisedLinear(blocks, None, dtype)
        head.tie(embedding)
        model.set_output_embeddings(head)


class _Scaled(QuantisedEmbedding):
    """An embedding whose rows are multiplied by a factor, which is rounded as transformers rounds it."""

    def __init__(self, blocks: Stored, dtype: torch.dtype, scale: float) -> None:
        super().__init__(blocks, dtype)
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        """(...) -> (..., d)."""
        return super().forward(ids) * torch.tensor(self.scale, dtype=self.like.dtype, device=self.like.device)


def in_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows (heads * head_dim, ...) of q or k from llama.cpp's rotation pairs to transformers' two halves."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def in_pairs(rows: Tensor, heads: int) -> Tensor:
    """The inverse."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
