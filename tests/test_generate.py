"""MOYU's own generation: transformers' text, a row at a time, rows that join and leave."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

import moyu
from moyu import UserError, methods
from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache, KvLayer
from moyu.engine.generate import generate, join, leave, new_cache, read, step
from moyu.measure.windows import Windows
from tiny import build, tokens

NAMES = ["teal", "griffin", "cats", "popularity"]
NEW = 12


def endless(dtype=torch.float32):
    """A model whose texts have no end of their own."""
    model = build("llama", dtype)
    model.generation_config.eos_token_id = None
    return model


def planned(name, dtype=torch.float32):
    model = endless(dtype)
    plan = moyu.calibrate(model, methods.method(name), Windows(tokens(2, 32), 16), sparsity=0.5, name="tiny")
    return model, plan


def text(model, ids, plan=None, **settings):
    return torch.stack(list(generate(model, ids, plan, **{"max_new_tokens": NEW, **settings})), 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_greedy_text_is_that_of_transformers_generate(name, backend):
    model, plan = planned(name) if name else (endless(), None)
    ids = tokens(2, 9)
    with Applied(model, plan, backend=backend):
        wanted = model.generate(ids, max_new_tokens=NEW, do_sample=False, pad_token_id=0)[:, 9:]
    assert torch.equal(text(model, ids, plan, backend=backend), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.3},
        {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": False, "suppress_tokens": [3, 17, 40], "min_new_tokens": 5, "eos_token_id": 112},
        {"do_sample": False, "forced_eos_token_id": 7},
    ],
)
def test_settings_are_those_of_transformers_generate(settings):
    model, plan = planned("cats")
    ids = tokens(1, 9)
    with Applied(model, plan):
        torch.manual_seed(3)
        wanted = model.generate(ids, **{"max_new_tokens": NEW, "pad_token_id": 0, **settings})[:, 9:]
    torch.manual_seed(3)
    assert torch.equal(text(model, ids, plan, **settings), wanted)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", [*NAMES, None])
def test_prompts_of_different_lengths_each_have_the_text_they_have_alone(name, backend):
    dtype = torch.float64 if backend == "reference" else torch.float32  # so that no rounding of a batch decides a token
    model, plan = planned(name, dtype) if name else (endless(dtype), None)
    prompts = [tokens(1, n)[0] for n in (4, 11, 7)]
    together = text(model, prompts, plan, backend=backend)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, text(model, [prompt], plan, backend=backend)[0])


def test_positions_that_no_row_holds_are_numbers():
    """Attention multiplies them by 0. Uninitialised memory is filled with NaN here, as it may be anywhere."""
    torch.use_deterministic_algorithms(True)
    try:
        layer = KvLayer()
        layer.update(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
        layer.hold(torch.tensor([1, 3]))
        layer.reserve(900)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(buffer).all() for buffer in layer.buffers)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["teal", "griffin"])
def test_a_row_joins_and_leaves_between_steps(name, backend):
    """The logits of each row are those of its own run, whoever stands beside it."""
    model, plan = planned(name)
    prompts = [tokens(1, n)[0] for n in (5, 9)]
    steps = torch.randint(3, 120, (2, 6), generator=torch.Generator().manual_seed(5))

    def prefill(session, prompt):
        cache = KvCache(model.config)
        with session.prompt(len(prompt)):
            session.model(input_ids=prompt[None], past_key_values=cache, use_cache=True)
        return cache

    with Applied(model, plan, backend=backend) as session, torch.no_grad():
        alone = []
        for prompt, own in zip(prompts, steps, strict=True):
            cache = prefill(session, prompt)
            alone.append([step(session, cache, token[None])[0] for token in own])
        cache = prefill(session, prompts[0])
        got = [[step(session, cache, steps[0, t : t + 1])[0] for t in range(2)], []]
        join(cache, prefill(session, prompts[1]))
        for t in range(2):
            logits = step(session, cache, torch.stack([steps[0, 2 + t], steps[1, t]]))
            got[0].append(logits[0])
            got[1].append(logits[1])
        leave(cache, torch.tensor([1]))
        got[1] += [step(session, cache, steps[1, t : t + 1])[0] for t in range(2, 6)]
    for own, mixed in zip(alone, got, strict=True):
        for a, b in zip(own, mixed, strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len(got[0]) == 4 and len(got[1]) == 6


def test_the_trace_says_which_step_ran_and_strict_refuses_another():
    from moyu.kernels import cpu

    model, plan = planned("teal")
    with Applied(model, plan, backend="reference") as session:
        list(generate(session, tokens(1, 5), max_new_tokens=3))
        assert "general (back end 'reference' has no native step)" in session.traces.summary()
        with pytest.raises(UserError, match="reference"):
            list(generate(session, tokens(1, 5), max_new_tokens=3, strict=True))
    if cpu.unavailable() is not None:
        pytest.skip(cpu.unavailable())
    with Applied(model, plan) as session:
        list(generate(session, tokens(1, 5), max_new_tokens=3, strict=True))
        assert session.traces.summary() == "native"


def test_steps_stay_native_when_the_longest_row_leaves():
    """And the rows that stay get no more room than they need."""
    from moyu.kernels import cpu

    if cpu.unavailable() is not None:
        pytest.skip(cpu.unavailable())
    model, plan = planned("teal")
    with Applied(model, plan) as session, torch.no_grad():
        cache = new_cache(session)
        for length in (700, 5):
            own = new_cache(session)
            read(session, own, tokens(1, length))
            join(cache, own)
        leave(cache, torch.tensor([1]))
        step(session, cache, tokens(1, 1)[0])
        assert session.traces.summary() == "native"
        assert cache.lengths.tolist() == [6] and cache.layers[0].capacity < 300


@given(st.lists(st.tuples(st.sampled_from(["join", "leave", "grow", "copy"]), st.integers(0, 99)), max_size=12))
def test_rows_keep_what_they_hold_whoever_joins_and_leaves(moves):
    """A cache's layer beside a list of rows: the same keys and values, and zeros or old numbers behind them, never NaN."""
    layer, rows, count = KvLayer(), [], 0
    for what, number in moves:
        if what == "join" or not rows:
            own, count = KvLayer(), count + 1
            fresh = torch.full((1, 1, 1 + 7 * number, 2), float(count))
            own.update(fresh, -fresh)
            layer.join(own)
            rows.append(fresh[0, 0])
        elif what == "leave":
            chosen = [(number + k) % len(rows) for k in range(1 + number % len(rows))]
            layer.batch_select_indices(torch.tensor(chosen))
            rows = [rows[n] for n in chosen]
        elif what == "grow":
            fresh = torch.arange(len(rows), dtype=torch.float32)[:, None, None, None].expand(-1, 1, 1 + number, 2)
            layer.update(fresh, -fresh)
            rows = [torch.cat([row, f[0]]) for row, f in zip(rows, fresh, strict=True)]
        else:
            layer = pickle.loads(pickle.dumps(layer)) if number % 2 else copy.deepcopy(layer)
        assert layer.lengths.tolist() == [len(row) for row in rows] and layer.get_seq_length() <= layer.capacity
        for n, row in enumerate(rows):
            assert torch.equal(layer.keys[n, 0, : len(row)], row) and torch.equal(layer.values[n, 0, : len(row)], -row)
        assert torch.isfinite(layer.keys).all()


