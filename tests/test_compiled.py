"""Compiled steps, which accelerators take, on a CPU and without a compiler: the same numbers, tokens and masks as general ones."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import moyu
from equality import LENGTH, PROMPT, assert_same_masks, built, call, has_sites, one_pass, padded, plan_for
from moyu import kernels, methods
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.engine.generate import generate, leave, new_cache, read, step
from moyu.engine.generate import join as join_caches
from moyu.engine.steps import captured
from moyu.engine.steps.captured import CompiledRun
from moyu.engine.steps.compiled import LayerStep, Product
from moyu.engine.steps.way import NotCompiled
from moyu.errors import UserError
from moyu.measure.windows import Windows
from test_decoding import PLAIN, make
from tiny import GATED, WIDE, build, tokens

KNOBS = {"wina": {"rule": "threshold"}}
# One of each kind: columns with and without factors, and by site of several linears; gate or up first; masks of a prompt, and of no text.
FAMILIES = ("teal", "was", "wina", "cett", "cats", "chess", "countdown", "griffin", "tda", "static-norm")
GENERAL = {"larosa": "basis", "deja-vu": "neurons by score", "r-sparse": "low_rank", "deja-vu-heads": "heads by"}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_device_is_native(monkeypatch):
    monkeypatch.setattr("moyu.engine.steps.proof.NATIVE", ())


def planned(model, name):
    """A plan of tokens below 64: the tests' own are not of its text, whose values are the thresholds themselves."""
    windows = Windows(tokens(6, 40, vocabulary=64), 20)
    return None if name == "dense" else plan_for(model, methods.method(name, **KNOBS.get(name, {})), windows=windows)


def fresh(*shape, seed=31):
    return 61 + tokens(*shape, seed=seed, vocabulary=66)


def close(a, b):
    """Models in float64, whose norms round to float32: one value that goes the other way is 6e-8 of itself."""
    return (a - b).abs().max() <= 1e-6 * b.abs().max()


@torch.no_grad()
def forced(applied, prompts, count=4, seed=7):
    """Logits (count, B, V) of steps on the same tokens after prompts of any lengths."""
    cache = new_cache(applied)
    for row in prompts:
        own = new_cache(applied)
        read(applied, own, row[None])
        join_caches(cache, own)
    given = fresh(count, 3, seed=seed)[:, : len(prompts)]
    return torch.stack([step(applied, cache, given[t]) for t in range(count)]), cache


@torch.no_grad()
def stepwise(model, applied, ids, mask, chooser):
    """Logits (B, T - PROMPT, V) behind a dense prompt with padding on the left, on MOYU's cache."""
    cache = new_cache(applied)
    with applied.prompt(PROMPT), applied.watched(chooser=chooser):
        call(model, ids, mask, 0, PROMPT, cache)
        return torch.cat([call(model, ids, mask, t, t + 1, cache).logits for t in range(PROMPT, LENGTH)], 1)


# ------------------------------------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["dense", *FAMILIES])
def test_compiled_steps_are_the_general_ones(name, batch):
    model = build("llama")
    prompts = [fresh(7), fresh(5, seed=2), fresh(9, seed=3)][:batch]
    with Applied(model, planned(model, name)) as applied:
        compiled, _ = forced(applied, prompts)
        assert applied.traces.summary() == "compiled"
        applied.native = None
        general, _ = forced(applied, prompts)
    assert close(compiled, general)


@pytest.mark.parametrize("structure", [*(n for n in PLAIN if not n.startswith("opt")), "sharp"])
@pytest.mark.parametrize("name", ["dense", "teal"])
def test_every_plain_structure_has_one(structure, name):
    model = make(structure, torch.float64)
    with Applied(model, planned(model, name)) as applied:
        assert isinstance(applied.native, CompiledRun), applied.general_because
        compiled, _ = forced(applied, [fresh(6)])
        applied.native = None
        general, _ = forced(applied, [fresh(6)])
    assert close(compiled, general)


