"""Native decode steps: the same numbers, tokens and bytes as the general path, and never where they would be wrong."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from equality import (
    DTYPES,
    anatomy_of,
    applied_to,
    assert_near,
    has_sites,
    one_pass,
    padded,
    rounding,
    steps_from_one_cache,
)
from moyu import kernels, methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.choosers import Recorder
from moyu.kernels import cpu
from moyu.measure.windows import Windows
from moyu.methods.needs import needs
from moyu.model import dissect, loading, zoo
from moyu.plan import Plan
from tiny import GATED, WIDE, build, tokens

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")

PLAIN = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED)),
    "llama-biased": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, attention_bias=True, mlp_bias=True)),
    "llama-wide-heads": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, head_dim=24)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDE, **GATED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE, **GATED, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, **GATED, sliding_window=None)),
    "opt-relu": None,
    "opt-gelu": None,
}
WIDE_PROMPT = 12


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make(name, dtype=torch.float32):
    builder = PLAIN.get(name)
    if builder is None:
        return build(name, dtype)
    torch.manual_seed(0)
    model = builder().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    return model.to(dtype)


def plan_for(model, name, **knobs):
    windows, method = Windows(tokens(4, 40), 20), methods.method(name, **knobs)
    return calibrate(model, method, windows, sparsity=0.5, name="tiny", anatomy=anatomy_of(model))


@torch.no_grad()
def decode(model, applied, ids, mask=None, general=False, steps=None):
    """Logits (B, T - P, V) of forced tokens after a dense prompt, and the bytes that the kernels read."""
    end = WIDE_PROMPT if steps is None else steps
    # A hook that does nothing is enough to make every step take the general path.
    handles = [m.register_forward_hook(lambda *_: None) for m in applied.anatomy.layers] if general else []
    try:
        with applied.prompt(end), kernels.count_bytes() as counted:
            cache, logits = DynamicCache(config=model.config), []
            for start, stop in [(0, end)] + [(t, t + 1) for t in range(end, ids.shape[1])]:
                given = {} if mask is None else {"attention_mask": mask[:, :stop]}
                if mask is not None:
                    given["position_ids"] = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:]
                logits.append(model(ids[:, start:stop], past_key_values=cache, use_cache=True, **given).logits)
        return torch.cat(logits[1:], 1), counted
    finally:
        for handle in handles:
            handle.remove()


def assert_native(counted):
    assert counted.by_op.get("decode", 0) > 0, "the step was not native"


def assert_alike(native, general, counted, by_general, tolerance=1e-4):
    """The same logits (B, T - P, V), as decisions of fp32 are, and the same bytes."""
    error = (native - general).abs().amax() / general.abs().max()
    assert error <= tolerance
    assert counted.total == by_general.total


def assert_steps_equal(model, plan, weights, name="estimate", batch=3):
    """Native steps under replayed levels are as exact as general ones; where x is rounded to 8 bits, the same."""
    ids, mask = padded(batch)
    levels = Recorder()
    one_pass(model, plan, ids, mask, recorder=levels)
    steps_from_one_cache(model, plan, ids, mask, levels).check(model, weights, name)


def assert_general(counted):
    assert "decode" not in counted.by_op


# ------------------------------------------------------------------------------------------------------- the same numbers


def quick(structure: str, name: str, batch: int) -> bool:
    """Every method on Llama, and every other structure dense and with every second method, in turns; the rest is slow."""
    if name == "lte":
        return False
    turn = 0 if name == "dense" else [*methods.names()].index(name) + [*PLAIN].index(structure)
    return structure == "llama" or (batch == 1 and turn % 2 == 0)


@pytest.mark.parametrize(
    ("structure", "name", "batch"),
    [
        pytest.param(*case, marks=() if quick(*case) else pytest.mark.slow)
        for case in itertools.product(PLAIN, ["dense", *methods.names()], (1, 3))
    ],
)
def test_native_steps_are_the_general_ones(structure, name, batch):
    model = make(structure)
    plan = None
    if name != "dense":
        if not has_sites(model, methods.method(name)):
            pytest.skip("no site")
        plan = plan_for(model, name)
    ids, mask = padded(batch)
    with applied_to(model, plan) as applied:
        if applied.native is None:
            method = methods.method(name)
            asked = frozenset().union(*(needs(method, site, params) for site, params in plan.parts.values()))
            general = {"top_k", "low_rank", "neurons by score", "neurons by magnitude", "heads by score"}
            assert asked & general, applied.general_because
            assert method.granularity == "token"
            pytest.skip(f"{name} is not native here: {applied.general_because}")
        native, counted = decode(model, applied, ids, mask)
        general, by_general = decode(model, applied, ids, mask, general=True)
    assert_native(counted)
    assert_general(by_general)
    if name == "estimate":  # it rounds x to 8 bits, which what is left in the cache may change
        assert_steps_equal(model, plan, "fp32", batch=batch)
    else:
        assert_alike(native, general, counted, by_general)


@pytest.mark.parametrize("name", ["teal", "was", "cett", "cats", "griffin"])
def test_a_network_of_one_neuron_skips_its_columns(name):
    """Its weights are contiguous by rows and by columns, and only the plan says which of them a step is to skip."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDE, **{**GATED, "intermediate_size": 1})).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    ids, mask = padded(2)
    with Applied(model, plan_for(model, name)) as applied:
        assert applied.native is not None
        native, counted = decode(model, applied, ids, mask)
        general, by_general = decode(model, applied, ids, mask, general=True)
    assert_native(counted)
    assert_alike(native, general, counted, by_general)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("rest", [4, 8])
