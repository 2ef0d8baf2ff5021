"""GGUF files become the models that they hold: values bit for bit, in transformers' order, or the reason why not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import gguf_files as parts
from moyu import Applied, UserError, calibrate, load, methods
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import loading, zoo
from moyu.model.architectures import ARCHITECTURES
from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read
from tiny import IDS, tokens

WIDE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "head_dim": 16, **IDS,
}  # fmt: skip
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, tie_word_embeddings=True)),
    "biased": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, attention_bias=True, mlp_bias=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in WIDE.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**WIDE | {"head_dim": 32}, tie_word_embeddings=True)),
}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def build(name: str) -> Any:
    """A tiny model of random weights, norms and biases included."""
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else parameter.data.add_(
            0.1 * torch.randn_like(parameter)
        )
    return model


def blocks(values: torch.Tensor, kind: str) -> np.ndarray:
    """What llama.cpp's own package makes of a matrix."""
    return ggml.quants.quantize(values.detach().float().numpy(), ggml.GGMLQuantizationType[kind])


def tensors_of(model: Any, kind: str, names=parts.name_of, add: float = 0.0) -> dict[str, Any]:
    """The model's tensors in a file whose matrices are of one type."""
    found = {}
    for parameter, weight in model.named_parameters():
        value, own = parts.as_stored(model, parameter), kind if weight.dim() == 2 else "F32"
        value = value + add if parameter.endswith("norm.weight") else value
        data = blocks(value, own).tobytes() if own[0] == "Q" else parts.stored(value, own)
        found[names(parameter)] = (own, tuple(weight.shape), data)
    return found


def as_kept(model: Any, kind: str) -> Any:
    """The model in float32 with the values that a file of that type keeps."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            value = parameter.data
            if kind[0] == "Q":
                value = torch.from_numpy(ggml.quants.dequantize(blocks(value, kind), ggml.GGMLQuantizationType[kind]))
            parameter.data = value.to({"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)).float()
    return model


@pytest.fixture(scope="module", autouse=sys.platform == "linux")
def _little_memory():
    with parts.little_memory():
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One file, written again and again."""
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def write(place: Path, metadata: dict[str, Any], content: dict[str, Any]) -> Path:
    """Write a file; one that is mapped stays as it was."""
    place.unlink(missing_ok=True)
    place.write_bytes(parts.file_of(metadata, content))
    return place


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in BUILDERS for k in KINDS if n == "tied" or k in ("F16", "Q4_0")]
)
def test_a_model_is_what_the_file_holds(place, name, kind):
    model = build(name)
    file = read(write(place, parts.metadata_of(model), tensors_of(model, kind)))
    loaded, expected = load_model(file, torch.float32), as_kept(model, kind)
    for parameter, value in expected.named_parameters():
        module, _, part = parameter.rpartition(".")
        assert torch.equal(getattr(loaded.get_submodule(module), part), value), parameter
    ids = tokens(2, 12)
    assert torch.equal(loaded(ids).logits, expected(ids).logits)
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert load_model(file).dtype == own
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    if kind[0] == "Q" and model.config.tie_word_embeddings:
        assert loaded.lm_head.blocks.tensors[0].data_ptr() == loaded.model.embed_tokens.blocks.tensors[0].data_ptr()


def test_types_may_differ_between_matrices(place):
    model = build("llama")
    content = tensors_of(model, "Q4_0")
    for name in list(content):
        if "ffn_down" in name:
            content[name] = tensors_of(model, "F16")[name]
    loaded = load_model(read(write(place, parts.metadata_of(model), content)))
    down = model.model.layers[0].mlp.down_proj.weight
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded.model.layers[0].mlp.down_proj.weight, down.half().float())


