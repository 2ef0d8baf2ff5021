"""Each architecture of GGUF files: a tiny random model of transformers, written as llama.cpp's converter writes it, comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf as ggml
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import gguf_files as parts
from moyu import Applied, UserError
from moyu.commands.info import describe
from moyu.engine.cache import KvCache
from moyu.engine.generate import step
from moyu.model.architectures import ARCHITECTURES
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read
from tiny import IDS, tokens

SIZE = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "head_dim": 16, "tie_word_embeddings": False, **IDS,
}  # fmt: skip
Q8 = ggml.GGMLQuantizationType.Q8_0
Pieces = list[tuple[str, Tensor]]


def norms_around(names: dict[str, str] | None = None) -> dict[str, str]:
    """Names of the norms behind attention and feed-forward network."""
    behind = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    return behind | (names or {})


def gate_then_up(value: Tensor) -> Pieces:
    """Stacked gates and ups of experts (E, 2f, d)."""
    half = value.shape[1] // 2
    return [("ffn_gate_exps.weight", value[:, :half]), ("ffn_up_exps.weight", value[:, half:])]


EXPERTS: dict[str, Callable[[Tensor], Pieces]] = {
    "mlp.gate.weight": lambda w: [("ffn_gate_inp.weight", w)],
    "mlp.experts.gate_up_proj": gate_then_up,
    "mlp.experts.down_proj": lambda w: [("ffn_down_exps.weight", w)],
}
SHARED: dict[str, Callable[[Tensor], Pieces]] = {
    f"mlp.shared_expert.{part}_proj.weight": (lambda w, part=part: [(f"ffn_{part}_shexp.weight", w)])
    for part in ("gate", "up", "down")
} | {"mlp.shared_expert_gate.weight": lambda w: [("ffn_gate_inp_shexp.weight", w[0])]}
IN_TURN: dict[str, Callable[[Tensor], Pieces]] = {
    "self_attn.sinks": lambda w: [("attn_sinks.weight", w)],
    "mlp.router.weight": lambda w: [("ffn_gate_inp.weight", w)],
    "mlp.router.bias": lambda w: [("ffn_gate_inp.bias", w)],
    "mlp.experts.gate_up_proj": lambda w: [
        ("ffn_gate_exps.weight", w[..., ::2].transpose(1, 2)), ("ffn_up_exps.weight", w[..., 1::2].transpose(1, 2))
    ],
    "mlp.experts.gate_up_proj_bias": lambda w: [("ffn_gate_exps.bias", w[:, ::2]), ("ffn_up_exps.bias", w[:, 1::2])],
    "mlp.experts.down_proj": lambda w: [("ffn_down_exps.weight", w.transpose(1, 2))],
    "mlp.experts.down_proj_bias": lambda w: [("ffn_down_exps.bias", w)],
}  # fmt: skip
FUSED: dict[str, Callable[[Tensor], Pieces]] = {
    "self_attn.qkv_proj.weight": lambda w: [("attn_qkv.weight", w)],
    "mlp.gate_up_proj.weight": lambda w: [("ffn_up.weight", w)],
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75, "factor": 4.0, "attention_factor": 1.2,
    "long_factor": [2.0 + i for i in range(6)], "short_factor": [1.0 + i / 9 for i in range(6)],
    "original_max_position_embeddings": 128,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 150000.0, "factor": 4.0, "original_max_position_embeddings": 128, "truncate": False,
    "beta_fast": 32.0, "beta_slow": 1.0,
}  # fmt: skip
SAYS_YARN = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128,
    "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "rope.freq_base": 150000.0,
}  # fmt: skip
FEW = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
SAYS_FEW = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 32}


@dataclass(frozen=True)
class Case:
    """A model, and what llama.cpp calls it and its parts."""

    name: str  # the architecture in the file
    kind: str  # transformers' model type
    config: dict[str, Any] = field(default_factory=dict)
    says: dict[str, Any] = field(default_factory=dict)  # metadata beyond those that all have
    names: dict[str, str] = field(default_factory=dict)  # of modules within a layer
    pieces: dict[str, Callable[[Tensor], Pieces]] = field(default_factory=dict)  # of parameters within a layer
    paired: bool = False
    add: float = 0.0  # to norms


CASES = {
    "gemma": Case("gemma", "gemma", {"tie_word_embeddings": True}, {"attention.value_length": 16}, add=1.0),
    "mistral3": Case(
        "mistral3", "ministral3",
        {"rope_parameters": YARN | {"truncate": True, "original_max_position_embeddings": 16, "mscale": 1.0,
                                    "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.3}},
        SAYS_YARN | {"rope.scaling.original_context_length": 16, "rope.scaling.yarn_log_multiplier": 1.0,
                     "attention.temperature_scale": 0.3, "rope.dimension_count": 16}, paired=True,
    ),
    "mistral small": Case(
        "mistral3", "mistral", {"sliding_window": None, "rope_parameters": PLAIN | {"rope_theta": 1e9}},
        {"rope.freq_base": 1e9, "rope.dimension_count": 16}, paired=True,
    ),
    "gemma3": Case(
        "gemma3", "gemma3_text",
        {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 16, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}},
        {"attention.sliding_window": 8, "rope.freq_base": 1e6, "rope.freq_base_swa": 5000.0, "rope.scaling.type": "linear",
         "rope.scaling.factor": 8.0, "attention.value_length": 16},
        norms_around({"pre_feedforward_layernorm": "ffn_norm"}), add=1.0,
    ),
    "phi3": Case(
        "phi3", "phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 128, "sliding_window": 8},
        {"rope.dimension_count": 12, "rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.2,
         "attention.sliding_window": 8},
        pieces=FUSED,
    ),
    "phi4": Case(
        "phi3", "phi3", {"rope_parameters": PLAIN | {"rope_theta": 250000.0, "partial_rotary_factor": 1.0}},
        {"rope.dimension_count": 16, "rope.freq_base": 250000.0, "attention.sliding_window": 0,
         "rope.scaling.original_context_length": 512},
        pieces=FUSED,
    ),
    "olmo2": Case("olmo2", "olmo2", {"num_key_value_heads": 4}, {}, norms_around()),
    "olmo3": Case(
        "olmo2", "olmo3",
        {"num_hidden_layers": 3, "sliding_window": 8,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "rope_parameters": {
            "full_attention": YARN | {"truncate": True}, "sliding_attention": PLAIN | {"rope_theta": 150000.0}}},
        SAYS_YARN | {"attention.sliding_window": 8, "attention.sliding_window_pattern": np.array([True, False, True])},
        norms_around(),
    ),
    "granite": Case(
        "granite", "granite",
        {"attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 5.0},
        {"attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.4, "logit_scale": 5.0, "vocab_size": 128,
         "rope.dimension_count": 16},
        paired=True,
    ),
    "smollm3": Case(
        "smollm3", "smollm3", {"num_hidden_layers": 4, "rope_parameters": PLAIN | {"rope_theta": 5e6}},
        {"rope.freq_base": 5e6, "vocab_size": 128, "rope.dimension_count": 16}, paired=True,
    ),
    "qwen2moe": Case(
        "qwen2moe", "qwen2_moe", FEW | {"shared_expert_intermediate_size": 96, "norm_topk_prob": False},
        SAYS_FEW | {"expert_shared_feed_forward_length": 96}, pieces=EXPERTS | SHARED,
    ),
    "qwen3moe": Case("qwen3moe", "qwen3_moe", FEW | {"norm_topk_prob": True}, SAYS_FEW, pieces=EXPERTS),
    "mixtral": Case(
        "llama", "mixtral", {"num_local_experts": 6, "num_experts_per_tok": 2, "rope_parameters": PLAIN},
        {"expert_count": 6, "expert_used_count": 2, "rope.dimension_count": 16}, pieces=EXPERTS, paired=True,
    ),
    "mistral": Case(
        "llama", "mistral", {"head_dim": 32, "sliding_window": 8},
        {"attention.sliding_window": 8, "attention.value_length": 32}, paired=True,
    ),
    "gpt-oss": Case(
        "gpt-oss", "gpt_oss",
        {"intermediate_size": 32, "num_local_experts": 6, "num_experts_per_tok": 2, "sliding_window": 8, "rope_parameters": YARN},
        SAYS_FEW | SAYS_YARN | {"attention.sliding_window": 8, "attention.value_length": 16},
        {"post_attention_layernorm": "post_attention_norm"}, IN_TURN,
    ),
}  # fmt: skip


def build(case: Case) -> Any:
    """The model, with random norms, biases and sinks too, so that none can be lost unseen."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.kind, **SIZE | case.config)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
        if parameter.dim() == 1:
            parameter.data.add_(1 - case.add)
    return model


