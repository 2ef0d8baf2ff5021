"""The scoreboard of a quantised file: methods on its own weights, held against the file, and other files beside them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import gguf_files as parts
import moyu
from moyu import records
from moyu.model import loading
from moyu.model.gguf.reader import read
from moyu.records import Cell, Comparison
from moyu.research import trinity

SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
    "max_position_embeddings": 512, "head_dim": 16,
}  # fmt: skip
TEXT = "".join(
    f" = Title {n} = \n {' '.join(f'word{n} x{i}' if i % 5 else f'def f{i}(self):' for i in range(260))}\n"
    for n in range(32)
)


@pytest.fixture(scope="module")
def small():
    """A Llama of two narrow layers with an embedded model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = loading.load("swiglu").tokenizer
    ids = {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    model = LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=len(tokenizer), **ids)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else parameter.data.add_(0.1)
    return model, tokenizer


def held(model, kind: str) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every matrix in blocks of this type."""
    found = {}
    for parameter, weight in model.named_parameters():
        value, own = parts.as_stored(model, parameter), "F32" if weight.dim() == 1 else kind
        packed = gguf.quants.quantize(value.float().numpy(), gguf.GGMLQuantizationType[own])
        found[parts.name_of(parameter)] = (own, tuple(weight.shape), packed.tobytes())
    return found


@pytest.fixture(scope="module")
def files(small, tmp_path_factory) -> dict[str, Path]:
    """The model as files of two types, and a text of 24 articles."""
    folder, said = tmp_path_factory.mktemp("files"), parts.metadata_of(*small)
    found = {kind: folder / f"{kind}.gguf" for kind in ("Q8_0", "Q4_0")} | {"text": folder / "wiki.txt"}
    for kind in ("Q8_0", "Q4_0"):
        found[kind].write_bytes(parts.file_of(said, held(small[0], kind)))
    found["text"].write_text(TEXT)
    return found


@pytest.fixture(scope="module")
def board(files, tmp_path_factory):
    """A quick board of three methods, with a competitor."""
    asked = trinity.Asked(
        models=(str(files["Q8_0"]),),
        methods=("levels", "cats", "relu-zero"),
        bytes=(0.9, 0.3),
        quick=True,
        text=files["text"],
        competitors=(files["Q4_0"],),
    )
    out = tmp_path_factory.mktemp("board")
    return asked, out, trinity.run(asked, out)


def test_methods_are_held_against_the_file_at_its_own_bytes(board, files):
    _, _, rows = board
    source, other, *cells = rows
    assert (source.what, source.row, source.kl, source.top1_agreement) == ("source", "Q8_0", 0, 1)
    step = source.step_bytes
    tensors = read(files["Q8_0"]).tensors
    table = tensors["token_embd.weight"].nbytes
    assert step == pytest.approx(sum(t.nbytes for t in tensors.values()) - table, abs=0.01 * table)  # one row of it
    (levels,) = [c for c in cells if c.method == "levels" and c.target_byte_fraction == 0.9]
    assert 0.3 < levels.byte_fraction < 0.91  # less than asked for: the head alone saves more
    assert levels.step_bytes == pytest.approx(levels.byte_fraction * step)
    assert levels.ppl_dense == pytest.approx(source.ppl)
    assert levels.kl < other.kl and levels.kl < levels.kl_random
    assert len(levels.by_document["kl"]) == levels.documents == other.documents > 4
    assert len(levels.by_document["kl_random"]) == 4
    assert math.fsum(levels.by_document["kl"]) / levels.documents == pytest.approx(levels.kl, rel=1e-4)
    ratio = levels.bits_per_weight / levels.step_bytes
    assert 8 < source.step_bytes * ratio < 9 and other.what == "file" and 4 < other.step_bytes * ratio < 5.5


def test_a_method_that_cannot_run_says_why(board):
    _, _, rows = board
    why = {(r.method, r.target_byte_fraction): r.status for r in rows if isinstance(r, Cell)}
    assert why["relu-zero", None] == "n/a (nothing to skip)"
    assert why["cats", 0.3].startswith("n/a (floor 0.") and why["cats", 0.9] is None


def test_cells_are_found_by_what_they_were_made_from(board, files, monkeypatch):
    asked, out, rows = board
    monkeypatch.setattr(trinity.FileBoard, "make", lambda *_: pytest.fail("measured again"))
    assert trinity.run(asked, out) == rows
    made = []
    monkeypatch.setattr(trinity.FileBoard, "make", lambda self, wanted: made.append(wanted.name) or rows[-1])
    trinity.run(dataclasses.replace(asked, models=(str(files["Q4_0"]),), competitors=()), out)
    assert made == ["source", "levels", "levels", "cats", "cats", "relu-zero"], "another file's cells are its own"
    made.clear()
    files["text"].with_name("other.txt").write_text(TEXT.replace("word", "name"))
    trinity.run(dataclasses.replace(asked, text=files["text"].with_name("other.txt")), out)
    assert len(made) == 7, "another text's too"


def test_competitors_must_be_of_the_same_model(small, files, tmp_path):
    asked = trinity.Asked(models=(str(files["Q8_0"]),), competitors=(tmp_path / "other.gguf",), text=files["text"])
    with pytest.raises(moyu.UserError, match="no file is called"):
        trinity.run(asked, tmp_path)
    said = parts.metadata_of(*small)
    said["tokenizer.ggml.tokens"] = [*said["tokenizer.ggml.tokens"][:-1], "another"]
    (tmp_path / "other.gguf").write_bytes(parts.file_of(said, held(small[0], "Q8_0")))
    with pytest.raises(moyu.UserError, match=r"other\.gguf cannot be compared with .*: another tokenizer"):
        trinity.run(asked, tmp_path)
    with pytest.raises(moyu.UserError, match="files beside a GGUF file"):
        trinity.run(dataclasses.replace(asked, models=("swiglu",)), tmp_path)


def test_records_of_a_board_can_be_read_again(board, tmp_path):
    _, _, rows = board
    records.write(tmp_path / "rows.jsonl", rows)
    assert records.read(tmp_path / "rows.jsonl") == rows
    assert [type(r) for r in rows[:2]] == [Comparison, Comparison]
