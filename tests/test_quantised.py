"""Models whose weights are blocks: plans on top of them, native steps, byte counts, and what is left afterwards."""

import copy

import pytest
import torch

import moyu
from equality import assert_near, one_pass, rounding, steps_from_one_cache, stepwise
from moyu import kernels
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder, Replayer
from moyu.errors import UserError
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import dissect, loading
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear, weight_format
from moyu.plan import Plan
from moyu.weights import QUANTISED, named

PROMPT, STEPS = 8, 6
METHODS = ("cats", "teal", "griffin", "popularity")


def make(kind, seed=0):
    """A tiny Llama in float32 and the same model in blocks."""
    model = loading.random_model("tiny", dtype=torch.float32, seed=seed)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.mul_(3)  # so that logits differ between tokens, and attention is no more than sharp
    twin = copy.deepcopy(model)
    twin.tie_weights()
    loading.quantise_model(twin, kind)
    return model, twin


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=QUANTISED)
def pair(request):
    return make(request.param)


def windows():
    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(3, 512, (4, 24), generator=generator), PROMPT)


def steps(model, tokens):
    """Logits of decode steps after a prompt, (B, STEPS, V)."""
    out = model(input_ids=tokens[:, :PROMPT], use_cache=True)
    seen = []
    for t in range(PROMPT, PROMPT + STEPS):
        out = model(input_ids=tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
        seen.append(out.logits)
    return torch.cat(seen, 1)


def test_every_linear_and_the_table_are_blocks(pair):
    model, twin = pair
    kind = weight_format(twin)
    linears = [m for m in twin.modules() if isinstance(m, QuantisedLinear)]
    assert len(linears) == 15 and not any(type(m) is torch.nn.Linear for m in twin.modules())
    table, head = twin.get_input_embeddings(), twin.get_output_embeddings()
    assert (
        isinstance(table, QuantisedEmbedding)
        and head.blocks.tensors[0].data_ptr() == table.blocks.tensors[0].data_ptr()
    )
    expected = named(kind).store(model.model.layers[1].mlp.down_proj.weight).values()
    assert torch.equal(twin.model.layers[1].mlp.down_proj.weight, expected)
    assert weight_format(model) is None
    bytes_ = accounting.dense_step_bytes(twin, dissect.dissect(twin))
    numbers = sum(p.numel() for n, p in model.named_parameters() if "norm" not in n)
    per = {"q8_0": 34 / 32, "q4_0": 18 / 32}[kind]
    assert bytes_ == pytest.approx(numbers * per + 256 * per + 5 * 256 * 4, abs=1)


@pytest.mark.parametrize("method", METHODS)
def test_skipping_is_what_masking_says(pair, method):
    """Under the same levels the kernels, which round x to 8 bits, and a masked pass, which does not, differ by that alone."""
    if kernels.cpu.unavailable() is not None:
        pytest.skip(kernels.cpu.unavailable())
    _, twin = pair
    plan = calibrate(twin, moyu.method(method), windows(), sparsity=0.5)
    tokens = windows().tokens[:3, : PROMPT + STEPS]
    mask, levels = torch.ones_like(tokens), Recorder()
    masked = one_pass(twin, plan, tokens, mask, recorder=levels)
    native = stepwise(twin, plan, tokens, mask, backend="auto", chooser=Replayer(levels))
    explained = rounding(twin, weight_format(twin))
    assert_near(native[:, PROMPT:], masked[:, PROMPT:], explained, "steps and one masked pass")
    steps_from_one_cache(twin, plan, tokens, mask, levels).check(twin, weight_format(twin), method)


@pytest.mark.parametrize("method", ["teal", "griffin"])
def test_afterwards_everything_is_as_before(pair, method):
    _, twin = pair
    before = {name: t.clone() for name, t in twin.state_dict().items()}
    plan = calibrate(twin, moyu.method(method), windows(), sparsity=0.5)
    with Applied(twin, plan):
        while_applied = twin.state_dict()
        assert all(torch.equal(while_applied[n], t) and while_applied[n].is_contiguous() for n, t in before.items())
    after = twin.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[n], t) for n, t in before.items())


def test_casts_and_copies_keep_working(pair):
    _, twin = pair
    plan = calibrate(twin, moyu.method("griffin"), windows(), sparsity=0.5)
    tokens = windows().tokens[:1]
    with torch.no_grad():
        with Applied(twin, plan) as applied, applied.prompt(PROMPT):
            expected = steps(twin, tokens)
            twin.state_dict()  # packs: the next step lays out again
            assert torch.equal(steps(twin, tokens), expected)
            other = copy.deepcopy(twin)
        with Applied(copy.deepcopy(twin).to(torch.bfloat16), None) as applied, applied.prompt(PROMPT):
            assert steps(applied.model, tokens).dtype == torch.bfloat16
    assert other is not twin


def test_plans_know_what_weights_they_are_for(pair, tmp_path):
    model, twin = pair
    plan = calibrate(twin, moyu.method("griffin"), windows(), sparsity=0.5)
    plan = Plan.load(plan.save(tmp_path))
    assert plan.model["weight_format"] == weight_format(twin)
    with pytest.raises(UserError, match="weights in q"):
        moyu.apply(model, plan)
    with Applied(twin, plan):
        pass
    own = calibrate(model, moyu.method("griffin"), windows(), sparsity=0.5)
    with pytest.raises(UserError, match="these are in q"):
        moyu.apply(twin, own)