def test_windows_caps_and_norms_behind():
    torch.manual_seed(0)
    config = Gemma2Config(**WIDE, **GATED, head_dim=16, sliding_window=4, query_pre_attn_scalar=16)
    model = Gemma2ForCausalLM(config).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with Applied(model, None) as applied:
        assert applied.native.layers[0].window == 4 and applied.native.layers[0].softcap
        prompts = [fresh(9), fresh(5, seed=2)]
        compiled, _ = forced(applied, prompts)
        applied.native = None
        general, _ = forced(applied, prompts[:1])
    assert close(compiled[:, :1], general)  # the general step has no rows of different lengths here


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_one_masked_pass_agrees_under_replayed_levels(name, batch):
    model = build("llama")
    plan, (ids, mask) = planned(model, name), padded(batch)
    levels = Recorder()
    masked = one_pass(model, plan, ids, mask, recorder=levels)
    with Applied(model, plan) as applied:
        steps = stepwise(model, applied, ids, mask, Replayer(levels))
        assert applied.traces.summary() == "compiled"
    sparse = mask.bool()[:, PROMPT:]
    assert close(steps[sparse], masked[:, PROMPT:][sparse])


@pytest.mark.parametrize("name", FAMILIES)
def test_they_tell_the_masks_that_they_took(name):
    model = build("llama")
    plan, (ids, mask) = planned(model, name), padded(3)
    compiled, general = Recorder(), Recorder()
    with Applied(model, plan) as applied:
        free = stepwise(model, applied, ids, mask, None)
        told = stepwise(model, applied, ids, mask, compiled)
        applied.native = None
        stepwise(model, applied, ids, mask, general)
    assert_same_masks(compiled, general)
    assert close(told, free)


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_weights_in_blocks_are_read_as_they_are(weights):
    model = built("llama", weights)
    with Applied(model, None) as applied:
        compiled, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
        assert applied.traces.summary() == "compiled"
        applied.native = None
        general, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
    assert ((compiled - general).norm() / general.norm()) < 0.02  # x is rounded to 8 bits, by both, at other places
    with Applied(model, planned(model, "teal")) as applied:
        assert applied.native is None
        assert applied.general_because == f"no compiled step skips parts of weights in {weights}"


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_linears_in_one_format_are_one_product(weights):
    model = built("llama", weights)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Applied(model, None) as applied:
        forced(applied, [fresh(7)])
        layer = applied.native._steps[0]
        assert [len(group.products) for group in (layer.inputs, layer.network.inputs)] == [1, 1]
        held = layer.inputs.products[0].operand.part_0
        q, k = (applied.native.layers[0].block.pieces[n].blocks.tensors[0] for n in "qk")
        assert held.data_ptr() == q.data_ptr() and k.data_ptr() == held[len(q)].data_ptr()
        applied.native.detach()
        alone = applied.native.layers[0].block.pieces["q"].blocks.tensors[0]
    assert alone.untyped_storage().nbytes() == alone.nbytes < q.untyped_storage().nbytes()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["levels", "shortlist"])
def test_levels_and_shortlists_are_the_general_ones(name, weights):
    model = built("llama", weights)
    with Applied(model, planned(model, name)) as applied:
        assert isinstance(applied.native, CompiledRun), applied.general_because
        compiled, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
        assert applied.traces.summary() == "compiled"
        again, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
        applied.native = None
        general, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
    assert torch.equal(compiled, again)
    # x is rounded to 8 bits, by both, at other places; an input on the edge of a threshold may go the other way
    assert ((compiled - general).norm() / general.norm()) < 0.05


# --------------------------------------------------------------------------------------------- what happens between steps


