"""Records: what is refused, and that files are whole or not there."""

import errno
import json
import os
from pathlib import Path

import pytest

from moyu import records
from moyu.errors import UserError
from moyu.files import atomic_write_bytes, atomic_write_text
from moyu.measure.environment import checkout

STAMP = {"versions": {"moyu": "0"}, "device": "cpu", "threads": 1, "date": "2026-03-01T10:00:00Z"}
MODEL = {**STAMP, "model": "swiglu", "weights": "trained", "method": "cett"}
QUALITY = {
    "kind": "quality",
    **MODEL,
    "simulated": True,
    "realized_sparsity": 0.5,
    "byte_fraction": 0.7,
    "tokens": 100,
    "ppl_dense": 7.0,
    "ppl": 7.5,
    "kl": 0.05,
    "top1_agreement": 0.9,
}
SPEED = {
    "kind": "speed",
    **MODEL,
    "simulated": False,
    "context": "model itself",
    "tok_s": 12.0,
    "tok_s_dense": 10.0,
    "speedup": 1.2,
    "speedup_limit": 1.4,
    "gb_s": 30.0,
    "read_ceiling_gb_s": 45.0,
    "ceiling_share": 0.66,
    "p20": 0.08,
    "p50": 0.083,
    "p80": 0.09,
    "backend": "cpu",
    "dense_baseline": "transformers eager",
}


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (QUALITY, {"kl": -1.0}, "quality.kl must be >= 0, not -1.0"),
        (QUALITY, {"kl": float("nan")}, "quality.kl: input should be a finite number"),
        (QUALITY, {"realized_sparsity": 1.2}, "quality.realized_sparsity must be <= 1, not 1.2"),
        (QUALITY, {"byte_fraction": 0.0}, "quality.byte_fraction must be > 0, not 0.0"),
        (QUALITY, {"sparsity_by_layer": [0.5, -0.5]}, "quality.sparsity_by_layer[1] must be >= 0, not -0.5"),
        (QUALITY, {"weights": "random"}, "weights are random: no quality is recorded"),
        (QUALITY, {"ppl": None}, "ppl missing, and no status says why"),
        (QUALITY, {"status": "n/a (floor 0.82)"}, "exclude each other"),
        (QUALITY, {"perplexity": 3.0}, "quality.perplexity is not a field of this record"),
        (QUALITY, {"date": "yesterday"}, "quality.date"),
        (QUALITY, {"kind": "qualty"}, "kind 'qualty' is unknown, did you mean 'quality'?"),
        (SPEED, {"speedup": 0.0}, "speed.speedup must be > 0"),
        (SPEED, {"speedup": 1.5}, "speedup 1.5 is not tok_s / tok_s_dense = 1.2"),
        (SPEED, {"simulated": True}, "a masked run reads every byte"),
        (SPEED, {"p20": 0.2}, "are not in order"),
    ],
)
def test_wrong_fields_are_refused_by_name(base, change, message):
    records.validate(base)
    with pytest.raises(ValueError) as caught:
        records.validate({**base, **change})
    assert message in str(caught.value)


def test_a_status_stands_for_the_numbers():
    numbers = ("tokens", "ppl_dense", "ppl", "kl", "top1_agreement", "realized_sparsity", "byte_fraction")
    record = records.validate(
        {**{k: v for k, v in QUALITY.items() if k not in numbers}, "status": "n/a (floor 0.82)", "floor": 0.82}
    )
    assert record.kl is None and record.floor == 0.82


def test_rounding_of_float32_means_is_no_error():
    record = records.validate({**QUALITY, "top1_agreement": 1.0000001, "realized_sparsity": -5e-8})
    assert (record.top1_agreement, record.realized_sparsity) == (1.0, 0.0)


def test_stamp_adds_where_a_number_comes_from():
    record = records.stamp(**{k: v for k, v in QUALITY.items() if k not in STAMP})
    assert set(record.versions) == {"moyu", "python", "torch", "transformers"}
    assert record.device and record.threads >= 1 and record.date.endswith("Z")
    assert records.stamp(kind="environment").cores >= 1


def test_no_commit_outside_a_checkout(tmp_path: Path):
    assert checkout(tmp_path) == (None, None)


def test_round_trip(tmp_path: Path):
    path, rows = (
        tmp_path / "records.jsonl",
        [records.validate(QUALITY), records.validate({**SPEED, "notes": ["a\nb \u2028 ü"]})],
    )
    records.write(path, rows[:1])
    records.append(path, rows[1])
    assert records.read(path) == rows
    assert len(path.read_text(encoding="utf-8").split("\n")) == 3
    assert all("kind" in json.loads(line) for line in path.read_bytes().splitlines())


def test_writing_checks_what_was_made_around_the_checks(tmp_path: Path):
    wrong = records.validate(QUALITY).model_copy(update={"kl": -1.0})
    with pytest.raises(ValueError, match=r"quality\.kl must be >= 0"):
        records.write(tmp_path / "records.jsonl", [wrong])
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_last_line_is_named(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    records.write(path, [records.validate(QUALITY)] * 3)
    path.write_bytes(path.read_bytes()[:-20])
    for use in (records.read, lambda p: records.append(p, records.validate(QUALITY))):
        with pytest.raises(UserError, match=r"records\.jsonl:3: the last line is truncated"):
            use(path)


def test_a_missing_last_line_break_is_mended(tmp_path: Path):
    path = tmp_path / "records.jsonl"
    records.write(path, [records.validate(QUALITY)])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    records.append(path, records.validate(SPEED))
    assert [r.kind for r in records.read(path)] == ["quality", "speed"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**QUALITY, "kl": -1.0}), r"records\.jsonl:2: quality\.kl must be >= 0, not -1\.0"),
        ("not json", r"records\.jsonl:2: not JSON"),
        ("[1]", r"records\.jsonl:2: record"),
        ('{"a": 1}', r"records\.jsonl:2: kind is missing"),
    ],
)
def test_reading_names_the_line(tmp_path: Path, line, message):
    path = tmp_path / "records.jsonl"
    path.write_text(f"{json.dumps(QUALITY)}\n{line}\n{json.dumps(QUALITY)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=message):
        records.read(path)


def test_a_missing_file_says_what_makes_it(tmp_path: Path):
    with pytest.raises(UserError, match="moyu run"):
        records.read(tmp_path / "none.jsonl")


def _full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_no_temporary_one(tmp_path: Path, monkeypatch, call):
    path = tmp_path / "old.txt"
    atomic_write_text(path, "old")
    monkeypatch.setattr(os, call, _full_disk)
    with pytest.raises(OSError, match="No space"):
        atomic_write_bytes(path, b"new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["old.txt"]


def test_a_full_disk_leaves_no_part_of_a_line(tmp_path: Path, monkeypatch):
    path = tmp_path / "records.jsonl"
    records.write(path, [records.validate(QUALITY)])
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", _full_disk)
    with pytest.raises(OSError, match="No space"):
        records.append(path, records.validate(SPEED))
    assert path.read_bytes() == before


def test_a_written_file_has_the_usual_permissions(tmp_path: Path):
    plain, atomic = tmp_path / "plain", tmp_path / "atomic"
    plain.write_text("x")
    atomic_write_text(atomic, "x")
    assert plain.stat().st_mode == atomic.stat().st_mode


def test_the_documented_schema_is_the_code_s():
    page = Path(__file__).parents[1] / "docs" / "records.md"
    assert records.schema_markdown() in page.read_text(encoding="utf-8"), (
        "paste moyu.records.schema_markdown() into docs/records.md"
    )