def test_gemma_2(place):
    torch.manual_seed(0)
    config = Gemma2Config(**WIDE | {"head_dim": 32}, sliding_window=8, query_pre_attn_scalar=32)
    model = Gemma2ForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    names = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}

    def name_of(parameter: str) -> str:
        for ours, theirs in (names | {"post_feedforward_layernorm": "post_ffw_norm"}).items():
            if ours in parameter:
                return f"blk.{parameter.split('.')[2]}.{theirs}.weight"
        return parts.name_of(parameter)

    said = parts.metadata_of(model) | {"gemma2.attention.sliding_window": 8}
    for kind in ("F32", "Q8_0"):
        file = read(write(place, said, tensors_of(model, kind, name_of, add=1.0)))
        loaded, expected = load_model(file), as_kept(model, kind)
        ids = tokens(1, 24)
        torch.testing.assert_close(loaded(ids).logits, expected(ids).logits)


def test_a_new_architecture_is_one_object_and_one_line(place, monkeypatch):
    """A Llama whose file has another name for one norm, adds 0.5 to the weights of norms and keeps rows in their own order."""
    toy = Architecture(
        "toy",
        config=lambda told: {"model_type": "llama", "rope_parameters": rope(told)},
        layer={("first_norm" if name == "attn_norm" else name): module for name, module in LAYER.items()},
        norms_from=0.5,
    )
    model = build("llama")
    said = {key.replace("llama", "toy"): value for key, value in parts.metadata_of(model).items()}
    said["general.architecture"] = "toy"
    content = {}
    for parameter, weight in model.named_parameters():
        value = weight + 0.5 if parameter.endswith("norm.weight") else weight
        name = parts.name_of(parameter).replace("attn_norm", "first_norm")
        content[name] = ("F32", tuple(weight.shape), parts.stored(value, "F32"))
    with pytest.raises(UserError, match="architecture is 'toy'"):
        load_model(read(write(place, said, content)))
    monkeypatch.setitem(ARCHITECTURES, toy.name, toy)
    loaded = load_model(read(write(place, said, content)))
    ids = tokens(2, 12)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


SCALING = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
    "of no type": ({"rope_type": "linear", "factor": 4.0}, {"scaling.factor": 4.0}),
    "of old": ({"rope_type": "linear", "factor": 4.0}, {"scale_linear": 4.0}),
    "none": ({"rope_type": "default"}, {"scaling.type": "none", "scaling.factor": 4.0}),
    "by 0": ({"rope_type": "default"}, {"scaling.factor": 0.0}),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128},
    ),
    "yarn in full": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 20.0, "beta_slow": 2.0,
         "attention_factor": 1.5},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128, "scaling.yarn_beta_fast": 20.0,
         "scaling.yarn_beta_slow": 2.0, "scaling.yarn_attn_factor": 1.25, "scaling.attn_factor": 1.2},
    ),
    "yarn with a multiplier": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 0.5},
        {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 128,
         "scaling.yarn_log_multiplier": 0.5},
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192}, {},
    ),
}  # fmt: skip


def scaled(kind: str) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A model whose rotary embedding is scaled, and its file's metadata and tensors."""
    torch.manual_seed(0)
    ours, theirs = SCALING[kind]
    config = LlamaConfig(**WIDE | {"head_dim": 64}, rope_parameters={"rope_theta": 500000.0, **ours})
    model = LlamaForCausalLM(config).eval()
    said = parts.metadata_of(model) | {f"llama.rope.{key}": value for key, value in theirs.items()}
    content = tensors_of(model, "F32")
    if kind == "llama3":
        plain = 500000.0 ** -(torch.arange(32) / 32)
        divisors = plain / model.model.rotary_emb.inv_freq
        content["rope_freqs.weight"] = ("F32", (32,), parts.stored(divisors, "F32"))
    return model, said, content


@pytest.mark.parametrize("kind", SCALING)
def test_scaled_rotary_embeddings(place, kind):
    model, said, content = scaled(kind)
    loaded = load_model(read(write(place, said, content)))
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq, rtol=1e-5, atol=0)
    assert loaded.model.rotary_emb.attention_scaling == pytest.approx(
        model.model.rotary_emb.attention_scaling, rel=1e-6
    )
    ids = tokens(1, 96)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-4)