def test_text_that_grows_moves_to_twice_the_room(monkeypatch):
    monkeypatch.setattr(captured, "SHORTEST", 8)
    model = build("llama")
    with Applied(model, planned(model, "griffin")) as applied:
        compiled, cache = forced(applied, [fresh(5), fresh(3, seed=2)], count=20)
        sizes = [slab.capacity for slab in applied.native._slabs]
        assert sizes == [8, 16, 32] and cache.layers[0].capacity == 32
        assert [slab.free for slab in applied.native._slabs] == [True, True, False]
        again, _ = forced(applied, [fresh(5), fresh(3, seed=2)], count=20)
        assert len(applied.native._slabs) == 4  # the first two were free
        applied.native = None
        general, _ = forced(applied, [fresh(5), fresh(3, seed=2)], count=20)
    assert close(compiled, general) and torch.equal(compiled, again)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dense", "griffin"])
def test_rows_join_and_leave_between_steps(name):
    model, results = build("llama"), []
    with Applied(model, planned(model, name)) as applied:
        for _ in range(2):
            _, cache = forced(applied, [fresh(7), fresh(5, seed=2), fresh(9, seed=3)])
            leave(cache, torch.tensor([0, 2]))
            logits = [step(applied, cache, fresh(2, seed=11))]
            other = new_cache(applied)
            read(applied, other, fresh(1, 6, seed=4))
            join_caches(cache, other)
            logits += [step(applied, cache, fresh(3, seed=12)), step(applied, cache, fresh(3, seed=13))]
            cut = copy.deepcopy(cache)
            logits.append(step(applied, cut, fresh(3, seed=14)))
            logits.append(step(applied, cache, fresh(3, seed=15)))
            results.append(torch.cat(logits))
            applied.native = None
    assert close(*results)


@pytest.mark.parametrize("sampled", [False, True])
def test_generation_streams_the_same_text(sampled):
    model = build("llama")
    settings = {"max_new_tokens": 9, "do_sample": sampled, "eos_token_id": None}
    with Applied(model, planned(model, "teal")) as applied:
        texts, lengths = [], []
        for _ in range(2):
            cache = new_cache(applied)
            texts.append(torch.cat(list(generate(applied, [fresh(6)], cache=cache, seed=3, **settings))))
            lengths.append(int(cache.lengths))
            applied.native = None
    assert torch.equal(*texts)
    assert lengths == [6 + 9 - 1] * 2  # all but the last token


def test_a_reader_who_stops_leaves_the_cache_at_the_token_that_he_saw():
    model = build("llama")
    with Applied(model, None) as applied:
        cache = new_cache(applied)
        stream = generate(applied, [fresh(6)], cache=cache, max_new_tokens=9, eos_token_id=None)
        first = [int(next(stream)) for _ in range(3)]
        stream.close()
        assert int(cache.lengths) == 6 + 2
        whole = torch.cat(list(generate(applied, [fresh(6)], max_new_tokens=9, eos_token_id=None)))
        prompt = torch.cat([fresh(6), torch.tensor(first)])
        rest = torch.cat(list(generate(applied, [prompt], cache=cache, max_new_tokens=6, eos_token_id=None)))
    assert whole.tolist() == first + rest.tolist()


def test_transformers_own_generate_takes_it():
    model = build("llama", torch.float32)
    ids, mask = padded(3)
    given = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with Applied(model, planned(model, "griffin")) as applied:
        compiled = model.generate(ids, **given)
        assert applied.traces.summary() == "compiled"
        applied.native = None
        assert torch.equal(compiled, model.generate(ids, **given))


# ------------------------------------------------------------------------------------------------------- what it is made of


@pytest.mark.parametrize("name", ["dense", "teal", "griffin", "cats", "was"])
def test_a_layer_compiles_as_a_whole_and_once_for_all(name, monkeypatch):
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(captured._call, fullgraph=True, dynamic=False, backend=backend)
    monkeypatch.setattr(captured, "_compiled", lambda: compiled)
    monkeypatch.setattr(captured, "_compile", lambda x, levels: captured._within_limit)
    model = build("llama")
    with Applied(model, planned(model, name)) as applied:
        logits, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
        applied.native = None
        general, _ = forced(applied, [fresh(7), fresh(5, seed=2)])
    torch.compiler.reset()
    assert len(graphs) == 2  # the layer, of which there are three, and the ends
    assert close(logits, general)