@pytest.mark.parametrize("weights", [*DTYPES, "q8_0"])
@pytest.mark.parametrize("structure", ["llama-biased", "opt-gelu"])
def test_skipped_columns_are_read_in_few_bits(structure, weights, rest, batch):
    model = make(structure, DTYPES.get(weights, torch.float32))
    if weights not in DTYPES:
        loading.quantise_model(model, weights)
    plan = plan_for(model, "estimate", rest=rest)
    assert all(p.bias is not None for _, p in plan.parts.values())
    assert_steps_equal(model, plan, weights, batch=batch)


@pytest.mark.parametrize("structure", ["llama-biased", "opt-gelu"])
def test_sites_with_settings_and_levels_of_their_own(structure, tmp_path):
    """Dense, without a rest, with one of 4 and one of 8 bits, in one layer; the plan survives a file."""
    model = make(structure)
    sites = [s for b in dissect.dissect(model).all_blocks() for s in methods.method("estimate").sites(b)]
    own = {s.key: methods.method("estimate", rest=(0, 4, 8)[n % 3]) for n, s in enumerate(sites)}
    levels = {s.key: (0.0, 0.3, 0.6, 0.9)[n % 4] for n, s in enumerate(sites)}
    settings = {key: method for key, method in own.items() if method.knobs()["rest"] != 4}
    windows = Windows(tokens(4, 40), 20)
    made = calibrate(model, methods.method("estimate"), windows, sparsity=0.5, levels=levels, settings=settings)
    plan = Plan.load(made.save(tmp_path))
    assert plan.hash == made.hash and plan.settings == made.settings
    for site, params in plan.parts.values():
        assert plan.method_of(site) == own[site.key]
        assert ("rest.quants" in params.buffers) == (own[site.key].knobs()["rest"] > 0)
    assert set(plan.site_knobs) == {"rest=0", "rest=8"} and sum(plan.site_knobs.values()) == len(plan.settings)
    assert_steps_equal(model, plan, "fp32", batch=2)


@pytest.mark.parametrize("name", ["griffin", "cats", "teal"])
def test_plan_biases_are_native(name):
    model = make("llama-biased")
    windows = Windows(tokens(4, 40), 20)
    plan = calibrate(model, methods.method(name), windows, sparsity=0.5, name="tiny")
    generator = torch.Generator().manual_seed(3)

    def biased(site, params):
        width = sum(dissect.dissect(model).blocks[site.layer].pieces[n].shape[0] for n in site.linears)
        width = width if site.skips == "columns" else model.config.hidden_size
        return site, dataclasses.replace(params, bias=torch.randn(width, generator=generator) * 0.1)

    plan = dataclasses.replace(plan, parts={k: biased(*part) for k, part in plan.parts.items()})
    ids, mask = padded(2)
    with Applied(model, plan) as applied:
        native, counted = decode(model, applied, ids, mask)
        general, by_general = decode(model, applied, ids, mask, general=True)
    assert_native(counted)
    assert_alike(native, general, counted, by_general)


