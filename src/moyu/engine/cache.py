"""MOYU's own cache: keys and values in buffers with room to grow, and a length for every row.

A row's keys and values lie from position 0 on, whatever the other rows hold. So a row can join or leave between two steps,
a step appends in place, and going back to an earlier position only changes a length. It is a cache of transformers as well:
a model's own modules can run on it.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moyu.errors import UserError

_GROWING = (DynamicLayer, DynamicSlidingWindowLayer)
GROW = 256  # positions by which buffers grow at least
PAGES = 1 << 18  # bytes from which buffers are pages of their own


class KvLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, capacity, D), of which row r holds the first lengths[r] positions.

    The buffers are the first rows of a storage with places for more. Only what rows hold is ever copied: memory that nobody has
    written takes no room.
    """

    def __init__(self) -> None:
        """Empty; the first update says of what shape."""
        self.lengths = torch.zeros(0, dtype=torch.int64)
        self.longest = 0
        self.is_initialized = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The buffers are parts of the storage, in a copy too."""
        vars(self).update(state)
        if self.is_initialized:
            self.buffers = tuple(s[: len(self.lengths)] for s in self.storage)

    @property
    def keys(self) -> Tensor:
        """(B, H, longest row, D)."""
        return self.buffers[0][:, :, : self.longest]

    @property
    def values(self) -> Tensor:
        """(B, H, longest row, D)."""
        return self.buffers[1][:, :, : self.longest]

    @property
    def capacity(self) -> int:
        """Positions that the buffers have room for."""
        return self.buffers[0].shape[2]

    def hold(self, lengths: Tensor) -> None:
        """Row r now holds lengths[r] positions, (B,) int64."""
        self.lengths, self.longest = lengths, int(lengths.max()) if len(lengths) else 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Buffers for rows like these, (B, H, T, D) each."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.storage = tuple(_zeros(t, *t.shape[:2], t.shape[2] + GROW, t.shape[3]) for t in (key_states, value_states))
        self.buffers = self.storage
        self.hold(torch.zeros(len(key_states), dtype=torch.int64))
        self.is_initialized = True

    def reserve(self, length: int) -> None:
        """Make room for `length` positions a row."""
        if length > self.capacity:
            self._move(len(self.storage[0]), length + max(GROW, self.longest // 2))

    def _move(self, rows: int, room: int, chosen: list[int] | None = None) -> None:
        """To a storage of so many rows of so much room; chosen: the rows that go along, all of them where it is None."""
        chosen = list(range(len(self.lengths))) if chosen is None else chosen
        fresh = tuple(_zeros(b, rows, b.shape[1], room, b.shape[3]) for b in self.buffers)
        for place, row in enumerate(chosen):
            self._copy(self.buffers, row, fresh, place, int(self.lengths[row]))
        self.storage, self.buffers = fresh, tuple(b[: len(chosen)] for b in fresh)

    def lie_in(self, storage: tuple[Tensor, Tensor]) -> None:
        """Move to this storage, (at least B, H, room, D) each, which somebody else has made."""
        for row, length in enumerate(self.lengths.tolist()):
            self._copy(self.buffers, row, storage, row, length)
        self.storage, self.buffers = storage, tuple(s[: len(self.lengths)] for s in storage)

    @staticmethod
    def _copy(source: tuple[Tensor, ...], row: int, to: tuple[Tensor, ...], place: int, length: int) -> None:
        for a, b in zip(source, to, strict=True):
            b[place, :, :length] = a[row, :, :length]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, T, D) to every row; all keys and values, (B, H, longest row, D)."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        fresh = key_states.shape[2]
        self.reserve(self.longest + fresh)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            if bool((self.lengths == self.longest).all()):
                buffer[:, :, self.longest : self.longest + fresh] = states
            else:
                place = self.lengths[:, None] + torch.arange(fresh)  # (B, T)
                buffer[torch.arange(len(place))[:, None], :, place] = states.transpose(1, 2)
        self.hold(self.lengths + fresh)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Of the longest row."""
        return self.longest

    def reset(self) -> None:
        """Hold nothing."""
        self.__init__()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last positions of every row: so many, given as a negative number, as transformers gives it."""
        if self.is_initialized:
            self.hold((self.lengths + tokens_to_remove).clamp(min=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices`, in that order. Where rows of the end take the places of others, only they are copied."""
        if not self.is_initialized:
            return
        chosen, lengths = indices.tolist(), self.lengths[indices.cpu()]
        room = GROW + (int(lengths.max()) if chosen else 0)
        moved = [(row, place) for place, row in enumerate(chosen) if row != place]
        if self.capacity > 2 * room or any(row < len(chosen) for row, _ in moved):
            self._move(len(chosen), min(self.capacity, room), chosen)
        else:
            for row, place in moved:
                self._copy(self.buffers, row, self.storage, place, int(self.lengths[row]))
        self.buffers = tuple(s[: len(chosen)] for s in self.storage)
        self.hold(lengths)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times in a row."""
        self.batch_select_indices(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows at `beam_idx`."""
        self.batch_select_indices(beam_idx)

    def join(self, other: KvLayer) -> None:
        """Take the rows of another cache's layer behind one's own."""
        if not self.is_initialized:
            self.storage, self.buffers, self.is_initialized = other.storage, other.buffers, True
            self.dtype, self.device = other.dtype, other.device
            self.hold(other.lengths)
            return
        count, rows = len(self.lengths), len(self.lengths) + len(other.lengths)
        longest, places = max(self.longest, other.longest), len(self.storage[0])
        if rows > places or longest > self.capacity:
            self._move(places if rows <= places else max(rows, 2 * places), max(self.capacity, longest + GROW))
        for row, length in enumerate(other.lengths.tolist()):
            self._copy(other.buffers, row, self.storage, count + row, length)
        self.buffers = tuple(s[:rows] for s in self.storage)
        self.hold(torch.cat([self.lengths, other.lengths]))


