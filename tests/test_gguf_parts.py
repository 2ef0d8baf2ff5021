"""A model in several GGUF files is read as one, from any of them; parts that are missing or foreign are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gguf_files as parts
from moyu import UserError
from moyu.model.gguf.reader import read

COUNT = 5
SAID = {"general.architecture": "llama", "words": ["x", "yz"]}
TENSORS = {
    f"w{i}": ("Q8_0", (2, 64), bytes([i]) * 136) if i % 2 else ("F16", (3, 5), bytes([i]) * 30) for i in range(10)
}


def part(number: int, names: list[str], **changed: int) -> bytes:
    """One file; the first one has the metadata."""
    own = {"split.no": number, "split.count": COUNT, "split.tensors.count": len(TENSORS)}
    return parts.file_of((SAID if number == 0 else {}) | own | changed, {name: TENSORS[name] for name in names})


@pytest.fixture
def places(tmp_path) -> list[Path]:
    """The files, the first without tensors, as llama-gguf-split may write it."""
    names = [[], *(list(own) for own in np.array_split(np.array(list(TENSORS)), COUNT - 1))]
    found = [tmp_path / f"some-model-{number + 1:05d}-of-{COUNT:05d}.gguf" for number in range(COUNT)]
    for number, place in enumerate(found):
        place.write_bytes(part(number, [str(name) for name in names[number]]))
    return found


@pytest.mark.parametrize("given", [0, 2, 4])
def test_any_part_stands_for_the_model(places, given):
    file = read(places[given])
    assert file.path == places[given]
    assert file.metadata["general.architecture"] == "llama" and file.metadata["words"] == ["x", "yz"]
    assert list(file.tensors) == list(TENSORS)
    for name, (kind, shape, data) in TENSORS.items():
        assert (file.tensors[name].kind, file.tensors[name].shape) == (kind, shape)
        assert file.stored(name).numpy().tobytes() == data
    values = torch.frombuffer(bytearray(TENSORS["w0"][2]), dtype=torch.float16)
    assert torch.equal(file.values("w0").flatten(), values)


def test_missing_parts_are_named(places):
    places[2].unlink()
    with pytest.raises(UserError, match=r"one of 5 parts of a model, and some-model-00003-of-00005\.gguf is missing"):
        read(places[0])
    for place in places[1:]:
        place.unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"00002-of-00005.gguf, .*00003.*, .*00004.* and 1 more is missing"):
        read(places[0])


def test_a_part_under_another_name_is_refused(places):
    with pytest.raises(UserError, match=r"one of 5 parts of a model: its name must end in -00001-of-00005.gguf"):
        read(places[0].rename(places[0].with_name("model.gguf")))


FOREIGN: dict[str, tuple[bytes, str]] = {
    "another number": (part(2, ["w0"]), "says that it is part 2 of 5, not 1 of 5"),
    "another count": (part(1, ["w0"], **{"split.count": 9}), "says that it is part 1 of 9, not 1 of 5"),
    "no part": (parts.file_of(SAID, {}), "says that it is part None of None, not 1 of 5"),
    "a tensor of another": (part(1, ["w9"]), "the tensor 'w9' is in another part too"),
    "too few tensors": (part(1, ["w0"]), "the parts have 8 tensors, but the model 10"),
    "damaged": (part(1, ["w0", "w1", "w2"])[:-40], "00002-of-00005.gguf, byte"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_parts_that_do_not_belong_together_are_refused(places, case):
    data, reason = FOREIGN[case]
    places[1].write_bytes(data)
    with pytest.raises(UserError, match=reason):
        read(places[0])


@pytest.mark.parametrize("count", ["two", np.array([2, 3], "<u2"), 2.5])
def test_a_count_that_is_none_is_refused(tmp_path, count: Any):
    (tmp_path / "m.gguf").write_bytes(parts.file_of(SAID | {"split.count": count}, {}))
    with pytest.raises(UserError, match=r"split.count is not an integer"):
        read(tmp_path / "m.gguf")
