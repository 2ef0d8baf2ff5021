"""Quantised weights: a plan masks around their own products, or they are refused by name; never silently dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moyu
from moyu import UserError, methods
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings
from moyu.calibration.walk import calibrate
from moyu.commands.rows import quality_record
from moyu.measure import accounting
from moyu.measure.text import Split
from moyu.measure.windows import Windows
from moyu.model.dissect import dissect
from moyu.model.loading import Loaded
from quantised import Packed, quantise
from tiny import build, tokens

NAMES = ["cats", "teal", "griffin", "deja-vu-heads"]


def by_torchao(model):
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda m, n: type(m) is nn.Linear and n != "lm_head"
    )
    return model


QUANTISERS = {"own": quantise, "torchao": by_torchao}


@pytest.fixture(params=QUANTISERS)
def quantiser(request):
    return QUANTISERS[request.param]


def plan_for(model, name, sparsity):
    return calibrate(model, methods.method(name), Windows(tokens(4, 24), 12), sparsity=sparsity, name="tiny")


@torch.no_grad()
def logits(model, applied=None):
    if applied is None:
        return model(tokens(2, 12)).logits
    with applied.prompt(4):
        return model(tokens(2, 12)).logits


def stood_for(model):
    """The same values as plain weights."""
    plain = build("llama", torch.float32)
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.copy_(model.get_submodule(name).weight.dequantize())
    return plain


@pytest.mark.parametrize("name", NAMES)
def test_masks_take_effect_and_nothing_is_left_behind(quantiser, name):
    model = quantiser(build("llama", torch.float32))
    dense, attributes = logits(model), {n: set(vars(m)) for n, m in model.named_modules()}
    with moyu.apply(model, plan_for(model, name, 0.0)) as applied:
        assert torch.allclose(logits(model, applied), dense, atol=1e-6)
    plan = plan_for(model, name, 0.5)
    with moyu.apply(model, plan) as applied:
        assert applied.engine == "mask" and "no kernel reads" in (applied.general_because or "")
        masked = logits(model, applied)
        written = model.generate(tokens(1, 6), max_new_tokens=6, do_sample=False)
    assert (masked - dense).abs().max() > 0.05, "silently dense"
    assert torch.equal(masked[:, :3], dense[:, :3])  # the prompt is dense
    plain = stood_for(model)
    with moyu.apply(plain, plan, engine="mask") as applied:  # the digests are those of the values
        assert torch.allclose(logits(plain, applied), masked, atol=1e-4)
        assert torch.equal(plain.generate(tokens(1, 6), max_new_tokens=6, do_sample=False), written)
    assert torch.equal(logits(model), dense)
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes


def test_a_plan_made_before_quantising_is_refused(quantiser):
    model = build("llama", torch.float32)
    plan = plan_for(model, "griffin", 0.5)
    with pytest.raises(UserError, match="other weights"):
        moyu.apply(quantiser(model), plan)


def test_a_back_end_that_is_asked_for_is_refused(quantiser):
    model = quantiser(build("llama", torch.float32))
    plan = plan_for(model, "griffin", 0.5)
    with pytest.raises(UserError, match=r"no kernel reads .*'reference' was asked for"):
        moyu.apply(model, plan, backend="reference")


def test_records_say_that_no_bytes_are_saved(quantiser):
    model = quantiser(build("llama", torch.float32))
    plan, windows = plan_for(model, "griffin", 0.5), Windows(tokens(2, 24), 12)
    anatomy = dissect(model)
    context = Context(Loaded("tiny", model, None), anatomy, Split(windows, windows, windows), Settings())
    record = quality_record(context, plan, moyu.evaluate(model, plan, windows, matched=False))
    assert record.byte_fraction is None and record.ideal_byte_fraction is not None
    assert any("no kernel saves their bytes" in note for note in record.notes)
    eight, plain = (accounting.block_bytes(m, dissect(m)) for m in (model, build("llama", torch.float32)))
    assert 0.25 < eight / plain < 0.3  # int8 and scales for float32


def test_weights_that_do_not_say_their_values_are_refused_by_name():
    with pytest.raises(UserError, match="the weights of its linears are Packed"):
        dissect(quantise(build("llama", torch.float32), Packed))


def test_a_layer_that_cannot_be_taken_is_named():
    model = build("llama", torch.float32)
    quantise(model.model.layers[1], Packed)
    anatomy = dissect(model)
    assert [b.has_ffn for b in anatomy.blocks] == [True, False, True] and "Packed" in anatomy.gaps[0]