def tensors(case: Case, model: Any) -> Iterator[tuple[str, Tensor]]:
    """What the file has: names, and views of the model's parameters in the order of the file."""
    for parameter, value in model.named_parameters():
        value = value.detach()
        _, _, rest = parameter.partition("model.layers.")
        layer, _, part = rest.partition(".")
        if part in case.pieces:
            yield from ((f"blk.{layer}.{name}", piece) for name, piece in case.pieces[part](value))
            continue
        module = part.rpartition(".")[0]
        ours = {**parts.OURS, **case.names}
        name = parameter if module else parameter.removesuffix(".weight")
        yield (
            (f"blk.{layer}.{ours[module]}.{parameter.rpartition('.')[2]}" if module else f"{ours[name]}.weight"),
            value,
        )


def content(case: Case, model: Any, kind: str) -> dict[str, Any]:
    """The tensors of a file of that type. The model takes the values that they keep."""
    found = {}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for name, value in tensors(case, model):
        own = kind if value.dim() > 1 and "ffn_gate_inp" not in name and not name.endswith(".bias") else "F32"
        turned = heads.get(name.split(".")[-2]) if case.paired else None
        if own == "Q8_0":
            value.copy_(torch.from_numpy(ggml.quants.dequantize(ggml.quants.quantize(value.numpy().copy(), Q8), Q8)))
        elif own != "F32":
            value.copy_(value.half())
        # llama.cpp keeps the two numbers that turn together side by side
        rows = value.unflatten(0, (turned, 2, -1)).transpose(1, 2).flatten(0, 2) if turned else value
        rows = rows + case.add if name.endswith("norm.weight") else rows.contiguous()
        data = ggml.quants.quantize(rows.numpy(), Q8).tobytes() if own == "Q8_0" else parts.stored(rows, own)
        found[name] = (own, tuple(rows.shape), data)
    scaling = model.config.rope_parameters
    for which in ("long", "short"):
        if factors := scaling.get(f"{which}_factor"):
            found[f"rope_factors_{which}.weight"] = ("F32", (len(factors),), parts.stored(torch.tensor(factors), "F32"))
    return found


