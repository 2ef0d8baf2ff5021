"""What a cache remembers beside keys and values, and how it follows what happens to the cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from moyu.errors import UserError
from moyu.methods.control import Keep, Refresh


@dataclass(eq=False)
class SequenceMemory:
    """What a cache remembers beside keys and values; follows its reorder, repeat, select and crop."""

    owner: str | None = None  # hash of the plan that filled it
    prompt: int | Tensor | None = None  # columns before this one are dense; (B,) where sequences differ
    drawing: tuple[Any, int] | None = (
        None  # the running `generate`, and the tokens drawn when it last read a part of the prompt
    )
    sites: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # method's memory, (B, ...)
    masks: dict[str, Tensor] = field(default_factory=dict)  # frozen masks, (B, n)
    columns: dict[str, Tensor] = field(
        default_factory=dict
    )  # of every column of the cache, (B, T, ...): see `moyu.engine.attention`
    dense_until: int = 0  # the memory holds nothing from this column on
    seen: int = 0  # columns of the cache that came through the applied model
    tokens: Tensor | None = None  # (B, t), kept only where a controller asks
    steps: int = 0
    control: dict[str, Tensor] = field(default_factory=dict)  # the controller's memory, (B, ...)
    decision: Keep | Refresh = field(default_factory=Keep)

    def select(self, index: Tensor) -> None:
        """Keep the slots at `index`, in that order."""
        self.sites = {k: {n: t[index.to(t.device)] for n, t in m.items()} for k, m in self.sites.items()}
        self.masks = {k: t[index.to(t.device)] for k, t in self.masks.items()}
        self.columns = {k: t[index.to(t.device)] for k, t in self.columns.items()}
        self.control = {k: t[index.to(t.device)] for k, t in self.control.items()}
        if isinstance(self.prompt, Tensor):
            self.prompt = self.prompt[index.to(self.prompt.device)]
        if self.tokens is not None:
            self.tokens = self.tokens[index.to(self.tokens.device)]

    def repeat(self, repeats: int) -> None:
        """Every slot `repeats` times in a row."""
        slots = next((len(t) for m in self.sites.values() for t in m.values()), 0)
        slots = slots or (0 if self.tokens is None else len(self.tokens))
        slots = slots or next((len(t) for t in self.columns.values()), 0)
        self.select(torch.arange(slots).repeat_interleave(repeats))

    def joined(self, other: SequenceMemory, own: Tensor, others: Tensor) -> SequenceMemory:
        """The memory of a cache whose rows, of lengths own (B,), are followed by another's, of lengths others (C,).

        Raises UserError for what only sequences that started together can have.
        """
        if self.owner != other.owner:
            raise UserError("the sequences ran under different plans", "run them in batches of their own")
        if self.columns or other.columns or self.tokens is not None:
            raise UserError(
                "what this method keeps of a sequence cannot be put beside another sequence's",
                "start the rows of a batch together",
            )
        borders = [
            m.prompt if isinstance(m.prompt, Tensor) else torch.full((len(lengths),), m.prompt or 0)
            for m, lengths in ((self, own), (other, others))
        ]
        sites = {}
        for key in self.sites | other.sites:  # a routed expert may have seen tokens of one side alone
            mine, theirs = self.sites.get(key, {}), other.sites.get(key, {})
            parts = [(mine, len(own)), (theirs, len(others))]
            sites[key] = {
                name: torch.cat([m.get(name, like.new_zeros(rows, *like.shape[1:])) for m, rows in parts])
                for name, like in (mine | theirs).items()
            }
        return SequenceMemory(
            self.owner,
            torch.cat(borders),
            sites=sites,
            dense_until=max(self.dense_until, other.dense_until),
            seen=max(self.seen, other.seen),
        )

    def append(self, name: str, past: int, fresh: Tensor, unknown: float) -> Tensor:
        """Columns (B, T, ...) of a call that follows `past` ones: all columns so far; those that no call told are `unknown`."""
        known = self.columns.get(name, fresh[:, :0])[:, :past]
        gap = fresh.new_full((len(fresh), past - known.shape[1], *fresh.shape[2:]), unknown)
        self.columns[name] = torch.cat([known, gap, fresh], dim=1)
        return self.columns[name]

    def crop(self, length: int) -> None:
        """The cache now holds `length` columns: forget what came from later ones."""
        if length < self.dense_until:
            self.sites, self.masks, self.dense_until, self.seen = {}, {}, 0, 0
        self.seen = min(self.seen, length)
        self.columns = {k: t[:, :length] for k, t in self.columns.items()}
        if self.tokens is not None and length < self.tokens.shape[1]:
            self.tokens, self.control = self.tokens[:, :length], {}


class _Follower:
    """Stands for one method of a cache: the memory follows what the method does.

    It is an attribute of the cache object, so the cache keeps its class, and copies and pickles of the cache take it along.
    """

    def __init__(self, cache: Cache, name: str) -> None:
        self.cache, self.name = cache, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        memory = memory_of(self.cache)
        result = getattr(type(self.cache), self.name)(self.cache, *args, **kwargs)
        match self.name:
            case "reorder_cache" | "batch_select_indices":
                memory.select(*args, **kwargs)
            case "batch_repeat_interleave":
                memory.repeat(*args, **kwargs)
            case "crop":
                memory.crop(int(self.cache.get_seq_length()))
            case "reset":
                remember(self.cache, SequenceMemory())
        return result


_FOLLOWED = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")


def memory_of(cache: Cache | None) -> SequenceMemory:
    """The memory of a cache, made on first sight; a fresh one where there is no cache."""
    if cache is None:
        return SequenceMemory()
    memory = getattr(cache, "_moyu_memory", None)
    if memory is None:
        memory = SequenceMemory()
        remember(cache, memory)
    return memory


def remember(cache: Cache, memory: SequenceMemory) -> None:
    """Attach a memory to a cache; from here on it follows the cache's reorder, repeat, select, crop and reset."""
    vars(cache)["_moyu_memory"] = memory
    for name in _FOLLOWED:
        if name not in vars(cache) and hasattr(type(cache), name):
            vars(cache)[name] = _Follower(cache, name)


def cache_field(output: type) -> str:
    """The field of a model's output that holds the cache."""
    return "cache" if "cache" in getattr(output, "__dataclass_fields__", ()) else "past_key_values"


def given_cache(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """The cache as an argument of the model's forward, by the name that this version of transformers has for it."""
    names = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in names else "past_key_values": cache}


def cache_of(values: Mapping[str, Any] | Any) -> Cache | None:
    """The cache among the arguments of a call or in an output: transformers has called it `past_key_values` and `cache`."""
    if not isinstance(values, Sequence):  # a tuple is what `return_dict=False` asks for
        values = values if isinstance(values, Mapping) else vars(values) if hasattr(values, "__dict__") else {}
        values = values.values()
    return next((value for value in values if isinstance(value, Cache)), None)
