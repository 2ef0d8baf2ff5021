"""Sound files are read as they are, and of all others the offset and the reason are said, at once and in little memory."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import gguf_files as parts
from moyu import UserError
from moyu.model.gguf.reader import read

SOUND = {"general.architecture": "llama", "a": 3, "words": ["x", "yz"], "numbers": np.arange(3, dtype="<i4")}
TENSORS = {
    "w": ("Q8_0", (2, 64), bytes(range(136))),
    "v": ("BF16", (3, 5), bytes(range(30))),
    "u": ("F32", (7,), bytes(28)),
}
WHOLE = parts.file_of(SOUND, TENSORS)
ALIGNED = 32

words = st.text(max_size=8)
numbers = st.one_of(st.booleans(), st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False))
arrays = st.sampled_from(sorted(parts.NUMBERS.values())).flatmap(
    lambda kind: st.binary(max_size=40).map(
        lambda data: np.frombuffer(
            bytes(b & 1 for b in data)
            if kind == "?"
            else data[: len(data) // np.dtype(kind).itemsize * np.dtype(kind).itemsize],
            kind,
        )
    )
)
metadata = st.dictionaries(
    st.text("abcdef.", min_size=1, max_size=6),
    st.one_of(numbers, words, st.lists(words, max_size=4), arrays),
    max_size=5,
)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@st.composite
def tensors(draw):
    """A few tensors of random bytes."""
    found = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=9), max_size=4, unique=True)):
        kind, shape = draw(st.sampled_from(["F32", "F16", "BF16", "Q8_0", "Q4_0"])), draw(shapes)
        size = {"F32": 4, "F16": 2, "BF16": 2, "Q8_0": 34, "Q4_0": 18}[kind] * int(np.prod(shape))
        shape[-1] *= 32 if kind[0] == "Q" else 1
        found[name] = (kind, tuple(shape), draw(st.binary(min_size=size, max_size=size)))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One file, written again and again."""
    return tmp_path_factory.mktemp("gguf") / "model.gguf"


def reading(place: Path, data: bytes):
    """Read these bytes as a file."""
    place.unlink(missing_ok=True)  # a mapped file must not shrink
    place.write_bytes(data)
    return read(place)


@given(metadata, tensors(), st.sampled_from([None, 8, 32, 1024]))
def test_sound_files_are_read_as_they_are(place, said, content, alignment):
    said = said if alignment is None else said | {"general.alignment": alignment}
    file = reading(place, parts.file_of(said, content))
    assert list(file.metadata) == list(said) and list(file.tensors) == list(content)
    for key, value in said.items():
        if isinstance(value, np.ndarray):
            assert file.metadata[key].dtype == value.dtype and file.metadata[key].tobytes() == value.tobytes()
        elif isinstance(value, float):
            assert np.float32(file.metadata[key]) == np.float32(value)
        else:
            assert file.metadata[key] == value and type(file.metadata[key]) is type(value)
    for name, (kind, shape, data) in content.items():
        assert (file.tensors[name].kind, file.tensors[name].shape) == (kind, shape)
        assert file.stored(name).numpy().tobytes() == data
        if kind[0] != "Q":
            assert file.values(name).shape == shape and file.values(name).numel() * int(kind[-2:]) == 8 * len(data)


def test_a_file_that_another_writer_made(place):
    gguf = pytest.importorskip("gguf")
    values = np.linspace(-3, 3, 4 * 64, dtype=np.float32).reshape(4, 64)
    writer = gguf.GGUFWriter(place, "qwen2")
    writer.add_context_length(77)
    writer.add_token_list(["a", "é"])
    writer.add_token_scores([0.5, -1.0])
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("v", values)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()
    file = read(place)
    assert file.metadata["general.architecture"] == "qwen2" and file.metadata["qwen2.context_length"] == 77
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "é"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0]
    assert file.tensors["w"].shape == (4, 64) and file.stored("w").numpy().tobytes() == blocks.tobytes()
    assert torch.equal(file.values("v"), torch.from_numpy(values))


def test_a_file_cut_short_anywhere_is_refused(place):
    last = len(WHOLE) - (-28 % ALIGNED)  # where the last tensor ends
    for length in range(len(WHOLE)):
        if length >= last:
            reading(place, WHOLE[:length])  # only padding is gone
            continue
        with pytest.raises(UserError, match=r"byte|empty"):
            reading(place, WHOLE[:length])


def with_tensors(*described: bytes, count: int | None = None, size: int = 4096) -> bytes:
    """A file of these descriptions and so many zeros."""
    front = parts.head(len(described) if count is None else count, 0) + b"".join(described)
    return front + bytes(-len(front) % ALIGNED + size)


def with_pair(key: bytes, value: bytes, count: int = 1) -> bytes:
    """A file of one pair of metadata."""
    return parts.head(0, count) + key + value