@pytest.mark.parametrize("weights", DTYPES)
@pytest.mark.parametrize("name", zoo.names())
def test_embedded_models_decode_natively_in_every_type(name, weights):
    model = loading.load(name, dtype=DTYPES[weights]).model
    ids = torch.randint(3, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    with Applied(model, None) as applied:
        assert applied.general_because is None
        native, counted = decode(model, applied, ids)
        general, _ = decode(model, applied, ids, general=True)
    assert_native(counted)
    assert_near(native, general, 2**0.5 * rounding(model, weights), "native steps and general ones")


def test_generate_natively_gives_the_same_tokens():
    loaded = loading.load("swiglu", dtype=torch.float32)
    ids = loaded.tokenizer("def read(path):\n    ", return_tensors="pt").input_ids
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "temperature": 0.8}):
        found = []
        for backend in ("cpu", "reference"):
            torch.manual_seed(0)
            with Applied(loaded.model, None, backend=backend):
                found.append(loaded.model.generate(ids, max_new_tokens=24, **({"do_sample": False} | options)))
        assert torch.equal(*found), options


def test_the_cache_grows_and_carries_on_without_the_plan():
    """600 native tokens: buffers are replaced on the way; then the dense model goes on from the same cache."""
    model = make("llama")
    ids = tokens(1, 620)
    with torch.no_grad():
        expected = model(ids).logits[:, WIDE_PROMPT:]
        with Applied(model, None) as applied, applied.prompt(WIDE_PROMPT):
            cache = DynamicCache(config=model.config)
            model(ids[:, :WIDE_PROMPT], past_key_values=cache)
            got = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(WIDE_PROMPT, 612)]
        got.append(model(ids[:, 612:], past_key_values=cache).logits)
    assert (torch.cat(got, 1) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_cropped_and_a_copied_cache_keep_their_own_keys():
    model = make("llama")
    ids, other = tokens(1, 30), tokens(1, 30, seed=5)
    with torch.no_grad(), Applied(model, None) as applied, applied.prompt(10):
        cache = DynamicCache(config=model.config)
        model(ids[:, :10], past_key_values=cache)
        for t in range(10, 20):
            model(ids[:, t : t + 1], past_key_values=cache)
        twin = copy.deepcopy(cache)
        twin.crop(-5)
        for t in range(15, 20):  # overwrites its own last five, not the original's
            model(other[:, t : t + 1], past_key_values=twin)
        a = model(ids[:, 20:21], past_key_values=cache).logits
        b = model(ids[:, 20:21], past_key_values=twin).logits
        mixed = torch.cat([ids[:, :15], other[:, 15:20], ids[:, 20:21]], 1)
    with torch.no_grad():
        for got, sequence in ((a, ids[:, :21]), (b, mixed)):
            expected = model(sequence).logits[:, -1:]
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_threads_decode_with_one_model():
    model = make("llama")
    batches = [tokens(1, 30, seed=seed) for seed in range(4)]
    with Applied(model, plan_for(model, "griffin")) as applied:
        alone = [decode(model, applied, ids)[0] for ids in batches]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda ids: decode(model, applied, ids)[0], batches))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.parametrize("name", ["teal", "estimate"])
def test_several_threads_of_the_kernel_give_one_result(name):
    model = make("llama")
    torch.set_num_threads(3)
    try:
        assert_steps_equal(model, plan_for(model, name), "fp32", name)
    finally:
        torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------- never where it is wrong


