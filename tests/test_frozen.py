"""Models whose plan is part of their modules: the same numbers, one graph, and one product for linears that share an input."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

from moyu import kernels, methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.memory import memory_of
from moyu.engine.steps.compiled import Product, frozen
from moyu.errors import UserError
from moyu.measure.windows import Windows
from test_decoding import make
from tiny import build, tokens

STRUCTURES = ("llama", "llama-biased", "qwen2", "opt-relu")
PROMPT = 12


def plan_for(model, name, **knobs):
    return calibrate(model, methods.method(name, **knobs), Windows(tokens(4, 40), 20), sparsity=0.5, name="tiny")


def products(graph: torch.fx.GraphModule) -> list[str]:
    names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [n for n in names if "linear" in n or "columns_above" in n]


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * b.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_nothing_is_skipped_without_a_plan(structure):
    model = make(structure)
    twin = frozen(model, None)
    assert any(isinstance(m, Product) for m in twin.modules())
    assert close(twin(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_columns_are_those_of_the_plan(structure):
    model = make(structure)
    plan = plan_for(model, "teal")
    with Applied(model, plan, engine="mask") as applied, applied.prompt(0):
        expected = model(tokens(2, 20)).logits
    assert close(frozen(model, plan)(tokens(2, 20)).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("structure", STRUCTURES)
def test_neurons_are_those_of_the_prompt(structure):
    model, ids = make(structure), tokens(1, 20)
    plan = plan_for(model, "griffin")
    cache = DynamicCache(config=model.config)
    with Applied(model, plan) as applied, applied.prompt(PROMPT):
        model(ids[:, :PROMPT], past_key_values=cache)
        expected = torch.cat([model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(PROMPT, 20)], 1)
    twin, own = frozen(model, plan, memory_of(cache).masks), DynamicCache(config=model.config)
    model(ids[:, :PROMPT], past_key_values=own)
    got = torch.cat([twin(ids[:, t : t + 1], past_key_values=own).logits for t in range(PROMPT, 20)], 1)
    assert close(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("name", [None, "teal"])
def test_a_step_is_one_graph_with_one_product_for_linears_that_share_an_input(name, monkeypatch):
    monkeypatch.setattr("moyu.engine.steps.compiled.GROUP", 1)  # the GPU's condition on widths
    model, seen = make("llama"), []
    twin = frozen(model, None if name is None else plan_for(model, name))
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(tokens(1, PROMPT), past_key_values=cache)

    def backend(graph, _inputs):
        seen.append(products(graph))
        return graph.forward

    step = torch.compile(twin, backend=backend, fullgraph=True)
    with kernels.use("reference"):
        for _ in range(2):
            step(tokens(1, 1), past_key_values=cache, use_cache=True)
    torch.compiler.reset()
    layers = model.config.num_hidden_layers
    assert [len(p) for p in seen] == [4 * layers + 1]  # qkv, o, gate and up, down; the head
    assert all(m.held is None for m in twin.modules() if isinstance(m, Product))


def test_what_cannot_be_frozen_is_refused():
    model = make("llama")
    with pytest.raises(UserError, match="decides anew for each token"):
        frozen(model, plan_for(model, "cats"))
    with pytest.raises(UserError, match="decides anew"):
        frozen(model, plan_for(model, "griffin"))
    with pytest.raises(UserError, match="top_k"):
        frozen(model, plan_for(model, "wina"))
    model = build("llama")
    plan = plan_for(model, "griffin")
    sites = {s.key for s in plan.sites()}
    masks = {k: torch.eye(2, model.config.intermediate_size).bool() for k in sites}
    with pytest.raises(UserError, match="different neurons"):
        frozen(model, plan, masks)
