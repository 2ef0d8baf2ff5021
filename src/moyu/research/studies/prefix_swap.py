"""Does the past change the active set if the present is fixed? One suffix behind eight prefixes of equal length.

U is one minus the mean pairwise kappa_J at the same suffix token. The history share is the share of a neuron's variance over
(suffix token x prefix) due to prefix and interaction. Its floor is rounding: the same prefix in two batches of other sizes.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import SHARES, Subject
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import bootstrap, holm, kappa, variance_shares

PREFIXES, PREFIX, SUFFIX = 8, 48, 32
CHOICES = 16  # prefixes per domain; a suffix is put behind one of each domain
SOURCES = ("library", "manuals", "json", "headers", "arithmetic", "docstrings", "symbolic", "tables")


class PrefixSwap(Study):
    """E1b."""

    name: ClassVar[str] = "prefix_swap"
    claim: ClassVar[str] = "Which neurons fire for a token depends on its history, most of all right behind it."
    prediction: ClassVar[str] = (
        "At a fixed suffix token prefix and interaction hold more of a neuron's variance than rounding does, and the sets of "
        "different prefixes grow more alike with the distance from the prefix."
    )
    refutation: ClassVar[str] = (
        "The share is equivalent to the floor (margin 0.02); or the sets do not grow more alike."
    )
    conditions: ClassVar = (
        Condition("history share", "variance share of prefix and interaction, less the floor", "above", 0.0, 0.02),
        Condition("fading", "U at the first quarter of the suffix less U at the last", "above", 0.0, 0.02),
    )
    controls: ClassVar = (
        Control("floor", "U of the same prefix in two batches: floating point", "at most", 0.01),
    )  # fmt: skip

    def observe(self, setup: Setup) -> Observed:
        subject, count = setup.subject, setup.size(96, 2)
        suffixes = domains.windows(subject, "library", count, SUFFIX + 1, seed=setup.seed)[:, 1:]
        by_domain = [
            domains.windows(subject, d, CHOICES, PREFIX, skip=count * (d == "library"), seed=setup.seed)
            for d in SOURCES[:PREFIXES]
        ]
        prefixes = torch.stack(by_domain, dim=1)  # (choices, P, T)
        generator = torch.Generator().manual_seed(setup.seed)
        order = torch.rand(CHOICES, PREFIXES, PREFIX - 1, generator=generator).argsort(-1)
        mixed = prefixes.clone()  # the same words in another order
        mixed[..., 1:] = prefixes[..., 1:].gather(-1, order)

        def measure(who: Subject, label: str) -> Observed:
            rows = []
            for i, suffix in enumerate(suffixes):
                setup.progress(f"prefixes, {label}", i, count)
                rows.append(_one(who, prefixes[i % CHOICES], mixed[i % CHOICES], suffix))
            return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

        trained = setup.part("prefix_swap/trained", lambda: measure(subject, "trained"))
        plain = setup.part("prefix_swap/untrained", lambda: measure(subject.untrained(setup.seed), "untrained"))
        return {**trained, **{f"untrained_{k}": v for k, v in plain.items()}}

    def analyse(self, observed: Observed) -> Finding:
        u = 1 - observed["kappa"]  # (suffixes, layers, tokens)
        share = observed["share"] - observed["share_floor"]  # (suffixes, layers)
        quarter = u.shape[2] // 4
        fade = u[:, :, :quarter].mean(2) - u[:, :, -quarter:].mean(2)
        by_layer = [bootstrap(fade[:, l], resamples=500) for l in range(fade.shape[1])]
        tests: list[Any] = [stats.wilcoxon(layer, alternative="greater") for layer in fade.T]
        return Finding(
            {"history share": bootstrap(share.mean(1)), "fading": bootstrap(fade.mean(1))},
            controls={"floor": float((1 - observed["kappa_floor"]).mean())},
            nulls={
                "history share, untrained": float(observed["untrained_share"].mean()),
                "U, untrained": float(1 - observed["untrained_kappa"].mean()),
                "U between a prefix and its words in another order": float(1 - observed["kappa_mixed"].mean()),
            },
            details={
                "U": float(u.mean()),
                "U by offset": u.mean((0, 1)).round(4).tolist(),
                "history share by layer": share.mean(0).round(4).tolist(),
                "fading by layer": [round(i.value, 4) for i in by_layer],
                "fading by layer, p after Holm": holm([float(t.pvalue) for t in tests]),
                "U at shares of neurons": {
                    str(s): float(1 - v) for s, v in zip(SHARES, observed["by_share"].mean(0), strict=True)
                },
            },
        )


def _one(subject: Subject, prefixes: Tensor, mixed: Tensor, suffix: Tensor) -> dict[str, np.ndarray]:
    """One suffix behind every prefix: kappa_J (L, tokens), by share of neurons, and variance shares (L,)."""
    start, count = prefixes.shape[1], len(prefixes)
    tokens, shuffled = (torch.cat([p, suffix.expand(count, -1)], dim=1) for p in (prefixes, mixed))  # (P, T)
    natural = subject.values(tokens)[:, :, start:]  # (L, P, t, f)
    again = subject.values(tokens, batch=3)[:, :, start:]
    other = subject.values(shuffled)[:, :, start:]
    sets = subject.active(natural)
    pairs = list(combinations(range(count), 2))
    left, right = (torch.tensor(side) for side in zip(*pairs, strict=True))

    def alike(share: float) -> Tensor:
        chosen = subject.active(natural, share)
        return kappa(chosen[:, left], chosen[:, right]).mean(1)  # (L, t)

    return {
        "kappa": kappa(sets[:, left], sets[:, right]).mean(1).numpy(),
        "kappa_floor": kappa(sets, subject.active(again)).mean(1).numpy(),
        "kappa_mixed": kappa(sets, subject.active(other)).mean(1).numpy(),
        "by_share": np.array([float(alike(s).mean()) for s in SHARES]),
        "share": _history_share(natural).numpy(),
        "share_floor": _history_share(torch.stack([natural[:, 0], again[:, 0]], dim=1)).numpy(),
    }


def _history_share(values: Tensor) -> Tensor:
    """Variance share of prefix and interaction, neurons weighted by their variance: (L, P, t, f) -> (L,)."""
    table = values.permute(1, 2, 0, 3)  # (P, t, L, f)
    found = variance_shares(table)
    weight = table.var((0, 1))
    return ((found.rows + found.interaction) * weight).sum(1) / weight.sum(1).clamp(min=1e-30)