def test_hidden_states_are_those_of_every_layer():
    model = make("llama")
    with torch.no_grad(), Applied(model, None) as applied, applied.prompt(4):
        cache = model(tokens(1, 4)).past_key_values
        hidden = model(tokens(1, 5)[:, 4:], past_key_values=cache, output_hidden_states=True).hidden_states
    with torch.no_grad():
        expected = model(tokens(1, 5), output_hidden_states=True).hidden_states
    assert len(hidden) == len(expected)
    assert all((h - e[:, -1:]).abs().max() < 1e-4 for h, e in zip(hidden, expected, strict=True))


def test_a_replaced_module_and_a_patched_forward_are_obeyed():
    model = make("llama")
    with Applied(model, None) as applied:
        first, counted = decode(model, applied, tokens(1, 20))
        assert_native(counted)
        attention = model.model.layers[1].self_attn
        inner = attention.forward
        attention.forward = lambda *a, **k: (inner(*a, **k)[0] * 0, None)
        patched, counted = decode(model, applied, tokens(1, 20))
        assert_general(counted)
        assert not torch.allclose(first, patched)
        del attention.forward
        again, counted = decode(model, applied, tokens(1, 20))
        assert_native(counted)
        assert torch.equal(first, again)
        norm = model.model.layers[0].input_layernorm
        model.model.layers[0].input_layernorm = torch.nn.Identity()
        replaced, counted = decode(model, applied, tokens(1, 20))
        assert_general(counted)
        assert not torch.allclose(first, replaced)
        model.model.layers[0].input_layernorm = norm


def steps_whole(model, **kwargs):
    """Whether a decode step goes from ids to logits natively: then no product is left for the kernels' own `rows`."""
    with Applied(model, None) as applied:
        native, counted = decode(model, applied, tokens(2, 20), **kwargs)
        general, _ = decode(model, applied, tokens(2, 20), general=True)
    assert_native(counted)
    assert (native - general).abs().max() <= 1e-4 * general.abs().max()
    return "rows" not in counted.by_op


@pytest.mark.parametrize("structure", PLAIN)
def test_steps_go_from_ids_to_logits_where_that_is_proved(structure):
    assert steps_whole(make(structure)) is not structure.startswith(
        "opt"
    )  # OPT adds learned positions to its embeddings


@pytest.mark.parametrize("scaling", ["llama3", "dynamic"])
def test_angles_that_change_with_the_length_are_the_models_own(scaling):
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling == "llama3" else {}
    rope = {"rope_type": scaling, "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 16} | extra
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, rope_parameters=rope)).eval()
    assert steps_whole(model) is (scaling == "llama3")


@pytest.mark.parametrize("watched", ["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb", "model"])
def test_hooks_around_the_layers_are_called(watched):
    model, seen = make("llama"), []
    model.get_submodule(watched).register_forward_hook(lambda *_: seen.append(1))
    with Applied(model, None) as applied:
        decode(model, applied, tokens(1, 20))
    assert len(seen) >= 20 - WIDE_PROMPT


def test_casting_and_copying_take_the_new_weights():
    model = make("llama")
    plan = plan_for(model, "griffin")
    with Applied(model, plan) as applied:
        before, _ = decode(model, applied, tokens(1, 20))
        twin = copy.deepcopy(model)
        model.to(torch.bfloat16)
        cast, counted = decode(model, applied, tokens(1, 20))
        assert_native(counted)
        assert (cast.float() - before).norm() / before.norm() < 5e-2
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        with torch.no_grad(), kernels.count_bytes():
            ids = twin.generate(tokens(1, 6), max_new_tokens=6, do_sample=False, eos_token_id=None)
    expected = make("llama")
    with Applied(expected, plan):
        assert torch.equal(ids, expected.generate(tokens(1, 6), max_new_tokens=6, do_sample=False, eos_token_id=None))


