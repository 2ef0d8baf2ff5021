"""Native steps of layers that are not a Llama's: norms behind parts, windows, caps, several rotary embeddings, scaled embeddings."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import moyu
from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache
from moyu.kernels import cpu
from tiny import GATED, WIDE

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels are not built")
WINDOW = 6
GEMMA = WIDE | GATED | {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
BUILDERS = {
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, attn_implementation="eager")
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention"] * 2 + ["full_attention"])
    ),
    "gemma3 with one base": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **GEMMA,
            layer_types=["sliding_attention"] * 2 + ["full_attention"],
            rope_parameters={
                kind: {"rope_type": "default", "rope_theta": 10000.0}
                for kind in ("sliding_attention", "full_attention")
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**WIDE, **GATED, sliding_window=WINDOW)),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**WIDE, **GATED, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
}


def build(name: str):
    torch.manual_seed(0)
    model = BUILDERS[name]().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.dim() > 1 else 0.3)
    return model


@pytest.mark.parametrize("name", BUILDERS)
@torch.no_grad()
def test_native_steps_give_what_the_model_gives(name):
    """Dense steps far beyond the window, of two rows of which one is padded."""
    model = build(name)
    ids = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits
    with Applied(model, None, check=False) as applied:
        cache, logits = KvCache(model.config), []
        with applied.prompt(9):
            logits.append(model(input_ids=ids[:, :9], attention_mask=mask[:, :9], past_key_values=cache).logits)
            for t in range(9, 24):
                logits.append(
                    model(input_ids=ids[:, t : t + 1], attention_mask=mask[:, : t + 1], past_key_values=cache).logits
                )
        assert applied.traces.summary() == "native"
    found = torch.cat(logits, 1)
    kept = mask.bool()
    # float32 through three layers: errors of a few 1e-7 in values of about 1.
    assert (found - expected)[kept].abs().max() < 3e-5 * expected[kept].abs().max()


@pytest.mark.parametrize("name", BUILDERS)
def test_texts_of_own_generation_and_of_the_model_are_equal(name):
    model = build(name)
    ids = torch.randint(3, 128, (1, 10), generator=torch.Generator().manual_seed(2))
    own = [int(tokens) for tokens in moyu.generate(model, ids, max_new_tokens=12, do_sample=False, eos_token_id=None)]
    theirs = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert own == theirs[0, 10:].tolist()
