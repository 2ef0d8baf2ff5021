"""Methods that a sequence's prompt decides for: memory is gathered from dense tokens, and one mask serves the generation."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, TypeGuard

from torch import Tensor

from moyu.methods.base import Granularity, Method
from moyu.methods.fitting import at_quantile
from moyu.methods.values import NOTHING, Acts, Memory, Rows, Site, SiteParams


@dataclass(frozen=True)
class Sequence(Method):
    """One mask per sequence, by what its dense tokens left in memory."""

    granularity: ClassVar[Granularity] = "sequence"

    @abstractmethod
    def update(self, memory: Memory, x: Tensor, rows: Rows, site: Site, params: SiteParams) -> Memory:
        """Sequence memory after these rows of the tap, x (N, n); pure. Only dense valid rows may enter it."""

    def fit(self, site: Site, acts: Acts, target: float) -> SiteParams:
        """A threshold at the target quantile of the scores that the calibration text's prompts lead to."""
        return at_quantile(self, site, acts, target, scores=lambda params: self.prompt_scores(site, acts, params))

    def prompt_scores(self, site: Site, acts: Acts, params: SiteParams) -> Tensor:
        """The scores after each calibration prompt, (B, units)."""
        memory = self.update({}, acts.sparse[site.reads], acts.rows, site, params)
        return self.score(NOTHING, Rows.one_each(acts.rows.slots, acts.rows.seq.device), site, params, memory)


def remembers(method: Method) -> TypeGuard[Sequence]:
    """Whether the method has memory of a sequence."""
    return isinstance(method, Sequence)
