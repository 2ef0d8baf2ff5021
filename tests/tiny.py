"""Tiny models from configs: one row a structure."""

from __future__ import annotations

import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

from moyu.model import zoo
from moyu.model.loading import Loaded

VOCABULARY = 128
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
WIDE = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, **IDS}
GATED = {"intermediate_size": 96, "num_key_value_heads": 2}


def _opt(activation: str) -> PreTrainedModel:
    config = OPTConfig(**WIDE, ffn_dim=96, word_embed_proj_dim=64, dropout=0.0, max_position_embeddings=256)
    config.activation_function = activation
    return OPTForCausalLM(config)


BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED)),
    "sharp": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, attention_bias=True, mlp_bias=True)),
    "reglu": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, hidden_act="relu")),
    "one neuron": lambda: LlamaForCausalLM(LlamaConfig(**WIDE, **GATED | {"intermediate_size": 1})),
    "opt-relu": lambda: _opt("relu"),
    "opt-gelu": lambda: _opt("gelu"),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=3, n_head=4, **IDS)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**WIDE, **GATED)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**WIDE, **GATED, num_local_experts=4, num_experts_per_tok=2, experts_implementation="eager")
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> PreTrainedModel:
    """A tiny model with weights large enough that its logits differ between tokens.

    "sharp": attention that looks at few positions, and biases as large as what they are added to, so that no constant is idle.
    """
    torch.manual_seed(seed)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data += 0.02 * torch.randn_like(parameter)
    for key, parameter in model.named_parameters() if name == "sharp" else ():
        if key.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data.mul_(2.5)
        elif key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to(dtype)


def tokens(*shape: int, seed: int = 1, vocabulary: int = VOCABULARY) -> torch.Tensor:
    """Random ids that are no special token."""
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def lettered(dtype: torch.dtype = torch.float32) -> Loaded:
    """A tiny Llama of random weights behind the tokenizer of an embedded model, for what begins with text."""
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("swiglu"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**WIDE, "vocab_size": len(tokenizer)}, **GATED)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return Loaded("", model.to(dtype), tokenizer)
