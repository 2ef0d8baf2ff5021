"""`benchmarks/quants`: which text is scored, the importance matrix and its file, rows and their bytes, the table and the figure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from moyu import UserError, calibrate, records
from moyu.measure import evaluation
from moyu.measure.sizes import opened
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read
from moyu.reporting.beside_files import of_files
from tiny import IDS, tokens

sys.path.append(str(Path(__file__).parents[1]))  # `benchmarks` is no part of the package
from benchmarks.cpu.gguf_file import quantised, write
from benchmarks.quants import documents, importance, rows, table
from benchmarks.quants.documents import Texts
from benchmarks.quants.rows import Asked, Table

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 512, "head_dim": 16, **IDS,
}  # fmt: skip
PROMPT, LENGTH, COUNT = 6, 16, 5
ARTICLES = [" = Title {} = \n {}\n".format(n, " ".join(f"word{n}x{i}" for i in range(40))) for n in range(6)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A tiny Llama of 16 bits as a file, without a tokenizer."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else parameter.data.add_(0.1)
    return write(model, tmp_path_factory.mktemp("source") / "tiny.gguf", "F16")


@pytest.fixture
def bench(source: Path, tmp_path: Path) -> Table:
    """The table of that file, empty."""
    scored = Windows(tokens(COUNT, LENGTH, vocabulary=128), PROMPT, {"file": "text.txt"}, tuple(range(COUNT)))
    other = Windows(tokens(4, 32, seed=2, vocabulary=128), 0, {"file": "other.txt"})
    return Table(source, Texts(scored, other), tmp_path / "rows.jsonl", tmp_path / "work")


def llama_cpp() -> None:
    """Skip where llama.cpp is not there."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        pytest.skip(f"llama.cpp cannot be loaded: {error}")


# ------------------------------------------------------------------------------------------------------------------ text


def test_articles_json_lines_and_plain_files_are_documents(tmp_path):
    wiki, lines, plain = tmp_path / "wiki.txt", tmp_path / "lines.jsonl", tmp_path / "plain.txt"
    wiki.write_text("".join(ARTICLES).replace("word0x3", "\n = = Part = = \n", 1))
    lines.write_text("".join(json.dumps({"text": a}) + "\n" for a in ARTICLES) + "\n")
    plain.write_text("one\ntwo\n")
    assert [d.splitlines()[0] for d in documents.documents(wiki)] == [f" = Title {n} = " for n in range(6)]
    assert documents.documents(lines) == ARTICLES
    assert documents.documents(plain) == ["one\ntwo\n"]
    lines.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"lines.jsonl:1 is no document"):
        documents.documents(lines)


def test_scored_documents_are_not_calibrated_on(tmp_path):
    tokenizer = loading.load("swiglu").tokenizer
    file, other = tmp_path / "wiki.txt", tmp_path / "other.jsonl"
    file.write_text("".join(ARTICLES))
    sizes = {"count": 2, "length": 64, "prompt": 32, "chunks": 9, "chunk": 32}
    given = documents.texts(tokenizer, file, file, **sizes)
    firsts = [documents.encode(tokenizer, a) for a in ARTICLES]
    assert given.scored.tokens.tolist() == [ids[:64] for ids in firsts[:2]]
    assert given.rest == "".join(ARTICLES[2:])
    assert given.scored.documents == (0, 1) and given.scored.prompt == 32
    windows = [ids[i : i + 32] for ids in firsts[2:] for i in range(0, len(ids) - 31, 32)]
    assert len(given.calibration.tokens) == 9 and all(row in windows for row in given.calibration.tokens.tolist())
    other.write_text(json.dumps({"text": "".join(ARTICLES)}))  # one document, which holds what is scored
    with pytest.raises(UserError, match="100% of the scored text is in"):
        documents.texts(tokenizer, file, other, **sizes | {"count": 6})
    with pytest.raises(UserError, match="has 0 documents of 4096 tokens"):
        documents.texts(tokenizer, file, other, **sizes | {"length": 4096})


# ------------------------------------------------------------------------------------------------------------ importance


