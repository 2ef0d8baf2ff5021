"""Where the prompt ends and what is padding, whatever transformers hands over: masks, embeddings, prefixes, caches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM

import moyu
from equality import plan_for
from moyu import UserError, methods
from moyu.engine.applied import Applied
from moyu.engine.rows import columns_of, rows_of
from tiny import build, tokens

PROMPT, NEW = 9, 6
FORMS = ("boolean", "added", "dictionary", "static")


def four(padding: list[int], past: int, length: int, form: str, window: int | None = None, room: int = 0):
    """The attention mask of a call of `length` columns after `past`, as transformers makes it from left padding."""
    columns = past + length
    place = torch.arange(columns + room)
    query = torch.arange(past, columns)[:, None]
    seen = (place <= query) & ((place > query - window) if window else torch.ones(1, 1, dtype=torch.bool))
    kept = torch.stack([place >= p for p in padding])  # (B, S)
    mask = seen[None, None] & kept[:, None, None]
    mask |= ~mask.any(-1, keepdim=True)  # a row that sees nothing sees everything, as some versions have it
    if form == "boolean" or form == "static":
        return mask
    added = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    return added if form == "added" else {"sliding_attention": added, "full_attention": added}


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 7), st.integers(1, 6), st.sampled_from(FORMS)
)
def test_every_form_of_a_mask_says_the_same(padding, past, length, form):
    padding = [min(p, past + length - 1) for p in padding]  # the newest column is never padding
    flat = torch.stack([torch.arange(past + length) >= p for p in padding])
    mask = four(padding, past, length, form, room=4 if form == "static" else 0)
    assert torch.equal(columns_of(mask, past + length, len(padding)), flat)
    shape, device = (len(padding), length), torch.device("cpu")
    for a, b in zip(rows_of(shape, mask, past, 3, device), rows_of(shape, flat.long(), past, 3, device), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def test_a_sliding_window_hides_columns_that_are_no_padding():
    """What the cache's memory knows of them counts."""
    mask = four([0, 2], 6, 1, "added", window=3)
    known = torch.stack([torch.arange(6) >= p for p in (0, 2)])
    rows = rows_of((2, 1), mask, 6, 4, torch.device("cpu"), known)
    assert rows.pos.tolist() == [6, 4] and rows.valid.all()


def test_prompts_may_end_at_a_column_of_their_own():
    rows = rows_of((2, 4), None, 2, torch.tensor([3, 5]), torch.device("cpu"))
    assert rows.sparse.view(2, 4).tolist() == [[False, True, True, True], [False, False, False, True]]


def greedy(model, **kwargs):
    return model.generate(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=127, **kwargs)


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_embeddings_are_the_prompt_that_their_ids_are(name):
    model, ids = build("llama", torch.float32), tokens(1, PROMPT)
    plan = plan_for(model, methods.method(name))
    with moyu.apply(model, plan), torch.no_grad():
        wanted = greedy(model, input_ids=ids)[:, PROMPT:]
        table = model.get_input_embeddings()
        assert torch.equal(greedy(model, inputs_embeds=table(ids)), wanted)
        both = greedy(
            model, inputs_embeds=table(ids), input_ids=ids
        )  # the embeddings are read, the ids are for processors
        assert torch.equal(both[:, PROMPT:], wanted)


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_a_cached_prefix_is_part_of_the_prompt(name):
    model, ids = build("llama", torch.float32), tokens(1, PROMPT)
    plan = plan_for(model, methods.method(name))
    with moyu.apply(model, plan) as applied, torch.no_grad():
        wanted = greedy(model, input_ids=ids)
        cache = DynamicCache(config=model.config)
        with applied.prompt(PROMPT):
            model(input_ids=ids[:, :5], past_key_values=cache, use_cache=True)
        assert torch.equal(greedy(model, input_ids=ids, past_key_values=cache), wanted)


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_a_prompt_in_chunks_is_one_prompt(name):
    model, ids = build("llama", torch.float32), tokens(1, PROMPT)
    plan = plan_for(model, methods.method(name))
    with moyu.apply(model, plan), torch.no_grad():
        wanted = greedy(model, input_ids=ids)
        assert torch.equal(greedy(model, input_ids=ids, prefill_chunk_size=4), wanted)


@pytest.mark.parametrize("name", ["griffin", "cats"])
@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("engine", ["mask", "skip"])
def test_padding_under_a_static_cache_is_padding(name, windows, engine):
    """Also where layers have masks of their own: transformers then hands over a dictionary of them."""
    if windows:
        config = Gemma2Config(
            vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, sliding_window=64, bos_token_id=1, eos_token_id=127, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    else:
        model = build("llama", torch.float32)
    plan = plan_for(model, methods.method(name))
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with Applied(model, plan, engine=engine), torch.no_grad():
        wanted = greedy(model, input_ids=ids, attention_mask=mask)
        got = greedy(model, input_ids=ids, attention_mask=mask, cache_implementation="static", disable_compile=True)
        alone = greedy(model, input_ids=ids[1:, 4:])
    assert torch.equal(got, wanted)
    assert torch.equal(wanted[1, PROMPT:], alone[0, PROMPT - 4 :])


class Sidestep(LlamaForCausalLM):
    """Calls its forward past what an applied plan has put in its place, as a wrapper or a new version of transformers may."""

    def __call__(self, *args, **kwargs):
        return LlamaForCausalLM.forward(self, *args, **kwargs)


@pytest.mark.parametrize("name", ["griffin", "cats"])
def test_a_plan_that_does_nothing_is_an_error(name):
    model, ids = build("llama", torch.float32), tokens(1, PROMPT)
    plan = plan_for(model, methods.method(name))
    with moyu.apply(model, plan):
        model.__class__ = Sidestep
        with pytest.raises(UserError, match="the plan was used for none of them"):
            greedy(model, input_ids=ids)