def test_divisors_of_another_scaling_are_refused(place):
    _, said, content = scaled("llama3")
    content["rope_freqs.weight"] = ("F32", (32,), parts.stored(torch.linspace(1, 8, 32), "F32"))
    with pytest.raises(UserError, match="not Llama 3's scaling"):
        load_model(read(write(place, said, content)))


TINY = build("tied")
SAID, HELD = parts.metadata_of(TINY), tensors_of(TINY, "Q8_0")
NEEDED = [k for k in SAID if "kv" not in k and "key_length" not in k and "freq_base" not in k and k.count(".") > 1]


@pytest.mark.parametrize("key", ["general.architecture", *NEEDED])
def test_missing_metadata_are_named(place, key):
    with pytest.raises(UserError, match=f"the metadata lack {key}"):
        load_model(read(write(place, {k: v for k, v in SAID.items() if k != key}, HELD)))


WRONG = {
    "architecture": ({"general.architecture": "bloom"}, {}, "architecture is 'bloom'; MOYU supports llama"),
    "a part": ({"split.count": 3}, {}, "one of 3 parts of a model: its name must end in -00001-of-00003.gguf"),
    "experts": ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "has no tensor 'blk.0.ffn_gate.weight'"),
    "a factor": ({"llama.logit_scale": 8.0}, {}, "llama.logit_scale is 8.0, which MOYU does not understand"),
    "a new key": ({"llama.attention.twist": 1}, {}, "llama.attention.twist is 1, which MOYU does not understand"),
    "heads that differ": ({"llama.attention.head_count_kv": np.array([2, 1], "<i4")}, {}, "head_count_kv differs between"),
    "values": ({"llama.attention.value_length": 8}, {}, "keys are 16 wide, but values 8"),
    "type": ({"llama.block_count": "two"}, {}, "llama.block_count is 'two', of the wrong type"),
    "differing": ({"llama.feed_forward_length": np.array([96, 64], "<i4")}, {}, "differs between layers"),
    "zero": ({"llama.attention.head_count": 0}, {}, "head_count is 0, not in 1"),
    "layers": ({"llama.block_count": 2**31 - 1}, {}, "block_count is 2147483647, but the file has tensors of 2 layers"),
    "width": ({"llama.embedding_length": 2**31 - 1}, {}, "has shape|makes no model"),
    "heads": ({"llama.attention.head_count": 2**30}, {}, "makes no model|has shape"),
    "epsilon": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, {}, "epsilon is nan, not a positive number"),
    "odd heads": ({"llama.attention.key_length": 15}, {}, "rotated over a width of 15"),
    "partial rotation": ({"llama.rope.dimension_count": 8}, {}, "rope.dimension_count is 8, but heads are 16 wide"),
    "scaling": ({"llama.rope.scaling.type": "su"}, {}, "'su'; MOYU supports linear, yarn"),
    "no divisors": ({"llama.rope.scaling.type": "longrope"}, {}, "longrope, but there is no tensor rope_factors_long"),
    "attention factor": ({"llama.rope.scaling.attn_factor": 1.5}, {}, "attn_factor is 1.5, which only yarn and longrope"),
    "no token": ({"tokenizer.ggml.bos_token_id": 128}, {}, "bos_token_id is 128, in a vocabulary of 128"),
    "missing": ({}, {"blk.1.attn_q.weight": None}, "no tensor for model.layers.1.self_attn.q_proj.weight"),
    "no embedding": ({}, {"token_embd.weight": None}, "no tensor token_embd.weight"),
    "left over": ({}, {"blk.1.attn_r.weight": HELD["output_norm.weight"]}, "has no tensor 'blk.1.attn_r.weight'"),
    "shape": ({}, {"blk.1.attn_q.weight": HELD["blk.1.attn_k.weight"]}, r"shape \(32, 64\), but the metadata say \(64, 64\)"),
    "a norm of blocks": ({}, {"output_norm.weight": ("Q8_0", (64,), bytes(68))}, "only matrices may be quantised"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_model_is_refused_with_the_reason(place, case):
    said, held, reason = WRONG[case]
    content = {name: value for name, value in (HELD | held).items() if value is not None}
    with pytest.raises(UserError, match=reason):
        load_model(read(write(place, SAID | said, content)))


values = st.one_of(st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32), st.text(max_size=3), st.just([]))


