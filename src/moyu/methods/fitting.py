"""The usual ways to fit a site: a threshold at a quantile of calibration scores, or a count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from torch import Tensor

from moyu.methods.base import Method
from moyu.methods.selection import Threshold, TopK, keep_count, quantile
from moyu.methods.values import Acts, Site, SiteParams

EVERYTHING = Threshold(-math.inf)  # the rule that keeps every unit


def at_count(site: Site, target: float, buffers: Mapping[str, Tensor] | None = None) -> SiteParams:
    """Keep as many units as the target sparsity leaves, those with the largest scores."""
    return SiteParams(rule=TopK(keep_count(site.units, target)), buffers=buffers or {})


def at_quantile(
    method: Method,
    site: Site,
    acts: Acts,
    target: float,
    buffers: Mapping[str, Tensor] | None = None,
    scores: Callable[[SiteParams], Tensor] | None = None,
) -> SiteParams:
    """Keep what scores above the `target` quantile of the calibration scores; everything where the target is 0.

    scores: the calibration scores, (..., units), given the site's buffers; those of the rows that masks will be decided for
    unless given.
    """
    params = SiteParams(rule=EVERYTHING, buffers=buffers or {})
    if target == 0.0:
        return params
    found = method.score(acts.met(site.reads), acts.chosen, site, params, {}) if scores is None else scores(params)
    return dataclasses.replace(params, rule=Threshold(quantile(found, target)))
