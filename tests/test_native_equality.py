"""Native steps inside the equality: under replayed levels they, general steps and one masked pass agree within rounding."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import torch

from equality import (
    PROMPT,
    QUICK,
    WEIGHTS,
    assert_near,
    assert_same_masks,
    built,
    call,
    exact,
    general_steps,
    has_sites,
    one_pass,
    padded,
    plan_for,
    rounding,
    rounds_x,
    steps_from_one_cache,
    stepwise,
)
from moyu import kernels, methods
from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Recorder, Replayer
from moyu.engine.steps.layers import PlainLayer
from moyu.kernels import cpu
from moyu.weights import QUANTISED

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")

# Methods whose decode steps are native; the others decide by more than a magnitude, or anew for each token in their own way.
NATIVE = (
    "cats",
    "cett",
    "chess",
    "clada",
    "countdown",
    "estimate",
    "griffin",
    "levels",
    "popularity",
    "relu-zero",
    "shortlist",
    "static-norm",
    "tda",
    "teal",
    "was",
)
CASES = [
    (name, weights, batch)
    for name in methods.names()
    for weights in (QUANTISED if methods.method_class(name).quantised_only else WEIGHTS)
    for batch in (1, 3)
]


def quick(name: str, weights: str, batch: int) -> bool:
    """One case a method, so that all weights come often; the rest is slow."""
    n = methods.names().index(name)
    if methods.method_class(name).quantised_only:
        return batch == 3
    return weights == WEIGHTS[n % len(WEIGHTS)] and batch == (1 if n % 5 == 4 else 3)


def cases(names):
    return [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow, id="-".join(map(str, case)))
        for case in CASES
        if case[0] in names
    ]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planned(name: str, weights: str):
    """A tiny model that has sites for the method, and its plan."""
    method = methods.method(name, **QUICK.get(name, {}))
    model = next(m for s in ("llama", "reglu") if has_sites(m := built(s, weights), method))
    return model, plan_for(model, method)


@pytest.mark.parametrize(("name", "weights", "batch"), cases(methods.names()))
def test_three_ways_agree_under_replayed_levels(name, weights, batch):
    model, plan = planned(name, weights)
    ids, mask = padded(batch)
    levels = Recorder()
    masked = one_pass(model, plan, ids, mask, recorder=levels)
    with kernels.count_bytes() as counted:
        steps = stepwise(model, plan, ids, mask, backend="auto", chooser=Replayer(levels))
    assert ("decode" in counted.by_op) is (name in NATIVE)
    sparse = mask.bool()
    sparse[:, :PROMPT] = False
    # Two ways, each with all of the roundings; those of x to 8 bits only where kernels run.
    most = 2**0.5 * rounding(model, weights, thinned=rounds_x(weights, name))
    assert_near(steps[sparse], masked[sparse], most, "steps and one masked pass")
    if name in NATIVE:
        with Applied(model, plan) as applied, general_steps(applied), kernels.count_bytes() as counted:
            general = run_steps(model, applied, ids, mask, Replayer(levels))
        assert "decode" not in counted.by_op
        assert_near(steps[sparse], general[sparse], most, "native steps and general ones")


@torch.no_grad()
def run_steps(model, applied, ids, mask, chooser):
    with applied.prompt(PROMPT), applied.watched(chooser=chooser):
        out = call(model, ids, mask, 0, PROMPT)
        logits = [out.logits]
        for t in range(PROMPT, ids.shape[1]):
            out = call(model, ids, mask, t, t + 1, out.past_key_values)
            logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize(("name", "weights", "batch"), cases(NATIVE))
def test_every_native_step_is_as_exact_as_the_general_one(name, weights, batch):
    model, plan = planned(name, weights)
    ids, mask = padded(batch)
    levels = Recorder()
    one_pass(model, plan, ids, mask, recorder=levels)
    steps_from_one_cache(model, plan, ids, mask, levels).check(model, weights, name)


@pytest.mark.parametrize("name", ["teal", "cats", "griffin"])
def test_native_steps_tell_the_levels_that_they_took(name):
    """The same levels that general steps record, under the same keys; and what counts them counts the same."""
    model, plan = planned(name, "fp32")
    ids, mask = padded(3)
    native, general, counters = Recorder(), Recorder(), []
    with kernels.count_bytes() as counted:
        stepwise(model, plan, ids, mask, backend="auto", recorder=native)
    assert "decode" in counted.by_op
    with Applied(model, plan) as applied:
        with general_steps(applied):
            run_steps(model, applied, ids, mask, general)
        for _ in range(2):
            counters.append(Counter(*ids.shape))
            with general_steps(applied) if len(counters) == 2 else kernels.count_bytes():
                run_steps(model, applied, ids, mask, counters[-1])
    assert_same_masks(native, general)
    assert counters[0].skipped_bytes == counters[1].skipped_bytes > 0
    assert counters[0].sparsity_by_layer == counters[1].sparsity_by_layer


@pytest.mark.parametrize("name", ["teal", "cats"])
def test_the_mask_of_a_network_of_one_neuron_is_applied(name):
    model = built("one neuron", "fp32")
    plan = plan_for(model, methods.method(name))
    ids, mask = padded(3)
    levels, own = Recorder(), Recorder()
    one_pass(model, plan, ids, mask, recorder=levels)
    stepwise(model, plan, ids, mask, backend="auto", recorder=own)
    assert_same_masks(own, levels)
    down = torch.cat([bits.view(-1) for key, masks in levels.masks.items() if "down" in key for bits in masks.values()])
    assert 0 < int(down.sum()) < len(down)  # the neuron is sometimes skipped
    steps_from_one_cache(model, plan, ids, mask, levels).check(model, "fp32", name)


# ---------------------------------------------------------------------------------------------- a wrong constant is noticed


def kept(held, tensor):
    held.append(tensor)
    return tensor.data_ptr()


def attention_scale(layer, native, held):
    native.scale *= 1.02


def weight_scale(layer, native, held):
    piece = layer.block.pieces["up"]
    if piece.blocks is not None:
        _codes, scales = piece.blocks.tensors
        native.up.scales = kept(held, (scales.float() * 1.02).half())
    else:
        weight = piece.weight.detach() * 1.02
        native.up.weight = kept(held, weight.t().contiguous() if native.up.by_columns else weight.contiguous())
        native.up.stride = weight.shape[0 if native.up.by_columns else 1]


def bias(layer, native, held):
    native.q.bias = kept(held, layer.block.pieces["q"].bias.detach() * 1.1)


def norm_scale(layer, native, held):
    native.before_network.weight = kept(held, layer.norms["before_network"].module.weight.detach() * 1.02)


CORRUPTIONS = (attention_scale, weight_scale, bias, norm_scale)


@pytest.fixture(scope="module")
def sharp():
    """A model in which no constant is idle, by weights: with a plan, a padded batch and its recorded levels."""
    made = {}

    def get(weights):
        if weights not in made:
            model = built("sharp", weights)
            plan = plan_for(model, methods.method("teal"))
            ids, mask = padded(3)
            levels = Recorder()
            one_pass(model, plan, ids, mask, recorder=levels)
            made[weights] = model, plan, ids, mask, levels
        return made[weights]

    return get


def corrupt(monkeypatch, change):
    """Let the native step, and nothing else, have what `change` makes of each layer. The proof comes before."""
    original = PlainLayer.native

    def native(self, masked=True, kept=None, **reads):
        layer = original(self, masked, kept, **reads)
        if kept is not None:
            change(self, layer, kept)
        return layer

    monkeypatch.setattr(PlainLayer, "native", native)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_right_constant_passes(sharp, weights):
    model, *rest = sharp(weights)
    steps_from_one_cache(model, *rest).check(model, weights, "teal")


@pytest.mark.parametrize("change", CORRUPTIONS, ids=lambda change: change.__name__)
@pytest.mark.parametrize(
    "weights", [w if w in ("fp32", "q4_0") else pytest.param(w, marks=pytest.mark.slow) for w in WEIGHTS]
)
def test_a_wrong_constant_is_noticed(sharp, weights, change, monkeypatch):
    if weights == "bf16" and change is attention_scale:
        pytest.skip("2 % of it move the logits by less than rounding; the next test sees it")
    model, *rest = sharp(weights)
    corrupt(monkeypatch, change)
    steps = steps_from_one_cache(model, *rest)
    with pytest.raises(AssertionError, match=r"apart|within"):
        steps.check(model, weights, "teal")


def attention_scale_found(sharp, weights: str) -> float:
    """By how much the attention's scale of native steps is off, from their logits' error along what 2 % more would change."""
    model, plan, ids, mask, levels = sharp(weights)
    steps = steps_from_one_cache(model, plan, ids, mask, levels)
    twin = exact(model)
    for layer in twin.model.layers:
        layer.self_attn.scaling *= 1.02
    changed = steps_from_one_cache(model, plan, ids, mask, levels, twin=twin).exact
    direction = changed - steps.exact
    return 0.02 * float(((steps.native - steps.exact) * direction).sum() / direction.square().sum())


@pytest.mark.parametrize("wrong", [False, True])
def test_the_attention_scale_of_16_bit_steps(sharp, wrong, monkeypatch):
    if wrong:
        corrupt(monkeypatch, attention_scale)
    assert abs(attention_scale_found(sharp, "bf16") - 0.02 * wrong) < 0.01


@pytest.mark.parametrize("weights", WEIGHTS)
def test_one_flipped_unit_is_noticed(sharp, weights):
    model, plan, ids, mask, levels = sharp(weights)
    flipped = copy.deepcopy(levels)
    for masks in flipped.masks[next(key for key in levels.masks if "o" in key)].values():
        masks[int(masks.nonzero()[0])] = False
    steps = steps_from_one_cache(model, plan, ids, mask, levels, native_recorder=flipped)
    with pytest.raises(AssertionError, match=r"apart|within"):
        steps.check(model, weights, "teal")


# --------------------------------------------------------------------------------------------------- every instruction set

ISA_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[2])
import torch
from equality import QUANTISED, DTYPES, built, one_pass, padded, plan_for, steps_from_one_cache
from moyu import methods
from moyu.engine.choosers import Recorder
from moyu.kernels import cpu
assert cpu.extension().isa() == sys.argv[1]
torch.set_num_threads(1)
for weights in (*DTYPES, *QUANTISED):
    for name in ("teal", "cats", "griffin", "estimate"):
        model = built("sharp", weights)
        plan, levels = plan_for(model, methods.method(name)), Recorder()
        one_pass(model, plan, *padded(3), recorder=levels)
        try:
            steps_from_one_cache(model, plan, *padded(3), levels).check(model, weights, name)
        except AssertionError as error:
            sys.exit(f"{weights} {name}: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx512bf16", "avx512vnni", "avx512", "avxvnni", "avx2", "portable"])
def test_each_instruction_set_decodes(isa):
    if isa not in cpu.extension().isas():
        pytest.skip(f"this CPU or build has no {isa}")
    environment = os.environ | {"MOYU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = [sys.executable, "-c", ISA_PROGRAM, isa, os.path.dirname(__file__)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
