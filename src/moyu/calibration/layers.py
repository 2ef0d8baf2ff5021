"""Fit the sites of one layer on what it will see: each behind the sites that come before it in the layer."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from moyu.calibration import compensation
from moyu.calibration.streams import Walk
from moyu.calibration.taps import LaterTaps, OnDemand, Taps, acts_of, missing, tensors_of
from moyu.engine.sites import SiteState
from moyu.methods.fitting import EVERYTHING
from moyu.methods.values import Rows, Site, SiteParams, Tap
from moyu.model.anatomy import Block
from moyu.plan import Plan

# What sites read, in the order of data flow.
STAGES: tuple[tuple[Tap, ...], ...] = (
    ("attn_in",),
    ("q_latent", "kv_latent"),
    ("heads",),
    ("mlp_in", "gate", "up"),
    ("mid",),
)


@dataclass(frozen=True)
class Asked:
    """What every site is fitted for: options of `calibrate`."""

    sparsity: float
    bias: bool = False
    centre: bool = False
    levels: Mapping[str, float] = field(default_factory=dict)

    @property
    def biased(self) -> bool:
        """Whether sites get a bias."""
        return self.bias and self.sparsity > 0


class LayerFit:
    """Fits the sites of one layer, in the order in which the layer reaches what they read."""

    def __init__(self, walk: Walk, index: int, blocks: list[Block], draft: Plan, asked: Asked) -> None:
        self.walk, self.index, self.draft, self.asked = walk, index, draft, asked
        self.sites = [(block, site) for block in blocks for site in draft.method.sites(block)]
        self.tensors = {id(block): tensors_of(block) for block in blocks}
        self.dense = walk.later(lambda: walk.observe_dense(index))
        self.states: dict[str, SiteState] = {}
        self.waiting: dict[str, SiteState] = {}

    def fit(self, block: Block, site: Site, seen: Taps | LaterTaps) -> None:
        """Fit one site on what it has seen, unless it is of an expert that has seen nothing."""
        walk, ahead = self.walk, None
        if site.source_layer != site.layer:
            source = (site.source_layer, site.reads)
            ahead = walk.dense_taps[source], walk.sparse_taps[source]
        target = self.asked.levels.get(site.key, self.asked.sparsity)
        acts = acts_of(self.tensors[id(block)], site, seen, self.dense, ahead)
        if acts is None:
            return
        own, bias = self.draft.method_of(site), self.asked.bias
        centred = self.asked.centre and site.skips == "columns" and target > 0
        fitted = compensation.centred(own, site, acts, target, bias) if centred else own.fit(site, acts, target)
        state = self.waiting.get(site.key) or SiteState(site, fitted, own)
        state.params = fitted
        self.states[site.key] = state

    def correct(self, block: Block, site: Site, skipped: Mapping[str, Tensor]) -> None:
        """Add the bias that makes up for the mean of what the site skips, where it is asked for."""
        state = self.states.get(site.key)
        if self.asked.biased and state is not None and site.key in skipped and state.params.bias is None:
            correction = compensation.correction(block, site, state.params, skipped[site.key])
            state.params = dataclasses.replace(state.params, bias=correction)

    def attach(self) -> None:
        """Let the sites act that are fitted, and have those in place that the network looks for before it shows what they read."""
        self.walk.attach(self.index, (self.waiting | self.states).values())

    def stage_by_stage(self) -> None:
        """A run of the layer for every stage whose sites ask for what it shows."""
        for stage in STAGES:
            fresh = [(block, site) for block, site in self.sites if site.reads in stage]
            if not fresh:
                continue
            seen = self.walk.later(lambda: self.walk.observe(self.index))  # earlier stages are already sparse
            for block, site in fresh:
                self.fit(block, site, seen)
            self.attach()
            if self.asked.biased:
                skipped = self.walk.observe(self.index).skipped
                for block, site in fresh:
                    self.correct(block, site, skipped)

    def in_one_run(self) -> Tensor | None:
        """Fit each site as soon as one run of the layer shows what it reads: what follows in this run is behind it.

        The layer's output; None where the layer does not run in the order of its stages.
        """
        rows = [site for _, site in self.sites if site.reads in ("gate", "up")]
        self.waiting = {s.key: SiteState(s, SiteParams(rule=EVERYTHING), self.draft.method_of(s)) for s in rows}
        self.attach()
        flight = _InFlight(self)
        output = self.walk.watch(self.index, flight)
        return output if flight.all_used() else None

    @property
    def flows(self) -> bool:
        """Whether each site can be fitted in the middle of a run: a mask a token, of the layer's one network and attention."""
        network = {site.reads for _, site in self.sites if site.reads in ("mlp_in", "gate", "up")}
        return (
            self.draft.method.granularity == "token"
            and self.draft.kv_policy == "full"
            and len({id(block) for block, _ in self.sites}) == 1
            and len(network) <= 1
            and all(site.expert is None and site.source_layer == site.layer for _, site in self.sites)
        )

    def run(self) -> dict[str, tuple[Site, SiteParams]]:
        """Fit all sites and go on behind the layer."""
        if self.walk.applied.lookahead and self.walk.chain is None:
            self.walk.observe_dense(self.index)  # keeps what later layers read
        output = self.in_one_run() if self.flows else None
        if output is None:
            self.states, self.waiting = {}, {}
            self.attach()
            self.stage_by_stage()
        self.walk.advance(self.index, output)
        order = (site for stage in STAGES for _, site in self.sites if site.reads in stage)
        return {s.key: (s, self.states[s.key].params) for s in order if s.key in self.states}


class _InFlight(Taps):
    """The observer of a run in which sites are fitted."""

    def __init__(self, layer: LayerFit) -> None:
        super().__init__(layer.index, {}, set())
        self.fitting = layer
        self.used: Counter[str] = Counter()  # products in which a site's mask was used
        self.whole: Taps | None = None  # of a run of its own, for the sites that are being fitted

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        super().see(layer, expert, tap, x, rows)
        fresh = [(block, site) for block, site in self.fitting.sites if site.reads == tap]
        if layer != self.layer or expert is not None or not fresh:
            return
        self.whole = None
        for block, site in fresh:
            self.fitting.fit(block, site, self)
        self.fitting.attach()

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None:
        if site.layer != self.layer:
            return
        self.used[site.key] += 1
        if self.fitting.asked.biased and self.used[site.key] == 1:
            (block,) = (block for block, own in self.fitting.sites if own.key == site.key)
            self.fitting.correct(block, site, {site.key: missing(values, mask, rows)})

    def acts(self, expert: int | None) -> tuple[Mapping[Tap, Tensor], Rows | None]:
        seen, rows = super().acts(expert)
        return OnDemand(seen, self._elsewhere), rows

    def _elsewhere(self) -> Mapping[Tap, Tensor]:
        """All taps, with no site in place but those that are fitted: by a run within the run."""
        if self.whole is None:
            waiting, self.fitting.waiting = self.fitting.waiting, {}
            self.fitting.attach()
            self.whole = self.fitting.walk.observe(self.layer)
            self.fitting.waiting = waiting
            self.fitting.attach()
        return self.whole.acts(None)[0]

    def all_used(self) -> bool:
        """Whether each site was fitted before each of its products."""
        wanted = {s.key: len(s.linears) if s.skips == "columns" else 1 for _, s in self.fitting.sites}
        return all(self.used[key] == count for key, count in wanted.items())