def test_the_importance_matrix_is_the_mean_square_of_every_input(bench):
    file, windows = read(bench.source), bench.texts.calibration
    model = load_model(file, torch.float32)
    found = importance.measure(file, model, windows, batch=3)
    matrices = {n for n, entry in file.tensors.items() if len(entry.shape) == 2} - {"token_embd.weight"}
    assert set(found) == matrices
    with torch.no_grad():
        out = model.model(windows.tokens, output_hidden_states=True)
        first = model.model.layers[0].input_layernorm(out.hidden_states[0])
    for name, x in (("blk.0.attn_k.weight", first), ("output.weight", out.last_hidden_state)):
        torch.testing.assert_close(torch.from_numpy(found[name]), x.square().mean((0, 1)), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(found["blk.1.ffn_gate.weight"], found["blk.1.ffn_up.weight"])
    assert found["blk.1.ffn_down.weight"].shape == (96,)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_its_file_is_llama_cpp_s(bench, tmp_path):
    matrix = {"blk.0.attn_q.weight": np.array([1.0, 0.5, 0.25], np.float32)}
    importance.write(tmp_path / "imatrix.gguf", matrix, bench.texts.calibration)
    theirs = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["other.txt"],
        "imatrix.chunk_count": 4,
        "imatrix.chunk_size": 32,
    }
    tensors = {t.name: (t.tensor_type.name, t.data.tolist()) for t in theirs.tensors}
    assert tensors == {
        "blk.0.attn_q.weight.in_sum2": ("F32", [[128.0, 64.0, 32.0]]),
        "blk.0.attn_q.weight.counts": ("F32", [[128.0]]),
    }
    np.testing.assert_array_equal(importance.load(tmp_path / "imatrix.gguf")["blk.0.attn_q.weight"], *matrix.values())


# ------------------------------------------------------------------------------------------------------------------ rows


def test_bytes_are_those_of_the_file(tmp_path, source):
    file, model, _, size = opened(source)
    assert model.dtype == torch.float32 and size.weights == sum(
        m.weight.numel() for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    )
    vectors = {n for n, entry in file.tensors.items() if len(entry.shape) == 1}
    norms = sum(file.tensors[n].nbytes for n in vectors)  # F32 in the file, two bytes in the model
    table_bytes = file.tensors["token_embd.weight"].nbytes
    assert size.file == size.moyu == sum(e.nbytes for e in file.tensors.values()) - table_bytes * 127 / 128 - norms / 2
    assert size.layers * 8 / size.weights == 16


def test_rows_are_measured_once_and_go_on(bench, monkeypatch):
    (row,) = bench.fill([Asked()])
    assert (row.row, row.what, row.kl, row.top1_agreement) == ("source", "source", 0, 1)
    assert row.documents == COUNT and row.tokens == COUNT * (LENGTH - PROMPT - 1) and row.ppl == row.ppl_source
    again = Table(bench.source, bench.texts, bench.out, bench.work)
    monkeypatch.setattr(Table, "measure", lambda *_: pytest.fail("measured again"))
    assert list(again.fill([Asked()])) == [row] and records.read(bench.out) == [row]
    other = Texts(Windows(bench.texts.scored.tokens[:4], PROMPT, {"file": "text.txt"}), bench.texts.calibration)
    assert not Table(bench.source, other, bench.out, bench.work).known(Asked())


def test_a_plan_stands_beside_its_nulls_at_its_bytes(bench, tmp_path):
    _, model, _, size = opened(bench.source)
    plan = calibrate(model, "teal", bench.texts.calibration, sparsity=0.5)
    plan.save(tmp_path / "plan")
    own, random, oracle = bench.fill([Asked("half", plan=tmp_path / "plan", nulls=True)])
    quality = evaluation.evaluate(model, plan, bench.texts.scored)
    assert own.kl == pytest.approx(float(quality.method.kl.double().mean()), rel=1e-5)
    assert own.step_bytes == random.step_bytes == pytest.approx(quality.byte_fraction * size.moyu)
    assert (own.choice, random.choice, oracle.choice) == ("own", "random", "oracle")
    assert 0 < own.kl < random.kl and own.plan == plan.hash and own.bits_per_weight == pytest.approx(8, abs=0.5)
    records.write(bench.out, [own])  # a run that stopped in between
    assert [r.choice for r in bench.fill([Asked("half", plan=tmp_path / "plan", nulls=True)])] == list(rows.CHOICES)
    assert [(r.choice, r.kl) for r in records.read(bench.out)] == [(r.choice, r.kl) for r in (own, random, oracle)]
    assert own.kl_interval[0] <= own.kl <= own.kl_interval[1] and len(own.by_document["kl"]) == COUNT


def test_llama_cpp_s_types_are_made_and_measured(bench):
    llama_cpp()
    plain, weighed, large = bench.fill([Asked("Q4_0"), Asked("Q4_0", importance=True), Asked("Q8_0")])
    assert plain.importance is None and weighed.importance == bench.texts.calibration.digest
    assert plain.file_sha256 != weighed.file_sha256 and plain.made_by.startswith("llama-cpp-python ")
    assert 0 < large.kl < weighed.kl and large.kl < plain.kl
    assert large.bits_per_weight == 8.5 and plain.bits_per_weight == 4.5
    assert not list(bench.work.glob("*Q4_0*")), "the file was not kept"


def test_the_head_may_have_a_type_of_its_own(bench):
    assert Asked("Q4_0 pure").making() == {"kind": "Q4_0", "head": None, "pure": True}
    llama_cpp()
    (row,) = bench.fill([Asked("Q8_0 head Q4_0")])
    assert row.bits_per_weight == 8.5 and row.tensors.startswith("14 Q8_0, 5 F32, 2 Q4_0")


