"""Adapters are applied or refused, never dropped."""

from __future__ import annotations

import pytest
import torch

from moyu import Applied, UserError, calibrate, methods
from moyu.measure.windows import Windows
from tiny import build, tokens

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::UserWarning:peft")

FFN = ["gate_proj", "up_proj", "down_proj"]


def adapted(*targets: str, trained: bool):
    """A tiny Llama with LoRA on some linears; a fresh one adds nothing yet."""
    config = peft.LoraConfig(target_modules=list(targets), r=4, init_lora_weights=not trained, task_type="CAUSAL_LM")
    return peft.get_peft_model(build("llama", torch.float32), config).eval()


def train(model) -> None:
    """What a step of training does to adapters."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1


def plan_for(model, method: str, sparsity: float = 0.0):
    return calibrate(model, methods.method(method), Windows(tokens(2, 32), 16), sparsity=sparsity, name="tiny")


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("method", ["griffin", "teal"])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), ("gate_proj",), ("up_proj", "k_proj")])
def test_adapters_count_under_a_plan_that_skips_nothing(targets, method, trained):
    model, ids = adapted(*targets, trained=trained), tokens(1, 8)
    plan = plan_for(model, method)
    for _ in range(2):  # as they are, and after they have changed under the plan
        dense = model.generate(
            input_ids=ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        with Applied(model, plan):
            sparse = model.generate(
                input_ids=ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            train(model)
        assert torch.equal(sparse.sequences, dense.sequences)
        torch.testing.assert_close(torch.stack(sparse.logits), torch.stack(dense.logits), rtol=1e-3, atol=1e-3)


def columns_of_passes(applied) -> list[tuple[int, int]]:
    """(dense, sparse) rows of each pass from here on."""
    seen, new_pass = [], applied.new_pass

    def watched(rows, memory):
        seen.append((int((rows.valid & ~rows.sparse).sum()), int(rows.sparse.sum())))
        return new_pass(rows, memory)

    applied.new_pass = watched
    return seen


@pytest.mark.parametrize("engine", ["mask", "skip"])
@pytest.mark.parametrize("method", ["griffin", "teal", "cats"])
@pytest.mark.parametrize("kind", [peft.PromptTuningConfig, peft.PrefixTuningConfig], ids=["prompt", "prefix"])
def test_virtual_tokens_are_part_of_the_prompt(kind, method, engine):
    """They come between `generate` and `forward`: as embeddings before the prompt's, or as keys and values in the cache."""
    torch.manual_seed(0)
    base = build("llama", torch.float32)
    plan = plan_for(base, method, sparsity=0.5)
    model = peft.get_peft_model(base, kind(task_type="CAUSAL_LM", num_virtual_tokens=6)).eval()
    ids = tokens(1, 12)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with Applied(model.base_model, plan, engine=engine) as applied, torch.no_grad():
        passes = columns_of_passes(applied)
        if kind is peft.PrefixTuningConfig and method == "griffin":  # a prefix has no activations that could decide
            with pytest.raises(UserError, match="has not seen"):
                model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
            return
        text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)[:, 12:]
        assert passes[0] == (12 if kind is peft.PrefixTuningConfig else 18, 0)
        assert set(passes[1:]) <= {(0, 1)}  # a native step makes none
        if kind is peft.PromptTuningConfig:
            whole = torch.cat([model.get_prompt(1), base.get_input_embeddings()(ids)], 1)
            assert torch.equal(text, base.generate(inputs_embeds=whole, **settings))


@pytest.mark.parametrize("method", ["griffin", "teal"])
@pytest.mark.parametrize("targets", [("q_proj",), ("gate_proj",)])
def test_masked_is_skipped_beside_adapters(targets, method):
    model, ids = adapted(*targets, trained=True), tokens(1, 12)
    plan = plan_for(model, method, sparsity=0.5)
    logits = {}
    for engine in ("mask", "skip"):
        with Applied(model, plan, engine=engine):
            logits[engine] = model.generate(
                input_ids=ids, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
            ).logits
    torch.testing.assert_close(torch.stack(logits["mask"]), torch.stack(logits["skip"]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("targets", [FFN, ["down_proj"]])
def test_an_adapter_on_down_is_refused_by_name_and_taken_once_merged(targets, trained):
    model = adapted(*targets, trained=trained)
    with pytest.raises(UserError, match=r"adapters on .*mlp\.down_proj.*merge_and_unload"):
        plan_for(model, "griffin")
    train(model)
    merged, ids = model.merge_and_unload().eval(), tokens(1, 8)
    dense = merged(ids).logits
    with Applied(merged, plan_for(merged, "griffin")) as applied, applied.prompt(4):
        torch.testing.assert_close(merged(ids).logits, dense)


@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_adapters_on_routed_experts_are_refused_by_name(name):
    config = peft.LoraConfig(
        target_modules=[], target_parameters=[f"mlp.experts.{name}"], r=2, lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(build("mixtral", torch.float32), config).eval()
    with pytest.raises(UserError, match=r"adapters on .*mlp\.experts"):
        plan_for(model, "griffin")


def test_merging_invalidates_the_plan():
    model = adapted("q_proj", "gate_proj", trained=True)
    plan = plan_for(model, "teal")
    merged = model.merge_and_unload().eval()
    with pytest.raises(UserError, match="weights"):
        Applied(merged, plan)


def test_adapters_that_come_under_a_plan_are_refused():
    model = build("llama", torch.float32)
    applied = Applied(model, plan_for(model, "griffin"))
    config = peft.LoraConfig(target_modules=["down_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config).eval()
    with pytest.raises(UserError, match=r"down_proj was replaced or wrapped"):
        wrapped.generate(input_ids=tokens(1, 8), max_new_tokens=4)
    applied.restore()