LARGE = 2**64 - 1
MALFORMED = {
    "empty": (b"", "is empty"),
    "magic": (b"GGML" + WHOLE[4:], "byte 0: a GGUF file begins with GGUF"),
    "version": (WHOLE[:4] + struct.pack("<I", 1) + WHOLE[8:], "byte 4: the file has version 1"),
    "big-endian": (WHOLE[:4] + struct.pack(">I", 3) + WHOLE[8:], "byte 4: the file is big-endian"),
    "tensors": (parts.head(LARGE, 0), "byte 8: 18446744073709551615 tensors"),
    "more tensors than described": (with_tensors(count=3, size=0), "byte 24: the name of a tensor is empty"),
    "pairs": (parts.head(0, 2**40), "byte 16: 1099511627776 pairs"),
    "more pairs than there are": (parts.head(0, 9), "byte 24: the length of a key takes 8 bytes"),
    "key length": (with_pair(struct.pack("<Q", LARGE), b""), "byte 24: a key is 18446744073709551615 bytes"),
    "key empty": (with_pair(parts.text(""), parts.typed(1)), "byte 24: a key is empty"),
    "key twice": (with_pair(parts.text("k"), parts.typed(1) + parts.text("k") + parts.typed(1), 2), "'k' comes twice"),
    "key not UTF-8": (with_pair(parts.text(b"\xff\xfe"), parts.typed(1)), "byte 24: a key is not UTF-8"),
    "value type": (with_pair(parts.text("k"), struct.pack("<I", 13)), "values of type 13"),
    "two lines": (with_pair(parts.text("k\n\x1b[31m"), struct.pack("<I", 13)), r"k\\n\\x1b\[31m has values of type 13"),
    "string length": (with_pair(parts.text("k"), struct.pack("<IQ", 8, 2**62)), "k takes 4611686018427387904 bytes"),
    "boolean": (with_pair(parts.text("k"), struct.pack("<IB", 7, 2)), "neither true nor false"),
    "array length": (with_pair(parts.text("k"), struct.pack("<IIQ", 9, 4, 2**61)), "k takes 9223372036854775808 bytes"),
    "array of strings": (with_pair(parts.text("k"), struct.pack("<IIQ", 9, 8, 2**22)), "k has 4194304 strings"),
    "array of arrays": (with_pair(parts.text("k"), struct.pack("<IIQ", 9, 9, 1)), "k is an array of arrays"),
    "alignment": (parts.file_of({"general.alignment": 24}, {}), "general.alignment is 24"),
    "alignment of text": (with_pair(parts.text("general.alignment"), parts.typed("x")), "general.alignment is 'x'"),
    "name length": (with_tensors(struct.pack("<Q", 65) + b"x" * 65), "the name of a tensor is 65 bytes"),
    "name twice": (
        with_tensors(parts.description("w", (1, 2), 0, 0), parts.description("w", (1, 2), 0, 32)), "'w' comes twice"
    ),
    "no dimensions": (with_tensors(parts.description("w", (), 0, 0)), "w has 0 dimensions"),
    "many dimensions": (with_tensors(parts.text("w") + struct.pack("<I", 2**31)), "w has 2147483648 dimensions"),
    "no rows": (with_tensors(parts.description("w", (0, 32), 0, 0)), r"w has shape \(0, 32\)"),
    "a broken block": (with_tensors(parts.description("w", (2, 48), 8, 0)), "rows are made of blocks of 32"),
    "another type": (with_tensors(parts.description("w", (2, 256), 21, 0)), "w is IQ3_S; MOYU supports.*llama-quantize"),
    "no type": (with_tensors(parts.description("w", (2, 256), 77, 0)), "w is of type 77"),
    "misaligned": (with_tensors(parts.description("w", (2, 32), 0, 8)), "offset 8, not a multiple of 32"),
    "overflowing": (with_tensors(parts.description("w", (LARGE, LARGE, LARGE, 2**62), 0, 0)), "w would end at byte"),
    "no name": (with_tensors(parts.description("", (2, 2), 0, 0)), "the name of a tensor is empty"),
    "offset beyond": (with_tensors(parts.description("w", (2, 2), 0, LARGE - 31)), "w would end at byte"),
    "overlapping": (
        with_tensors(parts.description("w", (2, 32), 0, 0), parts.description("v", (2, 2), 0, 32)), "v overlaps w"
    ),
    "the same bytes": (
        with_tensors(parts.description("w", (2, 2), 0, 0), parts.description("v", (2, 2), 0, 0)), "overlaps"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_with_the_reason(place, case):
    data, reason = MALFORMED[case]
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=reason):
            reading(place, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(st.lists(st.tuples(st.integers(0, len(WHOLE) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=3))
@example([(8, b"\xff" * 8)])
@example([(16, b"\xff" * 8)])
def test_damaged_files_are_read_or_refused(place, damages):
    data = bytearray(WHOLE)
    for at, new in damages:
        data[at : at + len(new)] = new
    file, refused = parts.outcome(lambda: reading(place, bytes(data)))
    if file is None:
        assert "byte" in refused
        return
    for name, entry in file.tensors.items():
        assert file.stored(name).numel() == entry.nbytes <= len(data)


@given(st.binary(max_size=200))
def test_anything_after_the_magic_is_read_or_refused(place, data):
    file, refused = parts.outcome(lambda: reading(place, b"GGUF\3\0\0\0" + data))
    assert file is not None or "byte" in refused


def test_what_is_no_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(UserError, match="cannot read"):
            read(path)