def _zeros(like: Tensor, *shape: int) -> Tensor:
    """Zeros of like's type, because positions behind a short row take part in products with a weight of 0, which NaN would not bear.

    On a CPU in pages of their own, which take memory once they are written and give it back when they are let go; torch writes its
    zeros, and the heap keeps what a server's sequences of all lengths have left (8 GB where 16 sequences hold 1).
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type != "cpu" or size < PAGES:
        return like.new_zeros(shape)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=like.dtype).view(shape)


class KvCache(DynamicCache):
    """The cache of a generation. Layers that keep keys and values hold a length a row; others are transformers' own.

    A layer that attends in a window keeps what lies behind it too: rows of different lengths and going back need no care then.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        """An empty cache for a model of this config."""
        super().__init__(config=config)
        self.expected = 0  # positions that a row will hold, as far as somebody knows
        self.layers: list[Any] = [KvLayer() if type(layer) in _GROWING else layer for layer in self.layers]

    @property
    def per_row(self) -> bool:
        """Whether rows of different lengths can stand in it."""
        return all(isinstance(layer, KvLayer) for layer in self.layers)

    @property
    def lengths(self) -> Tensor:
        """Positions that each row holds, (B,) int64."""
        return self.layers[0].lengths

    @property
    def ragged(self) -> bool:
        """Whether rows hold different numbers of positions."""
        return self.per_row and bool((self.lengths != self.layers[0].longest).any())

    def hold(self, lengths: Tensor) -> None:
        """Row r now holds lengths[r] positions in every layer, (B,) int64: after a native step, or to go back."""
        for layer in self.layers:
            layer.hold(lengths)

    def lie_in(self, storages: list[tuple[Tensor, Tensor]]) -> None:
        """Move every layer to a storage that somebody else has made; see `KvLayer.lie_in`."""
        for layer, storage in zip(self.layers, storages, strict=True):
            layer.lie_in(storage)

    def reserve(self, length: int) -> None:
        """Make room for `length` positions a row in every layer."""
        for layer in self.layers:
            layer.reserve(length)

    def join(self, other: KvCache) -> None:
        """Take the rows of another cache behind one's own; what they remember joins too. UserError where lengths must be equal."""
        if not (self.per_row and other.per_row):
            raise UserError(
                "this model attends in windows or keeps a state, and its rows must have the same length",
                "start the rows of a batch together, padded on the left",
            )
        for own, layer in zip(self.layers, other.layers, strict=True):
            own.join(layer)