@pytest.mark.parametrize("token", [-1, 128, 10**9])
def test_ids_outside_the_vocabulary_raise_and_leave_the_cache_as_it_was(token):
    model = make("llama")
    ids = tokens(2, 14)
    with torch.no_grad(), Applied(model, None) as applied, applied.prompt(WIDE_PROMPT):
        cache = model(ids[:, :WIDE_PROMPT], past_key_values=DynamicCache(config=model.config)).past_key_values
        model(ids[:, WIDE_PROMPT : WIDE_PROMPT + 1], past_key_values=cache)
        with pytest.raises(IndexError, match=f"token id of row 1 is {token}"):
            model(torch.tensor([[3], [token]]), past_key_values=cache)
        got = model(ids[:, WIDE_PROMPT + 1 :], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits[:, -1:]
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_updated_weights_are_read():
    """Pointers are those of the live parameters: a step after an update in place sees it."""
    model = make("llama")
    with Applied(model, None) as applied:
        before, _ = decode(model, applied, tokens(1, 16))
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(2)
            model.model.layers[2].input_layernorm.weight.mul_(1.5)
        native, counted = decode(model, applied, tokens(1, 16))
        general, _ = decode(model, applied, tokens(1, 16), general=True)
    assert_native(counted)
    assert not torch.allclose(native, before)
    assert (native - general).abs().max() <= 1e-4 * general.abs().max()


def test_a_sliding_window_is_kept():
    """Past the window: by a sliding cache, and by a plain cache whose mask closes the old positions."""
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**WIDE, **GATED, sliding_window=8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.1)
    ids = tokens(1, 40)
    with torch.no_grad():
        expected = model(ids).logits[:, WIDE_PROMPT:]
        with Applied(model, None) as applied, applied.prompt(WIDE_PROMPT):
            for cache in (DynamicCache(config=model.config), DynamicCache()):
                model(ids[:, :WIDE_PROMPT], past_key_values=cache)
                got = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(WIDE_PROMPT, 40)]
                assert (torch.cat(got, 1) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_layers_that_are_not_plain_take_the_general_path():
    torch.manual_seed(0)
    for model in (build("gpt2", torch.float32), build("phi3", torch.float32), build("mixtral", torch.float32)):
        with Applied(model, None) as applied:
            assert applied.native is None and applied.general_because
            logits, counted = decode(model, applied, tokens(1, 20))
        assert_general(counted)
        with torch.no_grad():
            expected = model(tokens(1, 20)).logits[:, WIDE_PROMPT:]
        assert (logits - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_a_layer_that_computes_something_else_is_not_plain():
    """Each of these has the parts of a plain layer and is none: the proof must see it in numbers."""

    def scaled(layer):
        inner = layer.forward
        layer.forward = lambda *a, **k: inner(*a, **k) * 1.05

    def half_attention(layer):
        inner = layer.self_attn.forward
        layer.self_attn.forward = lambda *a, **k: (inner(*a, **k)[0] * 0.5, None)

    def unscaled(layer):
        layer.self_attn.scaling *= 0.5

    for change, plain in ((scaled, False), (half_attention, False), (unscaled, True)):
        model = make("llama")
        change(model.model.layers[1])
        with Applied(model, None) as applied:
            assert (applied.native is not None) == plain, change.__name__


@pytest.mark.parametrize("weights", [*DTYPES, "q8_0", "q4_0"])
def test_a_part_that_is_a_little_off_is_not_plain(weights):
    """The proof's tolerance is what rounding explains: 4 % more attention is not taken for it, in any type."""
    for factor, plain in ((1.04, False), (1.0, True)):
        model = make("llama", DTYPES.get(weights, torch.float32))
        if weights not in DTYPES:
            loading.quantise_model(model, weights)
        attention = model.model.layers[1].self_attn
        inner = attention.forward
        attention.forward = lambda *a, inner=inner, factor=factor, **k: (inner(*a, **k)[0] * factor, None)
        with Applied(model, None) as applied:
            assert (applied.native is not None) is plain, applied.general_because


def test_something_between_the_layers_is_seen():
    model = make("llama")

    class Doubling(type(model.model.layers[1])):
        def __call__(self, hidden, *args, **kwargs):
            return super().__call__(hidden * 2, *args, **kwargs)

    model.model.layers[1].__class__ = Doubling
    with Applied(model, None) as applied:
        assert applied.native is None and applied.general_because == "something comes between its layers"


def test_gelu_is_not_taken_for_relu_in_bfloat16():
    blocks = dissect.dissect(loading.load("gelu", dtype=torch.bfloat16).model).blocks
    assert {block.act for block in blocks} == {"gelu"}