def metadata(case: Case, model: Any) -> dict[str, Any]:
    """What the converter says of it."""
    config = model.config
    says = {
        "context_length": config.max_position_embeddings, "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim, "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": 10000.0,
    } | case.says  # fmt: skip
    return {"general.architecture": case.name} | {f"{case.name}.{key}": value for key, value in says.items()}


def written(place: Path, case: Case, kind: str) -> tuple[Any, Any]:
    """A model with the values that a file of it keeps, and the file."""
    model = build(case)
    held = content(case, model, kind)
    place.write_bytes(parts.file_of(metadata(case, model), held))
    return model, read(place)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_model_is_the_file_s(tmp_path, name, kind):
    model, file = written(tmp_path / "model.gguf", CASES[name], kind)
    loaded = load_model(file, torch.float32)
    ids = tokens(2, 24)
    expected = model(ids).logits
    assert expected.std() > 0.05  # the values tell something
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert type(loaded) is type(model)


def test_there_is_a_case_for_each_architecture():
    tested_elsewhere = {"qwen2", "qwen3", "gemma2"}
    assert {case.name for case in CASES.values()} | tested_elsewhere == set(ARCHITECTURES)


@torch.no_grad()
def test_steps_scale_queries_where_the_model_does(tmp_path):
    """Beyond 16 positions, the context of this model's first training; a probe of the layers sees fewer."""
    model, file = written(tmp_path / "model.gguf", CASES["mistral3"], "F32")
    ids = tokens(1, 40)
    with Applied(load_model(file), None) as session:
        cache = KvCache(model.config)
        session.model(ids[:, :30], past_key_values=cache)
        steps = [step(session, cache, ids[:, t]) for t in range(30, 40)]
    torch.testing.assert_close(torch.stack(steps, 1).float(), model(ids).logits[:, 30:], rtol=1e-4, atol=1e-4)


