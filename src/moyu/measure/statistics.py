"""Intervals, equivalence and power, with numpy, scipy and statsmodels.

Documents are the independent units: intervals resample documents, paired across arms. "No effect" is only concluded from a
test of equivalence, and every interval is reported with its power.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
LEVEL = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval and the units that were resampled."""

    value: float
    low: float
    high: float
    units: int

    @property
    def error(self) -> float:
        """Standard error, from the width of a 95 % interval."""
        return (self.high - self.low) / (2 * float(stats.norm.ppf(0.5 + LEVEL / 2)))


def bootstrap(
    units: Any,
    statistic: Callable[[Array], Any] | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over the first axis: units (n, ...) -> the interval of `statistic` (default: the mean).

    statistic: maps resampled units (n, ...) to a number. Paired arms are columns of one unit, so that pairs stay together.
    Units that are not finite are left out. Raises ValueError if fewer than two remain.
    """
    data = np.asarray(units, dtype=np.float64)
    data = data[np.isfinite(data.reshape(len(data), -1)).all(1)]
    if len(data) < 2:
        raise ValueError(f"{len(data)} units cannot be resampled")
    picks = np.random.default_rng(seed).integers(0, len(data), (resamples, len(data)))
    if statistic is None:  # all resamples at once, because a scoreboard needs a thousand intervals
        means = data.reshape(len(data), -1).mean(1)
        value, draws = float(means.mean()), means[picks].mean(1)
    else:
        value, draws = float(statistic(data)), [float(statistic(data[own])) for own in picks]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), len(data))


def power(error: float, effect: float) -> float:
    """The probability that a 95 % interval with this standard error excludes 0 if the true effect is `effect` (two-sided)."""
    if error <= 0:
        return 1.0
    critical = float(stats.norm.ppf(0.5 + LEVEL / 2))
    return float(stats.norm.sf(critical - abs(effect) / error) + stats.norm.cdf(-critical - abs(effect) / error))


def equivalent(interval: Interval, margin: float, centre: float = 0.0) -> bool:
    """Two one-sided tests at 2.5 % each: whether the 95 % interval lies within `margin` of `centre`."""
    return centre - margin < interval.low and interval.high < centre + margin


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, for a family of tests such as one per layer."""
    from statsmodels.stats.multitest import multipletests  # a second to import

    adjusted: Any = multipletests(list(p_values), method="holm")[1]
    return [float(p) for p in adjusted]


def kendall(a: Any, b: Any) -> float:
    """Kendall's tau-b of two score vectors."""
    found: Any = stats.kendalltau(np.asarray(a), np.asarray(b))
    return float(found.statistic)


def pairwise_spearman(rows: Any) -> float:
    """Mean Spearman correlation over all pairs of rows: (n, m) -> number. Constant rows are left out."""
    data = np.asarray(rows, dtype=np.float64)
    data = data[data.std(1) > 0]
    if len(data) < 2:
        return float("nan")
    ranks = stats.rankdata(data, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
    total = ranks.sum(0)
    return float((total @ total - len(data)) / (len(data) * (len(data) - 1)))


def half_life(positions: Any, values: Any) -> float:
    """Positions until a fitted exponential A exp(-t / tau) has halved; inf if it does not fall.

    Least squares on the logarithm of the positive values; nan if there are fewer than three.
    """
    t, v = np.asarray(positions, dtype=np.float64), np.asarray(values, dtype=np.float64)
    kept = v > 0
    if kept.sum() < 3:
        return float("nan")
    slope = float(np.polyfit(t[kept], np.log(v[kept]), 1)[0])
    return float(np.log(2) / -slope) if slope < 0 else float("inf")


def mixed_model(
    formula: str, columns: Mapping[str, Sequence[Any]], group: str, crossed: Sequence[str] = ()
) -> dict[str, Interval]:
    """Fixed effects of a linear mixed model with a random intercept for `group` and for each of `crossed`.

    formula: like ``recall ~ log2_domains * activation``; columns: one sequence per variable. Result names are statsmodels'.
    """
    import warnings

    import pandas as pd
    import statsmodels.formula.api as smf

    frame: Any = pd.DataFrame(dict(columns))
    parts = {name: f"0 + C({name})" for name in crossed if frame[name].nunique() > 1}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a variance estimated at its boundary does not invalidate the fixed effects
        fitted = smf.mixedlm(formula, frame, groups=frame[group], vc_formula=parts or None).fit(method="lbfgs")
    bounds = fitted.conf_int(alpha=1 - LEVEL)
    units = int(frame[group].nunique())
    return {
        str(name): Interval(float(value), float(bounds.loc[name, 0]), float(bounds.loc[name, 1]), units)
        for name, value in fitted.fe_params.items()
    }
