"""The contract of a method: where it looks and what it may skip (`sites`), what it learns (`fit`), how it ranks (`score`).

A method ranks units; MOYU selects, skips and measures. A method is a value: what changes while a sequence is decoded lives in
the memory that is passed in, never in a method. Three kinds of method say more than this: `Magnitude` (the score is |x| * c),
`Sequence` (the prompt decides for the whole generation) and `Trained` (the score is a router's).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from moyu.methods.control import Controller
from moyu.methods.heads import KvPolicy
from moyu.methods.knobs import check
from moyu.methods.shapes import Shape
from moyu.methods.values import Acts, Memory, Rows, Site, SiteParams
from moyu.model.anatomy import Block

Family = Literal["threshold", "router_off_loop", "router_in_loop", "sequence", "static", "reference", "own"]
Granularity = Literal["token", "sequence", "static"]


@dataclass(frozen=True)
class Method(ABC):
    """A dynamic activation method: a frozen dataclass whose fields are the knobs.

    What a method is stands in its class variables: declared, never detected.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    family: ClassVar[Family]
    granularity: ClassVar[Granularity] = "token"  # how often it decides
    exact: ClassVar[bool] = False  # skips only what contributes exactly nothing
    needs_calibration: ClassVar[bool] = True
    solves_target: ClassVar[bool] = True  # False: the model decides how much is skipped
    trains: ClassVar[bool] = False
    quantised_only: ClassVar[bool] = False  # skips bits, which weights of plain numbers do not tell apart
    joint: ClassVar[bool] = False  # what `fit` leaves is then trained through the model's own loss, all sites together
    matrices: ClassVar[tuple[str, ...]] = ()  # buffers that are weights, kept in few bits where the model's are
    divides: ClassVar[bool] = False  # a byte budget goes to the sites, and to their settings, where it costs least

    def __post_init__(self) -> None:
        """Refuse a knob that has a value it may not have (ValueError)."""
        check(self)

    @abstractmethod
    def sites(self, block: Block) -> tuple[Site, ...]:
        """The masks this method puts on a block; empty where the block has not what it needs."""

    @abstractmethod
    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """The site's rule and buffers for a `target` sparsity (fraction of units skipped) on the calibration rows."""

    @abstractmethod
    def score(self, x: Tensor, rows: Rows, site: Site, params: SiteParams, memory: Memory) -> Tensor:
        """Rank the units: (N, n) -> (N, units); row-wise, causal; larger is kept. `x` is NOTHING where only memory speaks."""

    # Where the defaults are right, nothing of what follows is written.

    def at(self, site: Site) -> Method:
        """The method that decides at one of the sites: another one, where a method is made of several."""
        return self

    def shapes(self, site: Site, block: Block) -> Mapping[str, Shape]:
        """The buffers that `score` reads at a site, in the letters of `methods.expected.sizes`; a plan has these and no others."""
        return {}

    def score_bytes(self, site: Site, params: SiteParams) -> int:
        """Bytes read in order to decide, beyond weights that the step reads anyway."""
        return 0

    def settings_for(self, bits: int, planes: bool = False) -> tuple[Method, ...]:
        """The ways to spend a byte budget on weights kept in `bits`; where there are several, held-out text decides.

        planes: whether the first bits of a weight can be read without the others.
        """
        return (self,)

    @property
    def kv_policy(self) -> KvPolicy:
        """What becomes of the keys and values of skipped heads."""
        return "full"

    def controller(self) -> Controller | None:
        """What decides between the steps of a generation, where a method has something that does."""
        return None

    def knobs(self) -> dict[str, Any]:
        """The knobs and their values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
