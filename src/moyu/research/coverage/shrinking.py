"""Tiny models of every type. Rules over the names of configuration fields make them small; no rule names a type.

The structure stays: several experts, layers of each kind, low-rank latent projections.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 128
LAYERS = 4
HEADS, HEAD_DIM = 4, 16
WIDTH = HEADS * HEAD_DIM

# Pattern for a whole field name -> value. The first match counts; a field that is already smaller stays.
RULES: tuple[tuple[str, int], ...] = (
    (r"(decoder_|unpadded_)?vocab_size|vocab_size_per_layer_input|vocab_offset", VOCABULARY),
    (r"(pronunciation|shape|audio)_vocab_size|codebook_size", 64),
    (r"hidden_size|d_model|n_embd|emb_dim|dim_model|embedding_(size|dim)|word_embed_proj_dim|lru_width", WIDTH),
    (r"hidden_size_global|(in|out)put_embedding_size|ple_embed_dim", WIDTH),
    (r"out_hidden_size|(pronunciation|shape)_embed_dim|mamba_d_ssm|(feature|input)_size", WIDTH),
    (r"num_hidden_layers|n_layers?|num_(encoder_|decoder_)?layers|(encoder|decoder)_layers|num_blocks|depth", LAYERS),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups|linear_num_key_heads|num_global_key_value_heads", 2),
    (r"(swa_)?num_(encoder_|decoder_)?attention_heads|n_heads?|num_heads|attention_heads", HEADS),
    (r"(encoder|decoder)_attention_heads|index_n_heads|linear_num_(value_)?heads|conf_num_attention_heads", HEADS),
    (r"(global_|swa_|v_|index_|linear_|linear_key_|linear_value_)?head_dim|dim_head|d_head|attention_head_size", HEAD_DIM),
    (r"kv_channels|qk_nope_head_dim|d_kv", HEAD_DIM),
    (r"qk_rope_head_dim|rotary_dim", 8),
    (r"qk_head_dim", HEAD_DIM + 8),
    (r"(q|kv|o)_lora_rank|hidden_size_per_layer_input|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank", 32),
    (r"router_hidden_size", 32),
    (r"(moe_|expert_|shared_expert_|shared_experts_|moe_shared_expert_|shared_)intermediate_size", 48),
    (r"expert_ffn_hidden_size", 48),
    (r"(dense_)?intermediate_size(_mlp)?|(encoder_|decoder_)?ffn_dim|n_inner|dff|d_ff|dim_ff|d_inner", 96),
    (r"ffn_hidden_size|feed_forward_size|mlp_dim", 96),
    (r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|upsample_groups|o_groups", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers|num_kv_shared_layers", 1),
    (r"(attn|expert)_layer_period", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"max_position_embeddings|model_max_length|max_seq_len|n_positions|n_ctx|context_length", 256),
    (r"max_(source|target)_positions|num_position_embeddings", 256),
    (r"num_layers_per_stack", 2),
    (r"mamba_d_state|state_size|ssm_state_size|d_rel|hc_sinkhorn_iters", 8),
    (r"mamba_(n|num)_heads", 8),
    (r"mamba_(d_head|head_dim|headdim)", 16),
    (r"mamba_chunk_size|chunk_size|index_topk|block_size|sliding_window(_size)?|rel_extent", 16),
    (r"encoder_hash_byte_group_vocab|ngram_vocab_size_base|make_ngram_vocab_size_divisible_by", 64),
    (r"image_size|crop_size", 32),
)  # fmt: skip
MULTIPLES = r"attention_hidden_size|adapter_(in|out)_dim"  # of hidden_size
HEAD_COUNTS = r"num_attention_heads|num_heads|n_heads"
KV_HEAD_COUNTS = r"num_key_value_heads|num_kv_heads"
# Fields that a type needs, but its default configuration leaves open.
DEFAULTS = {
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "is_decoder": True,
    "default_language": "en_XX",
    "moe_topk": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
    "indexer_n_heads": HEADS,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
}
FIXED = {
    "attention_types": [[["global", "local"], 2]],
    "attn_layer_indices": [1],
    "activation_sparsity_pattern": [0.95, 0.0] * (LAYERS // 2),
    "axial_pos_embds_dim": (16, 48),
    "axial_pos_shape": (16, 16),
    "attention_head_dim": 2 * HEAD_DIM,
}
# Further fields for types that require certain kinds of layers.
MORE: tuple[dict[str, Any], ...] = ({}, {"layer_types": ["conv", "full_attention"] * 2})
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def names() -> list[str]:
    """Every model type that the installed transformers maps to a causal LM."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def shrink(config: PreTrainedConfig, more: dict[str, Any] | None = None) -> PreTrainedConfig:
    """A small version of a type's default configuration. Derived fields are computed again."""
    fields: dict[str, Any] = {}
    own = vars(config)
    heads = max((v for k, v in own.items() if re.fullmatch(HEAD_COUNTS, k) and isinstance(v, int)), default=0)
    for name, value in own.items():
        if isinstance(value, PreTrainedConfig):
            fields[name] = shrink(value)
        elif name in FIXED:
            fields[name] = FIXED[name]
        elif isinstance(value, int) and not isinstance(value, bool) and not (value == 0 and name in DEFAULTS):
            if value == heads and re.fullmatch(KV_HEAD_COUNTS, name):
                small = HEADS
            elif name == "head_dim" and value == own.get("qk_rope_head_dim"):
                small = _small("qk_rope_head_dim", value)
            elif name == "num_heads" and "expand" in own:
                small = own["expand"] * WIDTH // HEAD_DIM
            elif re.fullmatch(MULTIPLES, name):
                small = value * WIDTH // own["hidden_size"]
            else:
                small = _small(name, value)
            if small is not None:
                fields[name] = small
        elif isinstance(value, list) and value and type(value[0]) is int and _small(name, value[0]) is not None:
            fields[name] = [_small(name, v) or v for v in value[:LAYERS]]
        elif isinstance(value, list) and re.fullmatch(r"layers_block_type|(mlp_)?layer_types|indexer_types", name):
            kinds = list(dict.fromkeys(value))
            fields[name] = [kinds[i % len(kinds)] for i in range(LAYERS)]
        elif name in DEFAULTS and not value:
            fields[name] = DEFAULTS[name]
    if isinstance(own.get("eos_token_id"), list):
        fields["eos_token_id"] = SPECIAL["eos_token_id"]
    return type(config)(**fields, **(more or {}))


def _small(name: str, value: int) -> int | None:
    if name in SPECIAL:
        return SPECIAL[name]
    if re.search(r"token_(id|index)$", name):
        return value if 0 <= value < VOCABULARY else VOCABULARY - 1
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            return small if value > small else None
    return None


def build(model_type: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of a type. Its weights are large enough for logits to differ between tokens."""
    problem: Exception | None = None
    for more in MORE:
        torch.manual_seed(seed)
        try:
            model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[model_type](), more)).eval()
            break
        except Exception as error:
            problem = problem or error
    else:
        assert problem is not None
        raise problem
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
        else:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model.to(dtype)
