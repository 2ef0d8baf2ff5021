"""Products of a layer's linears, kept from one trial run of the layer to the next."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from types import MappingProxyType

from torch import Tensor

from moyu.methods.values import Site


class Products:
    """Keeps a layer's products from run to run and makes only those again that depend on a level that has changed."""

    KEPT = 64  # tensors; a round of trials over seven sites makes 24
    STAGES: Mapping[str, int] = MappingProxyType(
        {
            **dict.fromkeys(("attn_in", "q", "k", "v", "qkv", "q_a", "kv_a", "g"), 0),
            **dict.fromkeys(("q_latent", "kv_latent", "q_b", "kv_b"), 1),
            **dict.fromkeys(("heads", "o"), 2),
            **dict.fromkeys(("mlp_in", "gate", "up"), 3),
            **dict.fromkeys(("mid", "down"), 4),
        }
    )  # of linears, and of what sites read, in the order of data flow

    def __init__(self, sites: list[Site]) -> None:
        """`sites` of the layer."""
        self.sites, self.levels = sites, dict[str, Hashable]()
        self.made = 0
        self._kept: dict[tuple, Tensor] = {}

    def at(self, levels: Mapping[str, Hashable]) -> None:
        """What the next run's sites are at, by key: a level, or whatever else tells runs apart."""
        self.levels = dict(levels)

    def get(self, expert: int | None, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The product of a linear, (N, q), the caller's own: models add to what they are given in place."""
        stage = self.STAGES[name]
        depends = (s for s in self.sites if self.STAGES[s.reads] < stage or (name in s.linears and s.expert == expert))
        key = (expert, name, *((s.key, self.levels[s.key]) for s in depends))
        known = self._kept.pop(key, None)
        if known is None:
            known = make()
            self.made += 1
        self._kept[key] = known
        if len(self._kept) > self.KEPT:
            self._kept.pop(next(iter(self._kept)))
        return known.clone()
