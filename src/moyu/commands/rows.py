"""The records of a context: quality of a plan, a method without one, and the profile of the dense model. Imports torch."""

from __future__ import annotations

from moyu import records
from moyu.calibration.context import Context
from moyu.calibration.profiling import Profile
from moyu.measure.evaluation import Quality, Scores
from moyu.plan import Plan
from moyu.records.about import about_method, about_plan


def quality_record(context: Context, plan: Plan, quality: Quality) -> records.Quality:
    """One row of the quality table."""
    about, few = context.about(plan), quality.random
    if few is not None and len(few.nll) < len(quality.method.nll):
        about["notes"].append(
            f"random and oracle are of the first {len(few.nll)} of {len(quality.method.nll)} windows, on which the method's own "
            f"KL is {float(quality.method.kl[: len(few.nll)].mean()):.3g}"
        )
    foreign, search, quantising = context.anatomy.foreign, plan.calibration.get("search"), context.quantising
    return records.Quality(
        kind="quality",
        **about,
        **about_plan(plan, context.kv_bytes),
        protocol=context.protocol,
        corpus=dict(context.split.test.source),
        simulated=True,
        realized_sparsity=quality.realized_sparsity,
        byte_fraction=None if foreign else quality.byte_fraction,
        ideal_byte_fraction=quality.byte_fraction if foreign else None,
        tokens=quality.tokens,
        ppl_dense=quality.dense.perplexity,
        ppl=quality.method.perplexity,
        bits_per_byte_dense=quality.bits_per_byte(quality.dense),
        bits_per_byte=quality.bits_per_byte(quality.method),
        kl=_divergence(quality.method),
        top1_agreement=float(quality.method.agree.float().mean()),
        ppl_unquantised=None if quantising is None else quantising.ppl_unquantised,
        kl_quantising=None if quantising is None else quantising.kl_quantising,
        ppl_random=None if quality.random is None else quality.random.perplexity,
        kl_random=None if quality.random is None else _divergence(quality.random),
        ppl_oracle=None if quality.oracle is None else quality.oracle.perplexity,
        kl_oracle=None if quality.oracle is None else _divergence(quality.oracle),
        sparsity_by_layer=quality.sparsity_by_layer,
        floor=quality.floor,
        compensation=plan.compensation or False,
        target_byte_fraction=context.settings.bytes,
        search=None if search is None else records.Search(**search),
    )


def out_of_reach_record(context: Context, name: str, floor: float) -> records.Quality:
    """A row for a method whose floor is above the byte fraction asked for."""
    return records.Quality(
        kind="quality",
        **context.about(),
        **{**about_method(context.method(name)), "kv_bytes": [records.KvBytes(**size) for size in context.kv_bytes]},
        protocol=context.protocol,
        simulated=True,
        floor=floor,
        target_byte_fraction=context.settings.bytes,
        status=f"n/a (floor {floor:.2f})",
    )


def profile_record(context: Context, found: Profile) -> records.Profile:
    """Over-activation of the dense model."""
    return records.Profile(
        kind="profile",
        **context.about(),
        protocol=context.protocol,
        corpus=dict(found.windows.source),
        layers=[
            records.LayerNeed(
                layer=own.layer,
                neurons=own.neurons,
                needed_mean=float(own.needed.mean()),
                needed_p95=float(own.needed.quantile(0.95)),
                exact_zero_share=own.exact_zero_share,
            )
            for own in found.layers
        ],
        token_curve=[
            records.PositionNeed(position_bucket=position, needed_mean=need)
            for position, need in found.needed_by_position()
        ],
    )


def _divergence(scores: Scores) -> float:
    """Mean KL, which rounding alone makes negative."""
    return max(0.0, float(scores.kl.mean()))
