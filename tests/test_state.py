"""A model with a plan applied is still a model: it saves, casts, generates in every mode, and comes back unchanged."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import Cache

import moyu
from fixtures_methods import Every
from moyu import methods
from moyu.calibration.profiling import profile
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.measure.windows import Windows
from tiny import build, tokens

PROMPT, LENGTH = 8, 14
NAMES = ["cats", "griffin", "teal"]  # neurons by token, neurons by sequence, columns by token
STRUCTURES = ["llama", "opt-relu", "gpt2", "phi3", "mixtral"]
PAIRS = [(s, n) for s in STRUCTURES for n in NAMES if n != "cats" or s not in ("opt-relu", "gpt2")]  # cats needs a gate


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tiny products are faster so, and threads of the tests do not wait for each other's workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_for(model, name="griffin"):
    return calibrate(model, methods.method(name), Windows(tokens(4, 40), 20), sparsity=0.5, name="tiny")


def planned(structure="llama", name="griffin", dtype=torch.float32):
    model = build(structure, dtype)
    return model, plan_for(model, name)


@torch.no_grad()
def stepwise(model, applied):
    """Logits of a dense prompt and single steps."""
    ids, cache, logits = tokens(1, LENGTH), None, []
    with applied.prompt(PROMPT):
        for start, stop in [(0, PROMPT)] + [(t, t + 1) for t in range(PROMPT, LENGTH)]:
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def dense(model):
    return model(tokens(1, LENGTH)).logits


def greedy(model, ids, **kwargs):
    kwargs = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | kwargs
    return model.generate(ids, attention_mask=torch.ones_like(ids), **kwargs)


def same_parameters(model, before):
    assert all(p.is_contiguous() and torch.equal(p, before[n]) for n, p in model.named_parameters())


def copied(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("structure", ["llama", "opt-relu", "phi3", "mixtral"])
def test_saved_while_applied_is_the_dense_model(structure, dtype, tmp_path):
    model, plan = planned(structure, dtype=dtype)
    before = copied(model)
    model.save_pretrained(tmp_path / "dense")
    with moyu.apply(model, plan) as applied:
        stepwise(model, applied)
        state = model.state_dict()
        assert all(t.is_contiguous() for t in state.values())
        assert all(torch.equal(state[n], t) for n, t in before.items())
        model.save_pretrained(tmp_path / "applied")
    files = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("dense", "applied")]
    assert files[0] == files[1]
    loaded, again = (
        AutoModelForCausalLM.from_pretrained(tmp_path / k, dtype=dtype).eval() for k in ("dense", "applied")
    )
    same_parameters(again, before)
    assert torch.equal(dense(again), dense(loaded))
    if dtype == torch.float32 and structure != "mixtral":  # in bfloat16 rotary tables, in experts kernels, differ
        assert torch.equal(dense(again), dense(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("structure", "name"), PAIRS)
def test_restored_is_bit_identical(structure, name, dtype):
    model, plan = planned(structure, name, dtype)
    before, expected, attributes = copied(model), dense(model), set(vars(model))
    applied = moyu.apply(model, plan)
    assert not torch.equal(stepwise(model, applied), expected)
    assert applied.restore() is model and applied.restore() is model
    same_parameters(model, before)
    assert torch.equal(dense(model), expected)
    assert set(vars(model)) == attributes and not any("forward" in vars(m) for m in model.modules())
    with moyu.apply(model, plan):  # and it can be applied again
        pass


@pytest.mark.parametrize("name", NAMES)
def test_cast_while_applied(name):
    """`.to` packs the weights; the next step lays them out again, in the new type."""
    model, plan = planned(name=name)
    with moyu.apply(model, plan) as applied:
        first = stepwise(model, applied)
        model.to(torch.bfloat16)
        low = stepwise(model, applied)
        model.to(torch.float32)
        again = stepwise(model, applied)
    fresh = build("llama", torch.float32).to(torch.bfloat16)
    with moyu.apply(fresh, plan) as applied:
        assert low.dtype == torch.bfloat16 and torch.equal(low, stepwise(fresh, applied))
    with moyu.apply(fresh.to(torch.float32), plan) as applied:
        assert torch.allclose(again, stepwise(fresh, applied), atol=1e-6)
    assert not torch.equal(first, again)  # the weights were rounded on the way
    same_parameters(model, copied(fresh))


def test_loading_is_refused():
    model, plan = planned()
    state = {n: t + 1 for n, t in model.state_dict().items()}
    before = copied(model)
    with moyu.apply(model, plan), pytest.raises(moyu.UserError, match=r"restore\(\)"):
        model.load_state_dict(state)
    same_parameters(model, before)
    model.load_state_dict(state)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_new_weights_of_one_linear_are_used(name, assign):
    """Nobody can refuse what is loaded into a part of the model: then the new weights count."""
    model, plan = planned(name=name)
    new = {"weight": torch.randn_like(model.model.layers[1].mlp.up_proj.weight) / 10}
    with moyu.apply(model, plan) as applied:
        before = stepwise(model, applied)
        model.model.layers[1].mlp.up_proj.load_state_dict(new, assign=assign)
        actual = stepwise(model, applied)
    other = build("llama", torch.float32)
    other.model.layers[1].mlp.up_proj.load_state_dict(new)
    with Applied(other, plan, check=False) as applied:
        assert torch.allclose(actual, stepwise(other, applied), atol=1e-5)
    assert not torch.allclose(actual, before, atol=1e-3)
    same_parameters(model, copied(other))


# ------------------------------------------------------------------------------------------------------ what is refused


def test_training_is_refused():
    model, plan = planned()
    with moyu.apply(model, plan):
        with pytest.raises(moyu.UserError, match="train"):
            model.train()
        assert model.eval() is model and not model.training
    with pytest.raises(moyu.UserError, match="eval"):
        moyu.apply(model.train(), plan)
    moyu.apply(model.eval(), plan).restore()


def test_a_second_plan_is_refused():
    model, plan = planned()
    with moyu.apply(model, plan) as applied:
        expected = stepwise(model, applied)
        with pytest.raises(moyu.UserError, match="already applied"):
            moyu.apply(model, plan)
        assert torch.equal(stepwise(model, applied), expected)  # the first is as it was


ASKED = {
    "calibrate": lambda model, plan: moyu.calibrate(model, "cats", Windows(tokens(2, 32), 16), sparsity=0.5),
    "profile": lambda model, plan: profile(model, Windows(tokens(2, 32), 16)),
    "evaluate": lambda model, plan: moyu.evaluate(model, plan, Windows(tokens(2, 32), 16)),
    "apply": lambda model, plan: moyu.apply(copy.deepcopy(model), plan),
    "apply to a part": lambda model, plan: moyu.apply(model.model, plan),
}


@pytest.mark.parametrize("what", ASKED)
def test_what_is_made_from_a_dense_model_is_refused_under_a_plan(what):
    """It would be made from the sparse model, or blame what the plan has put in place of the model's own parts."""
    model, plan = planned(name="cats")
    expected = dense(model)
    with moyu.apply(model, plan):
        with pytest.raises(moyu.UserError, match=r"a plan is already applied to this model: restore\(\) it first"):
            ASKED[what](model, plan)
    assert torch.equal(dense(model), expected) and not any("_moyu_applied" in vars(m) for m in model.modules())


