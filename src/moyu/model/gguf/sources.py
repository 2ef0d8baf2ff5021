"""Which tensors of a GGUF file each parameter of a model comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from moyu.model.architectures.base import Architecture
from moyu.model.architectures.rope import TENSORS
from moyu.model.gguf.configuration import target
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import DTYPES, File

SEPARATE = ("attn_q", "attn_k", "attn_v")  # what one tensor `attn_qkv` holds


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from."""

    file: File
    names: tuple[str, ...]  # of tensors
    how: Callable[..., Tensor] | None = None  # what makes a parameter of several; None: of one, as it is
    heads: int = 0  # rows of so many heads change places
    held: bool = False  # a quantised matrix, which a module of MOYU holds as it is


def sources(file: File, empty: PreTrainedModel, architecture: Architecture) -> dict[str, Source]:
    """The source of each parameter. Raises UserError if a tensor is missing, left over or of another shape.

    empty: the model that the file's metadata make, without values.
    """
    told, config = Metadata(file), empty.config
    file = _separated(file, config, architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if architecture.paired else {}
    wanted = dict(empty.named_parameters())
    found: dict[str, Source] = {}
    left = set(file.tensors) - set(TENSORS)
    for parameter in wanted:
        source = _made(file, parameter, architecture)
        if source is not None:
            found[parameter] = source
            left -= set(source.names)
    for name in (name for name in file.tensors if name in left):
        parameter = target(architecture, name)
        if parameter is None or parameter not in wanted or parameter in found:
            raise told.refuse(f"a {told.architecture} model has no tensor {name!r}")
        module = empty.get_submodule(parameter.rpartition(".")[0])
        matrix = isinstance(module, nn.Linear | nn.Embedding) and parameter.endswith(".weight")
        quantised = file.tensors[name].kind not in DTYPES
        found[parameter] = Source(file, (name,), None, heads.get(parameter.split(".")[-2], 0), matrix and quantised)
    for parameter, like in wanted.items():
        if parameter not in found:
            raise told.refuse(f"there is no tensor for {parameter}, which a {told.architecture} model has")
        _check(told, found[parameter], tuple(like.shape))
    # in the order of the file, whose pages are given back one after another
    return dict(sorted(found.items(), key=lambda item: item[1].file.tensors[item[1].names[0]].offset))


def _made(file: File, parameter: str, architecture: Architecture) -> Source | None:
    """The source of a parameter that several tensors make, where the file has them."""
    place, _, name = parameter.partition(".layers.")[2].partition(".")
    made = architecture.made.get(name)
    if made is None:
        return None
    names = tuple(f"blk.{place}.{part}" for part in made.of)
    return Source(file, names, made.how) if all(name in file.tensors for name in names) else None


def _separated(file: File, config: PretrainedConfig, architecture: Architecture) -> File:
    """The file with q, k and v as tensors of their own, where it has them in one and the model does not: views, no copies."""
    if "attn_qkv" in architecture.layer:
        return file
    width = config.head_dim
    rows = [width * n for n in (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)]
    tensors = {}
    for name, entry in file.tensors.items():
        if ".attn_qkv." not in name or entry.shape[0] != sum(rows):
            tensors[name] = entry
            continue
        of_row, at = entry.nbytes // entry.shape[0], entry.offset
        for part, count in zip(SEPARATE, rows, strict=True):
            own = name.replace("attn_qkv", part)
            size = count * of_row
            tensors[own] = replace(entry, name=own, shape=(count, *entry.shape[1:]), offset=at, nbytes=size)
            at += size
    return replace(file, tensors=tensors)


def _check(told: Metadata, source: Source, wanted: tuple[int, ...]) -> None:
    """Refuse tensors of another shape, and quantised rows of numbers."""
    entries = [source.file.tensors[name] for name in source.names]
    for entry in entries:
        if len(entry.shape) == 1 and entry.kind not in DTYPES:
            raise told.refuse(f"{entry.name} is {entry.kind}, but only matrices may be quantised")
    shapes = " and ".join(str(entry.shape) for entry in entries)
    refused = told.refuse(f"{' and '.join(source.names)} has shape {shapes}, but the metadata say {wanted}")
    if source.how is None:
        # an output of its own may come as one row of numbers
        if entries[0].shape != wanted and (prod(wanted) != prod(entries[0].shape) or wanted[0] != 1):
            raise refused
        return
    try:
        made = source.how(*(torch.empty(entry.shape, device="meta") for entry in entries))
    except (RuntimeError, IndexError) as error:
        raise refused from error
    if tuple(made.shape) != wanted:
        raise refused
