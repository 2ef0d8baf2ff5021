"""Pages of a mapped file are given back, and nothing that was written is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moyu.weights.mapped import let_go

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nothing is given back elsewhere")
SIZE = 32 << 20


def resident_of_files() -> int:
    """Bytes of mapped files that this process holds in memory."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def mapped(tmp_path):
    """A tensor that safetensors maps from a file, all of it read once."""
    save_file({"x": torch.arange(SIZE // 4, dtype=torch.int32)}, tmp_path / "x.safetensors")
    x = load_file(tmp_path / "x.safetensors")["x"]
    assert int(x.sum(dtype=torch.int64)) == (SIZE // 4) * (SIZE // 4 - 1) // 2
    return x


def test_a_mapped_tensor_is_given_back_and_reads_the_same(mapped):
    before = resident_of_files()
    let_go(mapped)
    assert before - resident_of_files() > 0.9 * SIZE
    assert torch.equal(mapped, torch.arange(SIZE // 4, dtype=torch.int32))


def test_what_was_written_to_a_mapped_tensor_stays(mapped):
    mapped[12345] = -7
    let_go(mapped)
    assert mapped[12345] == -7 and mapped[12346] == 12346


@pytest.mark.parametrize(
    "view", [lambda x: x.view(-1, 2).t(), lambda x: x[:1], lambda x: x[:0]], ids=["turned", "short", "empty"]
)
def test_parts_that_are_no_whole_pages_stay(mapped, view):
    part = view(mapped)
    expected = part.clone()
    let_go(part)
    assert torch.equal(part, expected)


def test_memory_of_its_own_stays():
    x = torch.arange(1 << 20)
    let_go(x)
    assert torch.equal(x, torch.arange(1 << 20))
