"""What is particular to `levels`: only further bits are missing, for the bias and for those who would centre inputs."""

import pytest
import torch

import moyu
from equality import built, one_pass, padded, plan_for
from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder
from moyu.measure.windows import Windows
from tiny import tokens


def outputs(model, plan, module, ids):
    """What a linear gives on sparse rows, (N, q)."""
    found = []
    with Applied(model, plan, engine="mask") as applied, applied.prompt(1):
        handle = module.register_forward_hook(lambda m, a, y: found.append(y.detach()))
        model(ids, use_cache=False)
        handle.remove()
    return found[0][:, 1:].flatten(0, 1)


@torch.no_grad()
def test_the_bias_is_the_mean_of_what_further_bits_would_add():
    model = built("llama", "q4_0")
    ids = tokens(6, 40)
    q = model.model.layers[0].self_attn.q_proj
    dense = q(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))[:, 1:].flatten(0, 1)
    errors = []
    for bias in (False, True):
        plan = calibrate(model, methods.method("levels"), Windows(ids, 1), sparsity=0.7, bias=bias, name="tiny")
        errors.append((outputs(model, plan, q, ids) - dense).mean(0).norm())
    assert errors[1] < 1e-4 * dense.norm(dim=1).mean() < errors[0]


def test_inputs_of_levels_cannot_be_centred():
    with pytest.raises(moyu.UserError, match="no whole columns"):
        plan_for(built("llama", "q8_0"), methods.method("levels"), centre=True)


def test_plain_weights_have_no_levels():
    with pytest.raises(moyu.UserError, match=r"GGUF file.*q8_0"):
        plan_for(built("llama", "fp32"), methods.method("levels"))


def test_static_levels_keep_the_same_inputs_for_every_token_and_levels_do_not():
    model, (ids, mask), seen = built("llama", "q8_0"), padded(3), {}
    for name in ("levels", "levels-static"):
        seen[name] = Recorder()
        one_pass(model, plan_for(model, methods.method(name)), ids, mask, recorder=seen[name])
    for key, masks in seen["levels-static"].masks.items():
        first, *others = masks.values()
        assert 0 < int(first.sum()) < len(first) and all(torch.equal(first, other) for other in others), key
    assert any(len({tuple(m.tolist()) for m in masks.values()}) > 1 for masks in seen["levels"].masks.values())
