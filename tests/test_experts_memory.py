"""Routed experts under methods that decide from the prompt, and ways of generating that a plan cannot follow."""

from __future__ import annotations

import pytest
import torch

import moyu
from equality import plan_for
from moyu import UserError, methods
from moyu.engine.applied import Applied
from moyu.engine.calls import BATCHED
from moyu.engine.generate import generate
from tiny import build, tokens

NAMES = ("griffin", "tda", "clada")
SHORT = 2  # tokens of a prompt: some experts see none of them


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_what_it_is_alone_whatever_its_neighbours_are_routed_to(name, backend):
    """An expert that has seen no token of a sequence's prompt skips nothing for it."""
    model = build("mixtral")
    plan = plan_for(model, methods.method(name))
    ids, step = tokens(6, SHORT, seed=3), tokens(6, 1, seed=4)
    with Applied(model, plan, backend=backend) as applied, torch.no_grad():

        def stepped(prompt, token):
            with applied.prompt(SHORT):
                cache = model(prompt, use_cache=True).past_key_values
            return model(token, past_key_values=cache, use_cache=True).logits[:, -1]

        together = stepped(ids, step)
        alone = torch.cat([stepped(ids[i : i + 1], step[i : i + 1]) for i in range(len(ids))])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES[:2])
def test_prompts_of_different_lengths_join_though_their_experts_differ(name):
    model = build("mixtral")
    model.generation_config.eos_token_id = None
    plan = plan_for(model, methods.method(name))
    prompts = [tokens(1, n, seed=n)[0] for n in (1, 3, 2)]
    with Applied(model, plan, backend="reference") as applied:
        together = torch.stack(list(generate(applied, prompts, max_new_tokens=5, do_sample=False)), 1)
        for row, prompt in zip(together, prompts, strict=True):
            assert row.tolist() == [int(t) for t in generate(applied, [prompt], max_new_tokens=5, do_sample=False)]


@pytest.mark.parametrize("name", BATCHED)
def test_generation_that_never_says_where_a_prompt_ends_is_refused_aloud(name):
    model = build("llama", torch.float32)
    if not hasattr(model, name):
        pytest.skip(f"this version of transformers has no {name}")
    own = getattr(model, name).__func__
    with moyu.apply(model, plan_for(model, methods.method("cats"))):
        with pytest.raises(UserError, match=rf"{name}\(\) puts pieces of several prompts"):
            getattr(model, name)([[5, 6, 7]])
    assert getattr(model, name).__func__ is own
