"""Models that are loaded in other ways than whole and plain: what is taken is right, what is not is named."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from moyu import Applied, MoyuConfig, UserError, calibrate, methods
from moyu.measure.windows import Windows
from moyu.model.dissect import dissect
from tiny import GATED, WIDE, build, tokens


def plan_for(model, method: str = "griffin", sparsity: float = 0.0):
    return calibrate(model, methods.method(method), Windows(tokens(2, 32), 16), sparsity=sparsity, name="tiny")


def continued(model) -> torch.Tensor:
    return model.generate(input_ids=tokens(1, 8), max_new_tokens=8, do_sample=False)


@pytest.fixture
def mesh():
    """A mesh of one process: weights are DTensor on it as on a larger one."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(module, mesh) -> None:
    """Tensor parallelism of a network, as `tp_plan` does it."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    ways = {"gate_proj": ColwiseParallel(), "up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
    parallelize_module(module.mlp, mesh, ways)


def test_distributed_weights_are_refused_by_name(mesh):
    model = build("llama", torch.float32)
    for layer in model.model.layers:
        shard(layer, mesh)
    with pytest.raises(UserError, match="weights of its linears are DTensor"):
        dissect(model)


def test_a_layer_of_distributed_weights_stays_dense_and_is_named(mesh):
    model = build("llama", torch.float32)
    shard(model.model.layers[1], mesh)
    dense = continued(model)
    anatomy = dissect(model)
    assert [b.has_ffn for b in anatomy.blocks] == [True, False, True]
    assert "layer 1: the weights of its linears are DTensor" in anatomy.gaps[0]
    with Applied(model, plan_for(model)):
        assert torch.equal(continued(model), dense)


@pytest.mark.parametrize("place", ["cpu", "auto"])
def test_a_device_map_of_one_device(tmp_path, place):
    model = build("llama", torch.float32)
    plan_for(model, sparsity=0.5).save(tmp_path / "plan")
    model.save_pretrained(tmp_path / "model")
    with Applied(model, plan_for(model, sparsity=0.5)):
        expected = continued(model)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=place, quantization_config=MoyuConfig(plan=tmp_path / "plan")
    )
    assert torch.equal(continued(loaded), expected)


def test_offloading_is_refused_with_the_reason(tmp_path):
    build("llama", torch.float32).save_pretrained(tmp_path / "model")
    names = ["embed_tokens", "norm", "rotary_emb", "layers.0", "layers.2"]
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu", "model.layers.1": "disk"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off")
    with pytest.raises(UserError, match="inside hooks, for example because a device_map offloads"):
        dissect(model.eval())


def test_a_checkpoint_in_shards(tmp_path):
    model = build("llama", torch.float32)
    plan_for(model, sparsity=0.5).save(tmp_path / "plan")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    config = MoyuConfig(plan=tmp_path / "plan")
    loaded = {
        n: AutoModelForCausalLM.from_pretrained(tmp_path / n, quantization_config=config) for n in ("whole", "shards")
    }
    assert torch.equal(continued(loaded["whole"]), continued(loaded["shards"]))
    loaded["shards"].save_pretrained(tmp_path / "again", max_shard_size="50KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(continued(again), continued(loaded["whole"]))


@pytest.mark.parametrize("method", ["griffin", "teal"])
def test_tied_embeddings_stay_tied(tmp_path, method):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**WIDE, **GATED, tie_word_embeddings=True)).eval()
    dense, plan = continued(model), plan_for(model, method)
    with Applied(model, plan):
        assert torch.equal(continued(model), dense)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(continued(loaded), dense)