@torch.no_grad()
def test_linears_that_share_an_input_are_one_product_without_a_copy(monkeypatch):
    monkeypatch.setattr("moyu.engine.steps.compiled.GROUP", 1)  # the GPU kernel's condition on widths
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    for name in ("dense", "teal"):
        with Applied(model, planned(model, name)) as applied:
            forced(applied, [fresh(7)])
            steps = applied.native._steps
            assert [len(p.sizes) for p in steps[0].modules() if isinstance(p, Product)] == [3, 1, 2, 1]
            attention = model.model.layers[0].self_attn
            shared = {
                p.weight.untyped_storage().data_ptr() for p in (attention.q_proj, attention.k_proj, attention.v_proj)
            }
            assert shared == {steps[0].inputs.products[0].weight.untyped_storage().data_ptr()}
        for key, parameter in model.named_parameters():
            assert torch.equal(parameter, before[key]) and parameter.is_contiguous()
            assert parameter.untyped_storage().nbytes() == parameter.nbytes, key


def test_a_layer_that_errs_is_not_taken(monkeypatch):
    original = LayerStep.__init__

    def wrong(self, layer, joined=None):
        original(self, layer, joined)
        self.scale *= 1.02

    monkeypatch.setattr(LayerStep, "__init__", wrong)
    with Applied(build("sharp"), None) as applied:
        assert applied.native is None
        assert "attention is not what a plain layer computes" in applied.general_because


# --------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", GENERAL)
def test_what_it_cannot_do_takes_the_general_step_and_says_why(name):
    model = build("llama", torch.float32)
    method = methods.method(name)
    assert has_sites(model, method)
    plan = plan_for(model, method)
    with Applied(model, plan) as applied:
        list(generate(applied, [fresh(6)], max_new_tokens=3, eos_token_id=None))
        summary = applied.traces.summary()
        assert summary.startswith("general (") and GENERAL[name] in summary
        with pytest.raises(UserError, match="not the fastest"):
            list(generate(applied, [fresh(6)], max_new_tokens=3, strict=True, eos_token_id=None))


def test_hooks_other_caches_and_back_ends_take_the_general_step():
    model = build("llama", torch.float32)
    with Applied(model, None) as applied:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        list(generate(applied, [fresh(6)], max_new_tokens=3, eos_token_id=None))
        handle.remove()
        with torch.no_grad(), applied.prompt(6):
            out = model(fresh(1, 6), use_cache=True)
            model(fresh(1, 1), past_key_values=out.past_key_values)
        said = applied.traces.summary()
    assert "hooked" in said and "its cache is not one that the step can append to" in said
    with Applied(model, None, backend="reference") as applied:
        assert applied.native is None and "back end 'reference'" in applied.general_because


def test_a_step_that_does_not_compile_leaves_the_text_to_the_general_one(monkeypatch):
    def step(self, levels):
        raise NotCompiled("the step did not compile: no compiler")

    model, settings = build("llama", torch.float32), {"max_new_tokens": 5, "eos_token_id": None}
    expected = torch.cat(list(moyu.generate(model, [fresh(6)], **settings)))
    monkeypatch.setattr(captured.Slab, "step", step)
    with Applied(model, None) as applied:
        assert torch.equal(torch.cat(list(generate(applied, [fresh(6)], **settings))), expected)
        assert applied.traces.summary() == "general (the step did not compile: no compiler)"


def test_strict_takes_it(monkeypatch):
    model = build("llama", torch.float32)
    texts = [torch.stack(list(moyu.generate(model, fresh(2, 5), max_new_tokens=4, strict=True))) for _ in range(2)]
    assert torch.equal(*texts)
    with kernels.use("reference"):
        assert torch.equal(texts[0], torch.stack(list(moyu.generate(model, fresh(2, 5), max_new_tokens=4))))
