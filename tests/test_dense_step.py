"""Several next tokens in one native step, dense whatever the plan: beside the model itself, row by row."""

import pytest
import torch

from equality import QUICK, assert_near, built, has_sites, plan_for, rounding, rounds_x
from moyu import kernels, methods
from moyu.engine import steps
from moyu.engine.applied import Applied
from moyu.engine.generate import join, new_cache, prefill
from moyu.kernels import cpu
from tiny import tokens

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")

# One method for every way that weights lie and every network of a native step.
CASES = [
    (None, "fp32"), (None, "q8_0"), (None, "q4_0"), (None, "bf16"),
    ("griffin", "fp32"), ("griffin", "q8_0"), ("teal", "fp32"), ("teal", "q4_0"), ("cats", "fp32"), ("cats", "q8_0"),
    ("countdown", "fp32"), ("estimate", "fp32"), ("levels", "q8_0"), ("levels", "q4_0"), ("shortlist", "q8_0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "weights"), CASES)
@torch.no_grad()
def test_tokens_of_several_sequences_read_together_give_the_dense_models_logits(name, weights):
    method = None if name is None else methods.method(name, **QUICK.get(name, {}))
    model = built("llama", weights)
    if method is not None and not has_sites(model, method):
        model = built("reglu", weights)
    plan = None if method is None else plan_for(model, method)
    prompts, fresh = [tokens(9), tokens(14, seed=2)], 5
    following = tokens(2, fresh, seed=3)
    expected = torch.stack(
        [model(torch.cat([p, f])[None]).logits[0, -fresh:] for p, f in zip(prompts, following, strict=True)]
    )
    with Applied(model, plan) as session:
        cache = new_cache(session)
        for prompt in prompts:
            own = new_cache(session)
            prefill(session, own, [prompt])
            join(cache, own)
        with kernels.count_bytes() as counted:
            got = steps.dense_step(session, cache, following)
        assert got is not None and set(counted.by_op) == {"decode"}
        assert cache.lengths.tolist() == [9 + fresh, 14 + fresh]
        cache.crop(-fresh)
        alone = torch.cat([steps.dense_step(session, cache, row[:, None]) for row in following.unbind(1)], dim=1)
        more = steps.dense_step(session, cache, following[:, :1].expand(2, 17))
    # Kernels beside the model's own products, which do not round x to 8 bits; and the same kernels one token at a time.
    assert_near(got, expected, 2**0.5 * rounding(model, weights, thinned=rounds_x(weights, name or "")), "dense steps")
    assert_near(got, alone, rounding(model, weights, thinned=rounds_x(weights, name or "")), "one token at a time")
    assert more is None  # 34 tokens


@torch.no_grad()
def test_a_token_in_front_changes_what_comes_behind_it():
    """Rows of one step attend to each other: an earlier token of the same step counts."""
    model = built("llama", "q8_0")
    with Applied(model, None) as session:
        logits = []
        for first in (3, 4):
            cache = new_cache(session)
            prefill(session, cache, [tokens(9)])
            logits.append(steps.dense_step(session, cache, torch.tensor([[first, 5, 6]])))
    a, b = logits
    assert (a[0, 1:] - b[0, 1:]).abs().max() > 1e-3 * a.abs().max()


@torch.no_grad()
def test_it_is_refused_where_somebody_watches_or_the_cache_is_another():
    model = built("llama", "fp32")
    with Applied(model, None) as session:
        cache = new_cache(session)
        assert steps.dense_step(session, cache, tokens(1, 2)) is None  # nothing was read yet
        prefill(session, cache, [tokens(9)])
        with torch.enable_grad():
            assert steps.dense_step(session, cache, tokens(1, 2)) is None
        handle = model.model.layers[0].register_forward_hook(lambda *a: None)
        assert steps.dense_step(session, cache, tokens(1, 2)) is None
        handle.remove()
        assert steps.dense_step(session, cache, tokens(1, 2)) is not None