def test_a_cache_that_holds_the_beginning_of_a_prompt_is_read_on():
    model, plan = planned("griffin")
    ids = tokens(1, 20)
    with Applied(model, plan) as session:
        cache = new_cache(session)
        first = text(session, ids[:, :9], cache=cache, max_new_tokens=3)
        assert cache.lengths.tolist() == [11]
        whole = torch.cat([ids[:, :9], first, ids[:, 9:]], 1)
        assert text(session, whole, cache=cache).shape == (1, NEW) and cache.lengths.tolist() == [
            whole.shape[1] + NEW - 1
        ]
    with Applied(model, None) as session:
        cache = new_cache(session)
        text(session, ids[:, :9], cache=cache, max_new_tokens=1)
        assert torch.equal(text(session, ids, cache=cache), text(session, ids))


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("kind", [DynamicCache, KvCache])
def test_a_cache_that_a_plan_has_seen_is_pickled_and_copied(kind, restored):
    """Also one of transformers' own classes, which stays what it was; the copy goes on with the same logits."""
    model, plan = planned("griffin")
    ids, cache = tokens(2, 9), kind(config=model.config)

    def after(cache):
        steps = [model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(3)]
        return torch.cat(steps, 1)

    applied = Applied(model, plan)
    with torch.no_grad():
        with applied.prompt(9):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        if restored:
            applied.restore()
        copies = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))]
        assert all(type(c) is kind for c in (cache, *copies))
        wanted = after(cache)
        for other in copies:
            torch.testing.assert_close(after(other), wanted, rtol=1e-4, atol=1e-4)
    applied.restore()


def test_another_plan_or_back_end_beside_an_applied_plan_is_refused():
    model, plan = planned("cats")
    with Applied(model, plan) as session:
        for other in ({"plan": plan}, {"backend": "reference"}):
            with pytest.raises(UserError, match="applied already"):
                next(generate(session, tokens(1, 4), max_new_tokens=2, **other))


def test_bad_settings_are_one_line():
    model = endless()
    for settings, said in (({"num_beams": 4}, "beams"), ({"tempratur": 1.0}, "tempratur")):
        with pytest.raises(UserError, match=said):
            text(model, tokens(1, 4), **settings)
    with pytest.raises(UserError, match="no token"):
        text(model, torch.zeros(1, 0, dtype=torch.int64))