@settings(max_examples=25)
@given(st.dictionaries(st.sampled_from([*SAID, "llama.rope.scaling.type", "llama.vocab_size"]), values, max_size=3))
def test_any_metadata_make_a_model_or_are_refused(place, changed):
    model, refused = parts.outcome(lambda: load_model(read(write(place, SAID | changed, HELD))))
    assert str(place) in refused if model is None else model(tokens(1, 4)).logits.shape == (1, 4, 128)


@pytest.fixture(scope="module")
def small() -> tuple[loading.Loaded, dict[str, Any], dict[str, Any]]:
    """An embedded model whose rows are no multiple of 32 in one matrix, and a file of it with its tokenizer."""
    loaded = load("swiglu")
    held = {**tensors_of(loaded.model, "F16")}
    for parameter, weight in loaded.model.named_parameters():
        if weight.dim() == 2 and weight.shape[1] % 32 == 0:
            name, value = parts.name_of(parameter), parts.as_stored(loaded.model, parameter)
            held[name] = ("Q8_0", tuple(weight.shape), blocks(value, "Q8_0").tobytes())
    return loaded, parts.metadata_of(loaded.model, loaded.tokenizer), held


@pytest.fixture(scope="module")
def from_file(small, tmp_path_factory) -> loading.Loaded:
    """The same from the file."""
    _, said, held = small
    return load(str(write(tmp_path_factory.mktemp("small") / "swiglu.gguf", said, held)))


def test_the_tokenizer_of_a_file_is_the_model_s(small, from_file):
    for document in zoo.corpus.held_out("test", max_bytes=20000):
        ids = from_file.tokenizer(document.text)["input_ids"]
        assert ids == small[0].tokenizer(document.text)["input_ids"]
        assert from_file.tokenizer.decode(ids, skip_special_tokens=True) == document.text
    assert (from_file.tokenizer.bos_token_id, from_file.tokenizer.eos_token_id, from_file.tokenizer.pad_token_id) == (
        1,
        2,
        0,
    )


@settings(max_examples=30)
@given(st.text(max_size=30))
def test_any_text_has_the_model_s_tokens(small, from_file, text):
    assert from_file.tokenizer(text)["input_ids"] == small[0].tokenizer(text)["input_ids"]


def test_weights_in_blocks_are_counted(small, from_file):
    assert accounting.count_weights(from_file.model) == sum(p.numel() for p in small[0].model.parameters())


def test_a_plan_is_for_the_values_of_its_file(place):
    def from_file(kind: str):
        return load_model(read(write(place, SAID, tensors_of(TINY, kind))))

    first = from_file("Q8_0")
    plan = calibrate(first, methods.method("griffin"), Windows(tokens(2, 32), 16), sparsity=0.5, name="tiny")
    texts = []
    for model in (first, from_file("Q8_0")):
        with Applied(model, plan):
            texts.append(model.generate(input_ids=tokens(1, 8), max_new_tokens=8, do_sample=False))
    assert torch.equal(*texts)
    with pytest.raises(UserError, match="this plan was made for"):
        Applied(from_file("Q4_0"), plan)