def test_a_longer_text_takes_the_long_factors(tmp_path):
    model, file = written(tmp_path / "model.gguf", CASES["phi3"], "F32")
    ids = tokens(1, 160)
    torch.testing.assert_close(load_model(file)(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_q_k_and_v_may_come_as_one(tmp_path, kind):
    case = Case("qwen2", "qwen2", {"head_dim": 16})
    model = build(case)
    held = content(case, model, kind)
    apart = dict(held)
    for layer in range(2):
        for end in ("weight", "bias"):
            three = [apart.pop(f"blk.{layer}.attn_{part}.{end}") for part in "qkv"]
            rows = sum(shape[0] for _, shape, _ in three)
            data = b"".join(data for _, _, data in three)
            apart[f"blk.{layer}.attn_qkv.{end}"] = (three[0][0], (rows, *three[0][1][1:]), data)
    (tmp_path / "model.gguf").write_bytes(parts.file_of(metadata(case, model), apart))
    ids = tokens(2, 12)
    torch.testing.assert_close(load_model(read(tmp_path / "model.gguf"))(ids).logits, model(ids).logits)


def test_gates_and_ups_of_experts_may_come_as_one(tmp_path):
    case = CASES["qwen3moe"]
    model = build(case)
    fused = {"mlp.experts.gate_up_proj": lambda w: [("ffn_gate_up_exps.weight", w)]}
    held = content(Case(case.name, case.kind, case.config, case.says, pieces=EXPERTS | fused), model, "Q8_0")
    (tmp_path / "model.gguf").write_bytes(parts.file_of(metadata(case, model), held))
    ids = tokens(2, 12)
    torch.testing.assert_close(load_model(read(tmp_path / "model.gguf"))(ids).logits, model(ids).logits)


REFUSED = {
    "experts of another width": ("qwen3moe", {"expert_feed_forward_length": 64}, "the metadata say"),
    "no experts": ("qwen3moe", {"expert_count": None}, "lack qwen3moe.expert_count"),
    "scaled experts": ("qwen3moe", {"expert_weights_scale": 2.5}, "expert_weights_scale is 2.5, which MOYU does not"),
    "groups of experts": ("qwen3moe", {"expert_group_count": 4}, "expert_group_count is 4, which MOYU does not"),
    "no rotation": ("granite", {"rope.scaling.finetuned": False}, "without rotary embeddings"),
    "no scale of logits": ("granite", {"logit_scale": None}, "lack granite.logit_scale"),
    "windows of another count": ("olmo3", {"attention.sliding_window_pattern": np.array([True])}, "of 1 layers, not 3"),
    "a partly turned head": ("granite", {"rope.dimension_count": 8}, "dimension_count is 8, but heads are 16 wide"),
    "yarn of another kind": ("gpt-oss", {"rope.scaling.yarn_ext_factor": 0.5}, "yarn_ext_factor is not 1"),
    "scaled twice": ("phi3", {"rope.scaling.factor": 2.0}, "scaled twice"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_the_numbers_is_refused(tmp_path, name):
    which, changed, reason = REFUSED[name]
    case = CASES[which]
    model = build(case)
    said = metadata(case, model) | {f"{case.name}.{key}": value for key, value in changed.items()}
    held = content(case, model, "F32")
    (tmp_path / "model.gguf").write_bytes(parts.file_of({k: v for k, v in said.items() if v is not None}, held))
    with pytest.raises(UserError, match=reason):
        load_model(read(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "weights", "stacked"), [("granite", "16 Q8_0, 5 F32: 8.6", 0), ("qwen3moe", "16 Q8_0, 11 F32: 8.7", 6)]
)
def test_info_says_what_a_file_holds_and_how_it_will_run(tmp_path, name, weights, stacked):
    written(tmp_path / "model.gguf", CASES[name], "Q8_0")
    facts = describe(str(tmp_path / "model.gguf"))  # there is no tokenizer in the file, and none is asked for
    assert facts["weights"].startswith(weights) and facts["weights"].endswith(" bits a weight")
    assert facts["computes in"] == "float32"
    assert facts["decode step"] == "native" or facts["decode step"].startswith("general: layer 0")
    assert facts.get("experts", "").startswith(f"{stacked} stacked tensors became float32" if stacked else "")
    assert ("experts" in facts) == bool(stacked)
