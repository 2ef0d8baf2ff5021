"""A plan beside what else a model may be run with: caches of every kind, types, gradients."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, QuantizedCache, StaticCache

from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.measure.windows import Windows
from moyu.model.dissect import dissect
from tiny import GATED, WIDE, build, tokens

PROMPT, LENGTH = 12, 24


def sliding():
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**WIDE, **GATED, sliding_window=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model


MODELS = {"llama": lambda: build("llama", torch.float32), "sliding window": sliding}
CACHES = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
    "fp8": lambda config: QuantizedCache("fp8", config),
}


def plan_for(model, name, sparsity=0.5):
    return calibrate(model, methods.method(name), Windows(tokens(4, 40), 20), sparsity=sparsity, name="tiny")


@torch.no_grad()
def steps(model, cache, applied=None):
    """Logits (1, T - P, V) of forced single steps after a dense prompt."""
    ids = tokens(1, LENGTH)

    def run():
        model(ids[:, :PROMPT], past_key_values=cache)
        return torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, LENGTH)], 1)

    if applied is None:
        return run()
    with applied.prompt(PROMPT):
        return run()


def apart(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("structure", MODELS)
def test_skipped_is_masked_with_every_cache(structure, cache):
    if (structure, cache) == ("sliding window", "fp8"):
        pytest.skip("transformers' quantised cache has no sliding layers")
    model, kind = MODELS[structure](), CACHES[cache]
    plan, dense = plan_for(model, "griffin"), steps(model, kind(model.config))
    with Applied(model, plan) as applied:
        skipped = steps(model, kind(model.config), applied)
    with Applied(model, plan, engine="mask") as applied:
        masked = steps(model, kind(model.config), applied)
    assert apart(skipped, masked) < 1e-3 and apart(masked, dense) > 0.05
    if cache == "fp8":  # and it is the cache that was asked for
        with Applied(model, plan) as applied:
            assert apart(steps(model, CACHES["dynamic"](model.config), applied), skipped) > 1e-3
    with Applied(model, plan_for(model, "griffin", 0.0)) as applied:
        assert apart(steps(model, kind(model.config), applied), dense) < 1e-3


def test_generate_makes_a_static_cache_of_its_own():
    model = build("llama", torch.float32)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with Applied(model, plan_for(model, "griffin")):
        dynamic = model.generate(tokens(2, PROMPT), **options)
        assert torch.equal(model.generate(tokens(2, PROMPT), cache_implementation="static", **options), dynamic)
    assert not torch.equal(model.generate(tokens(2, PROMPT), **options), dynamic)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["griffin", "popularity"])
def test_skipped_is_masked_in_every_type(name, dtype):
    """With masks that do not hang on the rounding of a step."""
    model = build("llama", torch.float32)
    plan = plan_for(model, name)
    with Applied(model, plan, engine="mask") as applied:
        exact = steps(model, DynamicCache(), applied)
    model.to(dtype)
    with Applied(model, plan, check=False) as applied:
        skipped = steps(model, DynamicCache(), applied)
    assert skipped.dtype == dtype
    assert apart(skipped, exact) < {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]


@pytest.mark.parametrize(("structure", "name"), [("opt-gelu", "teal"), ("gpt2", "griffin")])  # float64 throughout
def test_gradients_go_through_masks(structure, name):
    """Of a loss of sparse positions by a weight, against the difference along a direction: masks stay as they are."""
    model = build(structure, torch.float64)
    ids, weight = tokens(1, 16), dissect(model).blocks[1].pieces["down"].module.weight
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    with Applied(model, plan_for(model, name), engine="mask") as applied, applied.prompt(4):

        def loss():
            return model(ids).logits[:, 4:].square().mean()

        def moved(step):
            with torch.no_grad():
                weight.add_(direction, alpha=step)
                value = float(loss())
                weight.add_(direction, alpha=-step)
            return value

        loss().backward()
        along, step = float((weight.grad * direction).sum()), 1e-7
        assert along == pytest.approx((moved(step) - moved(-step)) / (2 * step), rel=1e-4)
    masked = weight.grad.clone()
    model.zero_grad()
    model(ids).logits[:, 4:].square().mean().backward()
    assert not torch.allclose(masked, weight.grad, rtol=1e-2), "gradients of the dense model"
