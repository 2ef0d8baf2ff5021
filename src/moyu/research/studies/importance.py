"""Does importance learnt from one history hold for another? SNIP sums over disjoint histories of documents.

We divide the rank agreement of histories of two domains by that of two halves of one domain. It is 1 if a history of another
domain is as informative as one of the same domain.
"""

from __future__ import annotations

from itertools import combinations
from typing import ClassVar

import numpy as np
import torch

from moyu.measure.statistics import LEVEL, Interval
from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.subject import Subject
from moyu.research.studies.verdicts import Condition, Control, Finding
from moyu.research.theory import kendall, running_sum_overlap, snip_step, taylor_step

KINDS = ("library", "docstrings", "arithmetic", "json")
LENGTH = 96
SAMPLED = 400  # sampled weights of down per layer


class ImportanceStudy(Study):
    """E1c."""

    name: ClassVar[str] = "importance"
    claim: ClassVar[str] = "Importance estimated on one history does not carry over to a history of another kind."
    prediction: ClassVar[str] = (
        "Kendall's tau between SNIP sums of two domains is lower than between two histories of one domain: their ratio is "
        "below 1."
    )
    refutation: ClassVar[str] = "A ratio that is equivalent to 1 (margin 0.02)."
    conditions: ClassVar = (
        Condition("ratio", "tau across domains over tau within one", "below", 1.0, 0.02),
    )  # fmt: skip
    controls: ClassVar = (
        Control("shuffled", "distance from 1 of the ratio when documents change histories at random", "at most", 0.05),
        Control("reliability", "tau between two halves of one domain's history", "at least", 0.2),
    )

    def observe(self, setup: Setup) -> Observed:
        count = setup.size(32, 4)

        def measure(who: Subject, label: str) -> Observed:
            rows = []
            for done, kind in enumerate(KINDS):
                setup.progress(f"gradients, {label}", done, len(KINDS))
                rows.append(_steps(who, domains.windows(who, kind, count, LENGTH, seed=setup.seed)))
            return {k: np.stack([r[k] for r in rows]) for k in rows[0]}

        trained = setup.part("importance/trained", lambda: measure(setup.subject, "trained"))
        plain = setup.part("importance/untrained", lambda: measure(setup.subject.untrained(setup.seed), "untrained"))
        return {"snip": trained["snip"], "taylor": trained["taylor"], "untrained": plain["snip"]}

    def analyse(self, observed: Observed) -> Finding:
        snip = observed["snip"]  # (domains, documents, layers, weights)
        draws = 100
        ratio = _ratio(snip, draws)
        everything = snip.reshape(-1, *snip.shape[2:])
        mixed = everything[np.random.default_rng(0).permutation(len(everything))].reshape(snip.shape)
        neurons = torch.from_numpy(observed["taylor"]).flatten(0, 1)  # (documents, layers, neurons)
        order = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(0))
        running = running_sum_overlap(neurons[order].double().flatten(1), neurons[0].numel() // 4)
        return Finding(
            {"ratio": ratio.interval},
            controls={"shuffled": abs(_ratio(mixed, 20).interval.value - 1), "reliability": ratio.within},
            nulls={
                "ratio, documents shuffled": _ratio(mixed, 20).interval.value,
                "ratio, untrained": _ratio(observed["untrained"], 20).interval.value,
            },
            details={
                "tau within": ratio.within,
                "tau across": ratio.across,
                "tau across, by pair": ratio.pairs,
                "ratio per neuron (Taylor)": _ratio(observed["taylor"], 20).interval.value,
                "Jaccard of running sums, last input": float(running[-1]),
                "weights a layer": int(snip.shape[3]),
            },
            notes=("the running sum's own overlap is no evidence of stability: it is as high for shuffled inputs",),
        )


class _ratio:
    """tau across over tau within, from random halves of each domain's documents, resampled inside their half."""

    def __init__(self, steps: np.ndarray, draws: int) -> None:
        kinds, count, _, _ = steps.shape
        rng = np.random.default_rng(0)
        ratios, within, across = [], [], np.zeros((kinds, kinds))
        for draw in range(draws + 1):
            halves = np.empty((kinds, 2, *steps.shape[2:]))
            for k in range(kinds):
                order = rng.permutation(count)
                for side, half in enumerate((order[: count // 2], order[count // 2 :])):
                    chosen = half if draw == 0 else rng.choice(half, len(half))
                    halves[k, side] = steps[k, chosen].sum(0)
            own = np.array([_tau(halves[k, 0], halves[k, 1]) for k in range(kinds)])
            pairs = {(i, j): _tau(halves[i, 0], halves[j, 1]) for i, j in combinations(range(kinds), 2)}
            for (i, j), value in pairs.items():
                across[i, j] += value / (draws + 1)
            within.append(own.mean())
            # The ratio of means, because a mean of ratios would exceed 1 even for exchangeable histories.
            ratios.append(float(np.mean(list(pairs.values())) / max(own.mean(), 1e-6)))
        low, high = np.quantile(ratios[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        self.interval = Interval(float(np.mean(ratios)), float(low), float(high), kinds * count)
        self.within = float(np.mean(within))
        found = across[np.triu_indices(kinds, 1)]
        self.across = float(found.mean())
        self.pairs = {
            f"{KINDS[i]}, {KINDS[j]}": round(float(across[i, j]), 3) for i, j in combinations(range(kinds), 2)
        }


def _tau(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean([kendall(x, y) for x, y in zip(a, b, strict=True)]))


def _steps(subject: Subject, tokens: torch.Tensor) -> dict[str, np.ndarray]:
    """SNIP steps of sampled weights of every down, and Taylor steps of every neuron, one per document."""
    downs = [b.pieces["down"] for b in subject.blocks]
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(d.weight.numel(), generator=generator)[:SAMPLED] for d in downs]
    snip, taylor = [], []
    for document in tokens[:, None]:
        with torch.enable_grad(), subject.kept_neurons() as kept:
            loss = subject.losses(document).sum()
            weights = [d.weight for d in downs]
            parameters = [getattr(d.module, d.parameter) for d in downs]
            gradients = torch.autograd.grad(loss, [*parameters, *kept])
        by_weight, by_value = gradients[: len(downs)], gradients[len(downs) :]
        steps = []
        for piece, weight, gradient, at in zip(downs, weights, by_weight, chosen, strict=True):
            aligned = gradient.t() if piece.transposed else gradient
            steps.append(snip_step(weight.detach().flatten()[at], aligned.flatten()[at]))
        snip.append(torch.stack(steps).cpu().numpy())
        values = [v.detach().flatten(0, -2) for v in kept]
        own = [taylor_step(v, g.flatten(0, -2)) for v, g in zip(values, by_value, strict=True)]
        taylor.append(torch.stack(own).cpu().numpy())
    return {"snip": np.stack(snip), "taylor": np.stack(taylor)}
