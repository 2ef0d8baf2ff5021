"""Are the texts of the studies of different kinds? Every contrast between domains depends on it."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from scipy import stats

from moyu.measure.statistics import Interval
from moyu.research.studies import domains
from moyu.research.studies.base import Observed, Setup, Study
from moyu.research.studies.verdicts import Condition, Finding


class Texts(Study):
    """Cross-perplexity of byte models."""

    name: ClassVar[str] = "texts"
    needs: ClassVar[Literal["nothing"]] = "nothing"
    claim: ClassVar[str] = "The nine domains of text that the studies use are different kinds of text."
    prediction: ClassVar[str] = (
        "A byte model of any domain is worse on another domain's documents than that domain's own model."
    )
    refutation: ClassVar[str] = "One pair of domains for which it is not worse by 0.1 bits per byte."
    conditions: ClassVar = (
        Condition("closest pair", "excess bits per byte of the nearest foreign model", "above", 0.0, 0.1),
    )

    def observe(self, setup: Setup) -> Observed:
        return {"bits": domains.cross_perplexity(list(domains.DOMAINS), setup.size(50, 12))}

    def analyse(self, observed: Observed) -> Finding:
        bits = observed["bits"]  # (model, text, documents)
        count = len(bits)
        own = bits[np.arange(count), np.arange(count)]  # (text, documents)
        pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
        excess = np.array([np.nanmean(bits[i, j] - own[j]) for i, j in pairs])
        errors = np.array([stats.sem(bits[i, j] - own[j], nan_policy="omit") for i, j in pairs])
        reach = float(stats.norm.ppf(1 - 0.025 / len(pairs))) * errors  # all pairs together at 95 %
        low, high = float((excess - reach).min()), float((excess + reach).min())
        closest = pairs[int(excess.argmin())]
        names = list(domains.DOMAINS)[:count]
        positive = [float(((bits[i, j] - own[j])[np.isfinite(own[j])] <= 0).mean()) for i, j in pairs]
        return Finding(
            {"closest pair": Interval(float(excess.min()), low, high, bits.shape[2])},
            nulls={"bits per byte without a model": 8.0, "pairs": float(len(pairs))},
            details={
                "domains": names,
                "meaning": [domains.MEANING[n] for n in names],
                "bits": np.nanmean(bits, axis=2).round(3).tolist(),
                "closest": [names[closest[0]], names[closest[1]]],
                "largest share of documents a foreign model reads as well": max(positive),
            },
        )
