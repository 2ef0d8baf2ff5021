"""What may stand between a method's mask and its use: counting, recording, replaying, and the matched baselines."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from moyu.engine.executor import Hindsight
from moyu.methods import selection
from moyu.methods.base import Granularity
from moyu.methods.random import uniform
from moyu.methods.values import Rows, Site


class Known(ABC):
    """A chooser whose answer needs nothing of the pass: a native step can serve it.

    It looks at masks and leaves them as they are, or it knows them before anything is computed.
    """

    @abstractmethod
    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """The mask (N, units) that is used. A native step shows what it took, and the answer changes nothing."""

    def known(self, site: Site, rows: Rows) -> Tensor | None:
        """The masks (N, units) of sparse rows that `__call__` would answer with; None = those it is shown."""
        return None


class Recorder(Known):
    """Keeps every mask by site, slot and position, and what was skipped."""

    def __init__(self) -> None:
        """Empty; one recorder may see many passes over the same slots."""
        self.masks: dict[str, dict[tuple[int, int], Tensor]] = {}

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """Keep the masks of sparse rows."""
        for n in rows.sparse.nonzero().squeeze(1).tolist():
            own = self.masks.setdefault(site.key, {})
            own[int(rows.seq[n]), int(rows.pos[n])] = mask[n].clone()
        return mask


class Replayer(Known):
    """Uses the masks that a Recorder kept, whatever the method would now decide."""

    def __init__(self, recorder: Recorder) -> None:
        """Masks are looked up by site, slot and position."""
        self.masks = recorder.masks

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """The recorded masks of sparse rows; dense rows as they are."""
        out = mask.clone()
        for n in rows.sparse.nonzero().squeeze(1).tolist():
            out[n] = self._of(site, rows, n)
        return out

    def known(self, site: Site, rows: Rows) -> Tensor:
        """The recorded masks."""
        return torch.stack([self._of(site, rows, n) for n in range(len(rows.seq))])

    def _of(self, site: Site, rows: Rows, n: int) -> Tensor:
        return self.masks[site.key][int(rows.seq[n]), int(rows.pos[n])]


class Counter(Known):
    """Counts what a pass keeps: per row for the matched baselines, in total for sparsity and bytes."""

    def __init__(self, slots: int, positions: int) -> None:
        """Slots and positions of the windows that will be seen."""
        self.shape = (slots, positions)
        self.kept: dict[str, Tensor] = {}  # (slots, positions), -1 where a site saw no sparse row
        self.skipped_bytes = 0.0
        self.layers: dict[int, list[float]] = {}  # [skipped, all] units
        self.words = [0.0, 0.0]  # the same of a head

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """Count the sparse rows of a mask."""
        chosen = mask[rows.sparse]
        kept = chosen.sum(1)
        table = self.kept.setdefault(site.key, torch.full(self.shape, -1, device=mask.device))
        table[rows.seq[rows.sparse], rows.pos[rows.sparse]] = kept
        width = mask.shape[1]
        skipped = float((width - kept).sum())
        self.skipped_bytes += skipped * site.unit_bytes * site.units / width
        # Words are tens of thousands of a few bytes: among the others they would hide what is skipped of the layers.
        layer = self.words if site.skips == "words" else self.layers.setdefault(site.layer, [0.0, 0.0])
        layer[0] += skipped
        layer[1] += float(chosen.numel())
        return mask

    @property
    def sparsity_by_layer(self) -> list[float]:
        """Fraction of units skipped, a layer; of words nothing is said."""
        return [skipped / units if units else 0.0 for _, (skipped, units) in sorted(self.layers.items())]

    @property
    def sparsity(self) -> float:
        """Fraction of units skipped, all sites of layers; of words where nothing else is skipped."""
        counted = list(self.layers.values()) or [self.words]
        skipped, units = (sum(part) for part in zip(*counted, strict=True))
        return skipped / units if units else 0.0


class HeadUse:
    """How often each head, or group of heads, is kept."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._seen: dict[int, list[Tensor]] = {}

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """Count the sparse rows of a mask of heads."""
        if site.skips == "heads":
            self._seen.setdefault(site.layer, []).append(mask[rows.sparse])
        return mask

    @property
    def shares(self) -> dict[int, Tensor]:
        """(units,) in [0, 1], by layer."""
        return {layer: torch.cat(masks).float().mean(0) for layer, masks in self._seen.items()}


class Matched:
    """Same sites, same counts per site and row as a Counter saw, units chosen at random or in hindsight."""

    def __init__(self, counter: Counter, kind: str, granularity: Granularity, seed: int = 0) -> None:
        """kind: "random", drawn as often as the method decides, or "oracle", the largest contributions of each token.

        Contributions of columns overlap: of those, a token takes the method's own order where that errs less.
        """
        self.counter, self.kind, self.granularity, self.seed = counter, kind, granularity, seed

    def __call__(self, site: Site, mask: Tensor, rows: Rows, oracle: Callable[[], Tensor]) -> Tensor:
        """A mask with the counts of the method's."""
        table = self.counter.kept[site.key]
        sparse = rows.sparse.nonzero().squeeze(1)  # dense rows keep everything anyway, and ranking them takes time
        chosen = rows.take(sparse)
        counts = table[chosen.seq, chosen.pos]
        typical = int(table[table >= 0].float().mean().round())
        counts = torch.where(counts < 0, typical, counts)  # an expert that the method's own pass did not route here
        out = mask.clone()
        if self.kind == "random":
            each = chosen.pos if self.granularity == "token" else torch.zeros_like(chosen.pos)
            out[sparse] = selection.top_k(uniform(self.seed, site, each, mask.shape[1]), counts)
        elif isinstance(oracle, Hindsight):
            out[sparse] = _best(oracle.at(sparse, chosen), counts)
        else:
            out[sparse] = selection.top_k(oracle()[sparse], counts)
        return out


def _best(hindsight: Hindsight, counts: Tensor) -> Tensor:
    """The columns (N, n) with the largest contributions, or those of the method's own order where that errs less."""
    ideal, own = (selection.top_k(scores, counts) for scores in (hindsight(), hindsight.own()))
    return torch.where((hindsight.error(own) < hindsight.error(ideal))[:, None], own, ideal)
