"""The contracts on the embedded models: equality for every method, losslessness of the exact one, evidence of quality."""

from __future__ import annotations

import pytest
import torch

import moyu
from equality import QUICK, assert_same_masks, has_sites, one_pass, padded, plan_for, stepwise
from moyu import kernels, methods
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder
from moyu.measure.windows import Windows
from moyu.model import loading, zoo
from moyu.research.training import VOCABULARY
from tiny import tokens

ALWAYS = {"cats", "griffin", "teal", "deja-vu", "estimate"}  # on swiglu; the others are slow together: seconds each


@pytest.mark.parametrize(
    "name", [n if n in ALWAYS else pytest.param(n, marks=pytest.mark.slow) for n in methods.names()]
)
@pytest.mark.parametrize(
    ("model_name", "batch"),
    [
        pytest.param(m, b, marks=() if (m, b) == ("swiglu", 1) else pytest.mark.slow)
        for m in zoo.names()
        for b in (1, 3)
    ],
)
def test_masked_pass_equals_skipped_steps(model_name, name, batch):
    model = loading.load(model_name, dtype=torch.float64).model
    method = methods.method(name, **QUICK.get(name, {}))
    if not has_sites(model, method):
        with pytest.raises(moyu.UserError, match="nothing to skip"):
            plan_for(model, method)
        return
    # More tokens than channels: a rotation has noise, whose order is rounding, in directions that no token fills.
    plan = plan_for(model, method, windows=Windows(tokens(16, 40, vocabulary=VOCABULARY), 20))
    ids, mask = padded(batch)
    whole, steps = Recorder(), Recorder()
    expected = one_pass(model, plan, ids, mask, recorder=whole)
    actual = stepwise(model, plan, ids, mask, recorder=steps)
    assert_same_masks(whole, steps)
    assert (expected - actual)[mask.bool()].abs().max() < 1e-10


@torch.no_grad()
@pytest.mark.slow
def test_relu_zero_skip_is_lossless_and_saves_its_bytes():
    """12,000 tokens decoded with exact zeros skipped, beside dense; and the bytes of those zeros really unread."""
    context = Context.open("relu", Settings(methods=("relu-zero",), test=24, window=512, boundary=8))
    model, plan = context.loaded.model, context.plan("relu-zero")
    worst = checked = 0.0
    for part in context.split.test.tokens.split(8):
        dense = model(part, use_cache=False).logits
        with Applied(model, plan, anatomy=context.anatomy) as applied, applied.prompt(8):
            out = model(part[:, :8], use_cache=True)
            for t in range(8, part.shape[1]):
                out = model(part[:, t : t + 1], past_key_values=out.past_key_values)
                worst = max(worst, float((out.logits[:, 0] - dense[:, t]).abs().max() / dense[:, t].abs().max()))
                checked += len(part)
    assert checked >= 10_000
    assert worst < 1e-5
    part = context.split.test.tokens[:1]
    with Applied(model, plan, anatomy=context.anatomy) as applied, applied.prompt(8):
        out = model(part[:, :8], use_cache=True)
        counter = Counter(1, 64)
        with applied.watched(chooser=counter), kernels.count_bytes() as counted:
            for t in range(8, 40):
                out = model(part[:, t : t + 1], past_key_values=out.past_key_values)
    blocks = context.anatomy.blocks
    zeros = sum(b.neurons - kept for b in blocks for kept in _kept(counter, b.layer))
    column = blocks[0].pieces["down"].weight.shape[0] * 4
    whole = 32 * sum(p.numel() * 4 for b in blocks for p in (b.pieces["down"].weight,))
    biases = 32 * sum(b.pieces["down"].bias.numel() * 4 for b in blocks)
    read = counted.by_op["columns"] - biases
    assert zeros > 0.5 * 32 * sum(b.neurons for b in blocks)  # the model really has them
    assert whole - read >= 0.9 * zeros * column


def _kept(counter, layer):
    table = next(t for key, t in counter.kept.items() if key.startswith(f"layer{layer}."))
    return table[table >= 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_methods_lie_between_their_matched_random_and_oracle(name):
    context = Context.open(name, Settings(test=12, calibration=8))
    for each in context.applicable(("cats", "griffin", "popularity"))[0]:
        quality = context.quality(context.plan(each))
        assert quality.oracle.kl.mean() < quality.method.kl.mean() < quality.random.kl.mean()


def test_bytes_target_is_met_and_floors_are_named():
    context = Context.open("swiglu", Settings(methods=("griffin",), bytes=0.7, test=6, calibration=4))
    quality = context.quality(context.plan("griffin"), matched=False)
    assert abs(quality.byte_fraction - 0.7) < 0.01
    with pytest.raises(moyu.UserError, match=r"n/a \(floor 0\.82\)"):
        context.plan("cett")


@pytest.mark.slow
def test_cett_reaches_its_target_on_held_out_text():
    from moyu.methods import cett

    context = Context.open("swiglu", Settings(methods=("cett",), knobs={"tau": 0.2}, test=8, calibration=8))
    plan = context.plan("cett")
    taps: dict[int, torch.Tensor] = {}

    class Keep:
        def see(self, layer, expert, tap, x, rows):
            if tap == "mid":
                taps[layer] = x[rows.sparse][::16]

        def mask(self, *args): ...

    model = context.loaded.model
    with torch.no_grad(), Applied(model, plan, engine="mask") as applied:
        with applied.prompt(128), applied.watched(observer=Keep()):
            model(context.split.test.tokens)
    reached = []
    for site, params in plan.parts.values():
        down = context.anatomy.blocks[site.layer].pieces["down"].weight.detach()
        reached.append(float(cett.curve(taps[site.layer], down, torch.tensor([params.rule.value])).mean()))
    assert abs(sum(reached) / len(reached) - 0.2) < 0.03


def test_the_matched_oracle_of_columns_takes_the_methods_own_order_where_that_errs_less(monkeypatch):
    context = Context.open("swiglu", Settings(test=6, calibration=4))
    plan = context.plan("r-sparse", sparsity=0.6)  # its low-rank path is made for what it skips itself
    quality = context.quality(plan)
    monkeypatch.setattr("moyu.engine.choosers.Hindsight", type(None))
    plain = context.quality(plan)
    assert quality.oracle.kl.mean() < min(quality.method.kl.mean(), plain.oracle.kl.mean())
