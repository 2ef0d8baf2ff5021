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
from moyu.measure.text import windows_for
from moyu.model import loading
from moyu.model.gguf.reader import read
from moyu.records import Cell, Comparison
from moyu.reporting import advice, claims, file_boards, scoreboard, write_scoreboard
from moyu.reporting.columns import number
from moyu.research import trinity

AGAIN = "run `python -m moyu.research.pages`"
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
        bytes=(0.95, 0.3),
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
    (levels,) = [c for c in cells if c.method == "levels" and c.target_byte_fraction == 0.95]
    assert 0.3 < levels.byte_fraction < 0.96  # less than asked for: the head alone saves more
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
    assert why["cats", 0.3].startswith("n/a (floor 0.") and why["cats", 0.95] is None


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


def test_tables_figure_and_page_say_what_the_records_say(board, tmp_path):
    _, _, rows = board
    (levels,) = [r for r in rows if isinstance(r, Cell) and r.method == "levels" and r.target_byte_fraction == 0.95]
    at_bytes, shown, every = scoreboard.tables(rows)
    lines = {line[0]: line[1:] for line in at_bytes.lines}
    assert lines["levels"][0].startswith(number(levels.kl, 2)) and lines["relu-zero"][0] == "n/a (nothing to skip)"
    assert lines["cats"][1].startswith("n/a (floor 0.")
    assert any(line[0] == "levels < every method" for line in shown.lines)
    assert [line[0] for line in every.lines[:2]] in (["Q8_0", "Q4_0"], ["Q8_0", "`cats`"])
    assert {line[0] for line in every.lines} == {"Q8_0", "Q4_0", "`levels`", "`cats`"}
    write_scoreboard(rows, tmp_path)
    assert records.read(tmp_path / "records.jsonl") == rows
    drawn = (tmp_path / "trinity.svg").read_text()
    assert "Q4_0: KL" in drawn and "levels: KL" in drawn
    assert "Q8_0, at equal bytes" in (tmp_path / "report.html").read_text()


def test_what_competes_is_a_file_of_as_many_bytes(board):
    _, _, rows = board
    (own,) = file_boards.boards(rows)
    assert own.source.row == "Q8_0" and [f.row for f in own.files] == ["Q4_0"]
    assert own.file_kl(own.files[0].step_bytes) == own.files[0].kl
    assert own.file_kl(own.files[0].step_bytes * 0.9) is None, "no file is so small"


def test_published_pages_are_the_records_of_real_files():
    docs = Path(__file__).parent.parent / "docs"
    real, quants = (records.read(docs / "results" / f"{name}.jsonl") for name in ("trinity-real", "quants"))
    assert scoreboard.markdown(real) in (docs / "scoreboard.md").read_text(), AGAIN
    assert scoreboard.plot(real) + "\n" == (docs / "results" / "trinity-real.svg").read_text(), AGAIN
    page = (docs / "should-i-use-it.md").read_text()
    assert advice.gains(quants) in page and advice.others(real) in page, AGAIN


def test_what_the_readme_says_of_other_methods_is_what_the_cells_show():
    root = Path(__file__).parent.parent
    (own,) = file_boards.boards(records.read(root / "docs" / "results" / "trinity-real.jsonl"))
    shown = {line[0]: [int(count) for count in line[1:4]] for line in claims.lines(own.cells, own.files)}
    others, levels = (shown[f"{who} < the next larger file"] for who in ("any other method", "levels"))
    words = " ".join((root / "README.md").read_text().split())
    assert others[0] == 0 and f"none loses less than the next larger file in any of {sum(others)} cells" in words
    assert f"`levels` does in {levels[0]} of {sum(levels)} ([scoreboard]" in words


def test_documents_of_a_text_are_articles_lines_or_pieces(files, tmp_path):
    loaded = loading.load(str(files["Q8_0"]))
    asked = {"length": 64, "prompt": 32, "calibration": 4, "test": 99, "by_document": True}
    by_article = windows_for(loaded, files["text"], **asked)
    plain = tmp_path / "plain.txt"
    plain.write_text(TEXT.replace(" = ", " "))
    by_piece = windows_for(loaded, plain, **asked)
    for split, least in ((by_article, 6), (by_piece, 20)):
        assert len(set(split.test.documents)) >= least and len(split.calibration.tokens) == 4
    words = [loaded.tokenizer.decode(row, skip_special_tokens=True) for row in by_article.test.tokens]
    assert all(len({w for w in text.split()[2:-2] if w.startswith("word")}) == 1 for text in words), (
        "one article a window"
    )
    (tmp_path / "lines.jsonl").write_text('{"text": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(moyu.UserError, match=r"lines\.jsonl:2 is no document"):
        windows_for(loaded, tmp_path / "lines.jsonl", **asked)
