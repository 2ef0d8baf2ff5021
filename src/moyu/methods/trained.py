"""Methods whose score is a router's, which calibration text trains: off the loop on a frozen model, or in its loss."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

import torch
from torch import Tensor, nn

from moyu.methods.base import Family, Method
from moyu.methods.fitting import at_count
from moyu.methods.heads import KV_POLICIES, KvPolicy, head_norms
from moyu.methods.knobs import knob
from moyu.methods.routers import low_rank, train
from moyu.methods.selection import TopK, keep_count, select
from moyu.methods.shapes import shape
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Trained(Method):
    """score = B A x, A (r, d), B (units, r): a router trained off the loop, with binary cross-entropy on a frozen model.

    rank: r, at most the model's width.
    """

    rank: int = knob(64, at_least=1)

    family: ClassVar[Family] = "router_off_loop"
    trains: ClassVar[bool] = True
    matrices: ClassVar[tuple[str, ...]] = ("inner.weight", "outer.weight")

    @abstractmethod
    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        """What the router should say on `acts.met`: labels (N, units) in [0, 1], and how much each one counts."""

    def router(self, site: Site, width: int) -> nn.Module:
        """An untrained router, (N, width) -> (N, units) logits; the same at every call. Its layers are `inner` and `outer`."""
        return low_rank(width, min(self.rank, width), site.units, seed=site.layer)

    def shapes(self, site: Site, block):
        return {"inner.weight": shape("r", "n"), "outer.weight": shape("units", "r")}

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """A router that has learned its lessons; it keeps a count."""
        x = acts.met(site.reads)
        router = self.router(site, x.shape[1])
        if target > 0.0:
            train(router, x, *self.lessons(site, acts, target))
        dtype = next(iter(acts.weights.values())).dtype
        return at_count(site, target, {name: tensor.to(dtype) for name, tensor in router.state_dict().items()})

    def score(self, x: Tensor, rows: Rows, site: Site, params: SiteParams, memory: Memory) -> Tensor:
        inner = params.buffers.get("inner.weight")
        x = x if inner is None else x @ inner.to(x.dtype).t()
        return x @ params.buffers["outer.weight"].to(x.dtype).t()  # (N, units)

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        return sum(t.nbytes for t in params.buffers.values())

    def settings_for(self, bits: int, planes: bool = False) -> tuple[Method, ...]:
        """Routers of half, a quarter and an eighth of the rank too: what a router reads, the network cannot."""
        return tuple(dataclasses.replace(self, rank=max(1, self.rank // part)) for part in (1, 2, 4, 8))


@dataclass(frozen=True)
class TrainedHeads(Trained):
    """A router of attention heads.

    kv: what becomes of keys and values of skipped heads: "full" (kept and read), "hole", "zero", "recompute" or "carry".
    """

    kv: KvPolicy = knob("full", one_of=KV_POLICIES)

    @property
    def kv_policy(self) -> KvPolicy:
        return self.kv

    def lessons(self, site: Site, acts: Acts, target: float) -> tuple[Tensor, Tensor]:
        """Whether a head is among the k that add most to the output, ||W_o,i head_i||."""
        added = head_norms(acts.met("heads"), acts.weights["o"], site.units)  # (N, h)
        return select(added, TopK(keep_count(site.units, target))), torch.ones_like(added)


@dataclass(frozen=True)
class Joint(Method):
    """A method whose routers learn from the model's own loss, all sites together, after `fit`.

    steps: of training.
    """

    steps: int = knob(150, at_least=0)

    family: ClassVar[Family] = "router_in_loop"
    trains: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    @abstractmethod
    def penalty(self, gates: Tensor, eta: float) -> Tensor:
        """What soft gates (..., units) in (0, 1) add to the task's loss at the multiplier `eta`."""


def is_joint(method: Method) -> TypeGuard[Joint]:
    """Whether what `fit` leaves is then trained through the model's own loss."""
    return isinstance(method, Joint)
