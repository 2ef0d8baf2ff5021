"""Weights that are no numbers: refused by the name of the tensor, in every format, before anything is made from them."""

from __future__ import annotations

import math

import pytest
import torch

import gguf_files as parts
import moyu
from moyu import UserError, methods
from moyu.measure.windows import Windows
from moyu.model import dissect, loading
from test_gguf import build as build_for_gguf
from test_gguf import tensors_of
from tiny import build, tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load("swiglu").tokenizer


def saved(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.embed_tokens.weight", math.nan),
        ("model.layers.2.mlp.down_proj.weight", math.inf),
        ("model.layers.1.input_layernorm.weight", -math.inf),
    ],
)
def test_a_checkpoint_is_refused_by_the_tensor(tmp_path, tokenizer, name, value, dtype):
    model = build("llama", DTYPES[dtype])
    model.get_parameter(name).data.view(-1)[-1] = value
    folder = saved(model, tokenizer, tmp_path)
    with pytest.raises(UserError, match=rf"{name}: download") as error:
        moyu.load(folder)
    assert "\n" not in str(error.value)
    assert not torch.isfinite(moyu.load(folder, finite=False).model.get_parameter(name)).all()


def test_the_largest_numbers_are_numbers(tmp_path, tokenizer):
    model = build("llama", torch.bfloat16)
    most = torch.finfo(torch.bfloat16).max
    model.model.embed_tokens.weight.data[-1] = most
    model.model.embed_tokens.weight.data[-2] = -most
    moyu.load(saved(model, tokenizer, tmp_path))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_refused_by_the_tensor(tmp_path, tokenizer, kind):
    """The first two bytes of a quantised row are its scale."""
    model = build_for_gguf("llama")
    content = tensors_of(model, kind)
    own, shape, data = content["blk.1.ffn_down.weight"]
    raw = bytearray(data)
    nan = {"F32": b"\x00\x00\xc0\x7f", "BF16": b"\xc0\x7f"}.get(own, b"\x00\x7e")
    raw[: len(nan)] = nan
    file = tmp_path / "model.gguf"
    for broken in (False, True):
        given = content | ({"blk.1.ffn_down.weight": (own, shape, bytes(raw))} if broken else {})
        words = parts.metadata_of(model, tokenizer)
        words["tokenizer.ggml.tokens"] = words["tokenizer.ggml.tokens"][:128]
        words["tokenizer.ggml.token_type"] = words["tokenizer.ggml.token_type"][:128]
        words["tokenizer.ggml.merges"] = []
        file.unlink(missing_ok=True)
        file.write_bytes(parts.file_of(words, given))
        if not broken:
            moyu.load(file)
            continue
        with pytest.raises(UserError, match=r"no finite number, in model\.layers\.1\.mlp\.down_proj\.weight"):
            moyu.load(file)


def test_nothing_is_made_from_such_a_model():
    """One weight; and one that only the calibration text meets."""
    model = build("llama", torch.float32)
    plan = moyu.calibrate(model, methods.method("teal"), Windows(tokens(2, 32), 16), sparsity=0.5)
    weight = model.model.layers[1].mlp.up_proj.weight.data
    before, weight[3, 5] = float(weight[3, 5]), math.nan
    windows = Windows(tokens(2, 32), 16)
    for action in (
        lambda: moyu.calibrate(model, methods.method("teal"), windows, sparsity=0.5),
        lambda: moyu.apply(model, plan),
        lambda: moyu.evaluate(model, plan, windows),
        lambda: dissect.dissect(model),
    ):
        with pytest.raises(UserError, match=r"in model\.layers\.1\.mlp\.up_proj\.weight"):
            action()
    weight[3, 5] = before
    row = int(windows.tokens[0, 3])
    model.model.embed_tokens.weight.data[row, 0] = math.inf
    with pytest.raises(UserError, match=r"in model\.embed_tokens\.weight"):
        moyu.calibrate(model, methods.method("teal"), windows, sparsity=0.5)