def test_llama_cpp_weighs_by_the_importance(source, tmp_path):
    llama_cpp()
    weights = {"blk.0.attn_q.weight": np.full(64, 1e-6, np.float32)}
    weights["blk.0.attn_q.weight"][:32:4] = 1
    name, values = "blk.0.attn_q.weight", {}
    for kind, given in (("plain", None), ("weighed", weights)):
        path = quantised(source, tmp_path / f"{kind}.gguf", "q4_0", importance=given, threads=1)
        file = read(path)
        tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
        values[kind] = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert file.tensors[name].kind == "Q4_0"
    exact = read(source).values(name).float().numpy()
    error = {kind: float((((v - exact) ** 2)[:, :32:4]).sum()) for kind, v in values.items()}
    assert error["weighed"] < 0.7 * error["plain"]
    with pytest.raises(RuntimeError, match=r"llama\.cpp does not make q4_0"):
        quantised(tmp_path / "none.gguf", tmp_path / "out.gguf", "q4_0")


# ----------------------------------------------------------------------------------------------------- table and figure


def sample(row: str, size: float, kl: float, what: str = "file", **more) -> records.Record:
    """A record of these figures."""
    return records.stamp(
        kind="comparison", model="tiny", weights="trained", protocol={"prompt": 6, "window": 16, "table": "main"},
        corpus={"file": "text.txt", "digest": "0"}, row=row, what=what, source_sha256="0" * 64, tensors="2 Q4_0", step_bytes=size,
        step_bytes_moyu=size, bits_per_weight=size / 1e6, documents=2, tokens=20, ppl_source=7.0, ppl=7.5, kl=kl,
        kl_interval=[kl / 2, kl * 2], top1_agreement=0.9, by_document={"kl": [kl, kl], "nll": [2.0, 2.0]}, **more,
    )  # fmt: skip


ROWS = [
    sample("source", 8e6, 0.0, "source"),
    sample("Q2_K", 2e6, 1.0),
    sample("Q4_0", 4e6, 0.01),
    sample("Q4_K_M", 4e6, 0.04, importance="a" * 16),
    sample("Q8_0", 8e6, 0.0001),
    sample("own", 3e6, 0.02, "plan", plan="b" * 12),
    sample("own", 3e6, 0.5, "plan", plan="b" * 12, choice="random"),
]


def test_the_table_compares_plans_with_files_of_their_bytes():
    assert [r.row for r in table.front(ROWS)] == ["Q2_K", "Q4_0", "Q8_0"]
    assert of_files(ROWS, 3e6) == pytest.approx(0.1)  # halfway between 1 and .01 in the logarithm
    assert of_files(ROWS, 1e6) is None and of_files(ROWS, 9e6) == 0.0001
    assert of_files([*ROWS[:3], sample("Q8_0", 8e6, 0.0)], 6e6) == 0.01  # no way from .01 to 0 in the logarithm
    lines = table.markdown(ROWS).splitlines()
    assert lines[0].startswith("**tiny** (SHA-256 0000000000000000), text.txt: 2 documents, 16 tokens of each")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines[4:] if line]
    assert [c[0] for c in cells] == ["source", "Q8_0", "Q4_0", "Q4_K_M", "own", "own, matched random", "Q2_K"]
    assert cells[3][1] == "yes" and cells[3][-1] == "–" and cells[2][-1] == "front"
    assert cells[4] == [
        "own", "–", "3.0", "0.375", "3.00", "0.0200", "0.0100 to 0.0400", "7.50", "90.0%", "0.100, 5 ×",
    ]  # fmt: skip


def test_the_page_and_its_figure_are_the_records_():
    docs = Path(__file__).parents[1] / "docs"
    found = records.read(docs / "results" / "quants.jsonl")
    again = "run `python -m benchmarks.quants.table docs/results/quants.jsonl docs/results/quants.svg`, put what it prints there"
    assert table.markdown(found) in (docs / "quants.md").read_text(encoding="utf-8"), again
    assert table.figure(found) + "\n" == (docs / "results" / "quants.svg").read_text(encoding="utf-8"), again


def test_the_figure_has_a_mark_for_every_row(tmp_path, monkeypatch, capsys):
    records.write(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(sys, "argv", ["table", str(tmp_path / "rows.jsonl"), str(tmp_path / "out.svg")])
    table.main()
    assert capsys.readouterr().out.strip() == table.markdown(ROWS).strip()
    drawn = ElementTree.parse(tmp_path / "out.svg").getroot()
    marks = [e.tag.rpartition("}")[2] for e in drawn.iter()]
    assert marks.count("circle") == 4 and marks.count("polygon") == 2
    texts = [e.text for e in drawn.iter() if e.text]
    assert {"Q2_K", "own"} <= set(texts) and "own, random" not in texts  # a matched choice is named by its hint alone
    assert any(text.startswith("own, random: KL") for text in texts)
