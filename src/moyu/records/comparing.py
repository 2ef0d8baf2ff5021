"""The record of a file or a plan that is held against the file it was made from."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moyu.measure.evaluation import Scores
from moyu.measure.sizes import Size
from moyu.measure.statistics import bootstrap
from moyu.measure.windows import Windows
from moyu.records.parts import Protocol
from moyu.records.schema import Comparison


def comparison(
    about: Mapping[str, Any], size: Size, scores: Scores, reference: Tensor, windows: Windows, **more: Any
) -> Comparison:
    """A record of `scores` against `reference`, the log-probabilities (B, T - P - 1, V) of the source on `windows`.

    about: fields that name the model. more: fields of `Comparison` that say what the row is.
    """
    own = means(scores.kl)
    interval = bootstrap(own, resamples=1000)
    targets = windows.tokens[:, windows.prompt + 1 :]
    source = -reference.gather(-1, targets[..., None]).double().mean()
    return Comparison.model_validate(
        {
            **about,
            "kind": "comparison",
            "protocol": Protocol(prompt=windows.prompt, window=windows.tokens.shape[1], table="main"),
            "corpus": {**windows.source, "digest": windows.digest},
            "step_bytes": size.file,
            "step_bytes_moyu": size.moyu,
            "bits_per_weight": size.bits,
            "documents": len(windows.tokens),
            "tokens": scores.nll.numel(),
            "ppl_source": math.exp(float(source)),
            "ppl": scores.perplexity,
            "kl": max(0.0, interval.value),
            "kl_interval": [interval.low, interval.high],
            "top1_agreement": float(scores.agree.float().mean()),
            "by_document": {"kl": own, "nll": means(scores.nll)},
            **more,
        }
    )


def means(values: Tensor) -> list[float]:
    """Means of documents (B, T) -> B numbers, in six digits."""
    return [float(f"{v:.6g}") for v in values.double().mean(1).tolist()]