@pytest.mark.parametrize(("structure", "name"), PAIRS)
def test_autocast_is_obeyed(structure, name):
    """Both engines do the products that transformers would do under it, and a step that masks says why."""
    model, plan = planned(structure, name)
    levels, found = Recorder(), []
    for engine, chooser in (("mask", levels), ("skip", Replayer(levels))):
        with Applied(model, plan, engine=engine) as applied:
            with torch.autocast("cpu", torch.bfloat16):
                greedy(model, tokens(1, PROMPT))
                with applied.watched(chooser=chooser):
                    found.append(stepwise(model, applied))
            if engine == "skip":
                assert all("torch.autocast is on" in str(trace.because) for trace in applied.traces.counts)
            assert stepwise(model, applied).dtype == torch.float32
    masked, skipped = found
    assert masked.dtype == skipped.dtype == torch.bfloat16
    # laid-out weights are summed in another order: a rounding of bfloat16 in each of the three layers
    assert (masked - skipped).abs().max() <= 3 * 2**-8 * masked.abs().max()


@pytest.mark.parametrize(("structure", "name"), PAIRS)
def test_outputs_may_be_tuples(structure, name):
    model, plan = planned(structure, name)

    def logits(*, tuples):
        cache, found = None, []
        with (
            moyu.apply(model, plan, controller=Every(period=2, tokens=3)) as applied,
            torch.no_grad(),
            applied.prompt(PROMPT),
        ):
            for start, stop in [(0, PROMPT)] + [(t, t + 1) for t in range(PROMPT, LENGTH)]:
                ids = tokens(1, LENGTH)[:, start:stop]
                out = model(ids, past_key_values=cache, use_cache=True, return_dict=not tuples)
                assert isinstance(out, tuple) == tuples
                cache = next(c for c in out if isinstance(c, Cache)) if tuples else out.past_key_values
                found.append(out[0])
        return torch.cat(found, 1)

    torch.testing.assert_close(logits(tuples=True), logits(tuples=False), rtol=1e-4, atol=1e-4)