WORDS = ("a", "b", "ab", "<s>")
TOKENIZER = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": list(WORDS), "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], "<i4"), "tokenizer.ggml.bos_token_id": 3,
}  # fmt: skip
NO_TOKENIZER = {
    "none": ({"model": None}, "no tokenizer in the file"),
    "another kind": ({"model": "rwkv"}, "of kind 'rwkv'; MOYU supports 'llama' and 'gpt2'"),
    "too many": ({"tokens": [str(i) for i in range(129)]}, "129 tokens for an embedding of 128"),
    "twice": ({"tokens": ["a", "b", "ab", "a"]}, "a token comes twice"),
    "no list": ({"tokens": 7}, "tokens is a int, not a list"),
    "types": ({"token_type": np.array([1], "<i4")}, "token_type has 1 values for 4 tokens"),
    "merges of nothing": ({"merges": ["x y"]}, "its tokenizer 'gpt2' cannot be made"),
    "merges of one": ({"merges": ["ab"]}, "merges has 'ab', which is not two tokens"),
    "no scores": ({"model": "llama", "merges": None}, "there is no tokenizer.ggml.scores"),
    "no merges": ({"merges": None}, "there is no tokenizer.ggml.merges"),
    "another cut": ({"pre": "kimi-k2"}, "pre is 'kimi-k2'; MOYU knows default, llama-bpe"),
    "a new key": ({"suppress_tokens": np.array([1], "<i4")}, "tokenizer.ggml.suppress_tokens is not understood"),
    "a nameless BOS": (
        {"bos_token_id": None, "add_bos_token": True},
        "texts get a BOS token, but the file does not name one",
    ),
}


def changed(case: dict[str, Any]) -> dict[str, Any]:
    """Metadata with a changed tokenizer."""
    said = SAID | TOKENIZER | {f"tokenizer.ggml.{key}": value for key, value in case.items()}
    return {key: value for key, value in said.items() if value is not None}


@pytest.mark.parametrize("case", NO_TOKENIZER)
def test_tokenizers_that_cannot_be_made_are_refused(place, case):
    said, reason = NO_TOKENIZER[case]
    with pytest.raises(UserError, match=reason):
        load(str(write(place, changed(said), HELD)))


@settings(max_examples=25)
@given(
    st.fixed_dictionaries({}, optional={
        "model": st.sampled_from(["gpt2", "llama", "t5", ""]), "pre": st.sampled_from(["llama-bpe", "qwen2", "x"]),
        "tokens": st.lists(st.text(max_size=3), max_size=6), "merges": st.lists(st.text("ab <s>", max_size=4), max_size=3),
        "scores": st.just(np.array([0.0, 1.0, -1.0, 0.0], "<f4")), "token_type": st.just(np.array([1, 3, 6, 4], "<i4")),
        "bos_token_id": st.integers(0, 5), "unknown_token_id": st.integers(0, 5), "add_bos_token": st.booleans(),
        "add_space_prefix": st.booleans(),
    })
)  # fmt: skip
def test_any_tokenizer_is_made_or_refused(place, case):
    loaded, refused = parts.outcome(lambda: load(str(write(place, changed(case), HELD))))
    assert str(place) in refused if loaded is None else loaded.tokenizer("ab a<s>")


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(0, 4095), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_damaged_file_is_loaded_or_refused(place, damages):
    data = bytearray(parts.file_of(SAID | TOKENIZER, HELD))
    for at, new in damages:
        data[at : at + len(new)] = new
    place.unlink(missing_ok=True)
    place.write_bytes(data)
    loaded, refused = parts.outcome(lambda: load(str(place)))
    assert loaded is not None or str(place) in refused


def memory_of(name: str) -> int:
    """A figure of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are measured by proc(5)")
def test_loading_takes_little_more_than_the_file(place):
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 256, "num_hidden_layers": 4}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**WIDE | wide))
    held = {}
    for parameter, weight in model.named_parameters():
        kind, size = ("F32", 4 * weight.numel()) if weight.dim() == 1 else ("Q8_0", weight.numel() // 32 * 34)
        held[parts.name_of(parameter)] = (kind, tuple(weight.shape), bytes(size))
    file = read(write(place, parts.metadata_of(model), held))
    del held
    before = memory_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    loaded = load_model(file)
    assert place.stat().st_size > 60 << 20
    assert memory_of("VmHWM") - before < 1.15 * place.stat().st_size
    assert loaded.num_parameters() < 1e5  # norms: everything else is blocks
