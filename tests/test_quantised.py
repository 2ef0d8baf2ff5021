"""Models whose weights are blocks: plans on top of them, native steps, byte counts, and what is left afterwards."""

import copy

import pytest
import torch

import moyu
from moyu import kernels
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
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
            parameter.data.mul_(5)
    twin = copy.deepcopy(model)
    twin.tie_weights()
    loading.quantise_model(twin, kind)
    return model, twin


@pytest.fixture(scope="module", params=QUANTISED)
def pair(request):
    return make(request.param)


def windows():
    generator = torch.Generator().manual_seed(0)
    return Windows(torch.randint(3, 512, (4, 24), generator=generator), PROMPT)


def steps(model, tokens):
    """Logits of decode steps after a prompt, (B, STEPS, V)."""
    return counted_steps(model, tokens)[0]


def counted_steps(model, tokens):
    """The same, and what the steps read, by operator."""
    out = model(input_ids=tokens[:, :PROMPT], use_cache=True)
    seen = []
    with kernels.count_bytes() as counter:
        for t in range(PROMPT, PROMPT + STEPS):
            out = model(input_ids=tokens[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            seen.append(out.logits)
    return torch.cat(seen, 1), counter.by_op


def near(a, b, most):
    error = (a - b).norm() / b.norm()
    assert error <= most, f"relative error {error:.3g}"


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
@pytest.mark.parametrize("batch", [1, 3])
def test_skipping_is_what_masking_says(pair, method, batch):
    """Masked products see x as it is and the kernels round it to 8 bits: errors of rounding, and no more."""
    _, twin = pair
    anatomy = dissect.dissect(twin)
    plan = calibrate(twin, moyu.method(method), windows(), sparsity=0.5, anatomy=anatomy)
    tokens = windows().tokens[:batch]
    with torch.no_grad():
        with Applied(twin, plan, engine="mask") as applied, applied.prompt(PROMPT):
            masked = steps(twin, tokens)
        with Applied(twin, plan) as applied, applied.prompt(PROMPT):
            skipped, read = counted_steps(twin, tokens)
            general = applied.general_because
        with Applied(twin, None) as applied, applied.prompt(PROMPT):
            dense = steps(twin, tokens)
    if method in ("griffin", "popularity"):  # masks that no rounding moves
        near(skipped, masked, 0.2)
    near(skipped, masked, 0.5 * float((dense - masked).norm() / masked.norm()))
    if kernels.cpu.unavailable() is None:
        assert general is None and "decode" in read


def test_native_steps_are_the_general_ones(pair, monkeypatch):
    """The same integer kernels, called from Python for each linear: equal to 1e-6 until a value on the edge of two integers
    falls to the other side, which this model makes up to .1 of."""
    if kernels.cpu.unavailable() is not None:
        pytest.skip(kernels.cpu.unavailable())
    _, twin = pair
    plan = calibrate(twin, moyu.method("griffin"), windows(), sparsity=0.5)
    tokens = windows().tokens[:1]
    with torch.no_grad():
        with Applied(twin, plan) as applied, applied.prompt(PROMPT):
            native, read = counted_steps(twin, tokens)
        monkeypatch.setattr("moyu.engine.steps.plain_run", lambda applied: (None, "for this test"))
        with Applied(twin, plan) as applied, applied.prompt(PROMPT):
            general, apart = counted_steps(twin, tokens)
    near(native, general, 0.2)
    assert "decode" in read and "decode" not in apart and sum(read.values()) == sum(apart.values())


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