def test_a_sequence_method_needs_to_know_the_prompt():
    model, plan = planned()
    with moyu.apply(model, plan) as applied, torch.no_grad():
        with pytest.raises(moyu.UserError, match=r"applied\.prompt"):
            model(tokens(1, 4))
        stepwise(model, applied)


@pytest.mark.parametrize("name", NAMES)
def test_an_exception_leaves_nothing_behind(name):
    model, plan = planned(name=name)
    with moyu.apply(model, plan) as applied:
        expected, written = stepwise(model, applied), greedy(model, tokens(1, PROMPT))

        def fail(*_):
            raise RuntimeError("on purpose")

        for module in (model.model.layers[1].mlp, model.model.norm):
            hook = module.register_forward_hook(fail)
            with pytest.raises(RuntimeError, match="on purpose"):
                stepwise(model, applied)
            with pytest.raises(RuntimeError, match="on purpose"):
                greedy(model, tokens(1, PROMPT))
            hook.remove()
        assert torch.equal(stepwise(model, applied), expected)
        assert torch.equal(greedy(model, tokens(1, PROMPT)), written)
        if name == "griffin":  # the boundary of the failed call is gone, too
            with pytest.raises(moyu.UserError, match="prompt"):
                model(tokens(1, 4))


# ------------------------------------------------------------------------------------------------------------- generate


@pytest.mark.parametrize(("structure", "name"), PAIRS)
def test_masking_and_skipping_write_the_same(structure, name):
    model, plan = planned(structure, name, torch.float64)
    for prompt in (1, PROMPT):
        assert_engines_agree(model, plan, tokens(2, prompt))


def assert_engines_agree(model, plan, ids):
    written = []
    for engine in ("mask", "skip"):
        with moyu.apply(model, plan, backend="reference", engine=engine):
            written.append(greedy(model, ids))
    assert torch.equal(*written)
    assert written[0].shape == (len(ids), ids.shape[1] + 8)


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_threads_generate_at_once(name):
    model, plan = planned(name=name)
    prompts = [tokens(1, 4 + 3 * n, seed=n) for n in range(4)]
    with moyu.apply(model, plan):
        alone = [greedy(model, p, max_new_tokens=16) for p in prompts]
        for _ in range(3):
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(lambda p: greedy(model, p, max_new_tokens=16), prompts))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_a_second_chat_turn(name):
    """The second turn's input is dense again; a cache that is carried over changes nothing but time."""
    model, plan = planned(name=name, dtype=torch.float64)
    with moyu.apply(model, plan, backend="reference") as applied:
        first = greedy(model, tokens(1, PROMPT), return_dict_in_generate=True)
        cache = first.past_key_values
        held = cache.get_seq_length()
        ids = torch.cat([first.sequences, tokens(1, 5, seed=3)], 1)
        second = greedy(model, ids, past_key_values=cache)
        assert torch.equal(second[:, : ids.shape[1]], ids)
        # By hand: the first turn as it was, the new columns dense, then single steps.
        with torch.no_grad():
            with applied.prompt(PROMPT):
                out = model(ids[:, :PROMPT], use_cache=True)
                for t in range(PROMPT, held):
                    out = model(ids[:, t : t + 1], past_key_values=out.past_key_values)
            with applied.prompt(ids.shape[1]):
                out = model(ids[:, held:], past_key_values=out.past_key_values)
                expected = [out.logits[:, -1:].argmax(-1)]
                while len(expected) < 8:
                    out = model(expected[-1], past_key_values=out.past_key_values)
                    expected.append(out.logits[:, -1:].argmax(-1))
    assert torch.equal(second[:, ids.shape[1] :], torch.cat(expected, 1))


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_beams(name):
    """Memories follow the beams: two prompts together give what each gives alone, and skipping what masking gives."""
    model, plan = planned(name=name, dtype=torch.float64)
    ids = tokens(2, PROMPT)

    def beams(model, ids):
        return greedy(model, ids, num_beams=3, length_penalty=0.0, renormalize_logits=True)

    with moyu.apply(model, plan, backend="reference"):
        together = beams(model, ids)
        alone = torch.cat([beams(model, ids[:1]), beams(model, ids[1:])])
    with moyu.apply(model, plan, backend="reference", engine="mask"):
        masked = beams(model, ids)
    assert torch.equal(together, alone) and torch.equal(together, masked)
    with moyu.apply(model, plan):
        assert torch.equal(beams(model, ids), together)
    with moyu.apply(model, plan, backend="reference"):
        assert not torch.equal(greedy(model, ids), greedy(model, ids.flip(0)))


def test_memory_follows_its_cache():
    """Slots of a cache that move, repeat or go take what the method remembers with them."""
    model, plan = planned(dtype=torch.float64)
    ids, new = tokens(3, PROMPT), tokens(3, 1, seed=3)
    moves = {
        "reorder_cache": (torch.tensor([2, 0, 1]), [2, 0, 1]),
        "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
        "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
    }
    with moyu.apply(model, plan, backend="reference") as applied, applied.prompt(PROMPT), torch.no_grad():
        for move, (argument, order) in moves.items():
            cache = model(ids, use_cache=True).past_key_values
            model(new, past_key_values=cache)  # the masks are frozen now
            getattr(cache, move)(argument)
            actual = model(new[order], past_key_values=cache).logits
            cache = model(ids[order], use_cache=True).past_key_values
            model(new[order], past_key_values=cache)
            expected = model(new[order], past_key_values=cache).logits
            assert torch.allclose(actual, expected, atol=1e-10), move
        cache.crop(-1)  # a sparse column goes, the memory of the prompt stays
        assert torch.allclose(model(new[order], past_key_values=cache).logits, expected, atol=1e-10)
        cache.crop(-4)  # columns of the prompt go: what they left behind cannot be taken back
        with pytest.raises(moyu.UserError, match="empty cache"):
            model(new[order], past_key_values=cache)


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_several_samples_of_one_prompt(name):
    model, plan = planned(name=name, dtype=torch.float64)
    written = []
    for engine in ("mask", "skip"):
        with moyu.apply(model, plan, backend="reference", engine=engine):
            torch.manual_seed(5)
            written.append(greedy(model, tokens(2, PROMPT), do_sample=True, num_return_sequences=3, top_k=0))
    assert written[0].shape == (6, PROMPT + 8) and torch.equal(*written)
    assert len({tuple(row.tolist()) for row in written[0]}) == 6


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("agrees", [True, False])
def test_assisted_generation_is_plain_greedy(name, agrees):
    """Candidates that the assistant proposed are checked in one sparse pass, and the cache is cropped."""
    model, plan = planned(name=name, dtype=torch.float64)
    assistant = build("llama", torch.float64, seed=0 if agrees else 4)
    ids = tokens(1, PROMPT)
    with moyu.apply(model, plan, backend="reference"):
        plain = greedy(model, ids, max_new_tokens=20)
        assert torch.equal(greedy(model, ids, max_new_tokens=20, assistant_model=assistant), plain)
        if not agrees:
            assert torch.equal(greedy(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3), plain)


def test_an_assistant_with_a_prompt_mask_of_its_own_is_refused():
    """Its cache is cropped into what its mask was made from: refused, never silently another mask."""
    model, plan = planned(name="cats", dtype=torch.float64)
    assistant, other = planned(name="griffin", dtype=torch.float64)
    ids = tokens(1, PROMPT)
    with moyu.apply(model, plan, backend="reference"), moyu.apply(assistant, other, backend="reference"):
        with pytest.raises(moyu.UserError, match="run the prompt again"):
            greedy(model, ids, assistant_model=assistant)


@pytest.mark.parametrize("name", ["cats", "griffin"])
def test_streaming(name):
    class Streamer:
        def __init__(self):
            self.seen, self.ended = [], False

        def put(self, value):
            self.seen += value.flatten().tolist()

        def end(self):
            self.ended = True

    model, plan = planned(name=name)
    with moyu.apply(model, plan):
        plain, streamer = greedy(model, tokens(1, PROMPT)), Streamer()
        assert torch.equal(greedy(model, tokens(1, PROMPT), streamer=streamer), plain)
    assert streamer.ended and streamer.seen == plain[0].tolist()


def test_a_cache_of_another_plan_is_refused():
    """A prompt mask needs the statistics of its own prompt: a cache that another plan filled has others, or none."""
    model, first = planned(name="cats", dtype=torch.float64)
    _, second = planned(name="griffin", dtype=torch.float64)
    ids = tokens(1, PROMPT)
    with torch.no_grad(), moyu.apply(model, first, backend="reference") as applied, applied.prompt(PROMPT):
        cache = model(ids, use_cache=True).past_key_values
    with torch.no_grad(), moyu.apply(model, second, backend="reference") as applied, applied.prompt(PROMPT):
        with pytest.raises(moyu.UserError, match="another one"):
            model(ids[:, :1], past_key_values=cache)
