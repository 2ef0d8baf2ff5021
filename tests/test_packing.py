"""MOYU's own quantiser, from a matrix to a file that is loaded, scored and continued."""

import json

import gguf
import numpy as np
import pytest
import torch

from moyu.commands import words
from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.model.gguf import loading as files
from moyu.model.gguf.converting import convert
from moyu.model.gguf.reader import read
from moyu.model.gguf.tokenizer import tokenizer_of
from moyu.model.gguf.writing import Writer
from moyu.packing import choosing, packer
from moyu.packing.files import make
from moyu.weights import FORMATS


def matrix(q: int, n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (q, n), some of whose inputs matter more, and E[x x'] of inputs that go together."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, 24, generator=generator) @ torch.randn(24, n, generator=generator) * 0.3
    x += torch.randn(2048, n, generator=generator) * torch.exp(0.8 * torch.randn(n, generator=generator))
    return torch.randn(q, n, generator=generator) * 0.02, x.t() @ x / len(x)


def lost(weight: torch.Tensor, values: torch.Tensor, second: torch.Tensor) -> float:
    change = weight - values
    return float((change @ second * change).sum())


@pytest.mark.parametrize("kind", packer.TYPES)
def test_blocks_are_decoded_to_the_values_that_were_chosen(kind):
    """In every bit, by MOYU's reader and by the reference decoder."""
    weight, second = matrix(5, 512)
    weight[1], weight[2, 256:] = 0.0, 3e4  # rows of zeros and of large numbers
    values, blocks, error = packer.rounded(weight, kind, second, None)
    reference = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    assert torch.equal(torch.from_numpy(reference.astype(np.float32)), values)
    assert torch.isfinite(values).all()
    assert torch.equal(values[1], torch.zeros(512))
    assert error.kind == kind


@pytest.mark.parametrize("kind", packer.TYPES)
def test_fitting_to_inputs_beats_rounding_each_weight(kind):
    weight, second = matrix(48, 256)
    fitted = lost(weight, packer.rounded(weight, kind, second, None)[0], second)
    alone = lost(weight, packer.rounded(weight, kind, None, None)[0], second)
    assert fitted < 0.6 * alone


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0"])
def test_rounding_each_weight_is_no_worse_than_the_reference_quantiser(kind):
    weight, _ = matrix(48, 256)
    number = gguf.GGMLQuantizationType[kind.upper()]
    theirs = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), number), number))
    ours = packer.rounded(weight, kind, None, None)[0]
    assert (weight - ours).square().sum() <= 1.001 * (weight - theirs).square().sum()


def test_moving_never_makes_it_worse():
    from moyu.packing import descent, feedback
    from moyu.packing.grid import Grid

    for kind in ("q4_1", "q4_k", "q6_k"):
        weight, second = matrix(32, 512, seed=3)
        second += 0.01 * torch.eye(512)
        place = feedback.place(weight.t().contiguous(), Grid(FORMATS[kind]), feedback.factor(second))  # pyright: ignore
        before = lost(weight, place.values().t(), second)
        for _ in range(4):
            descent.sweep(place, weight.t().contiguous(), second)
            after = lost(weight, place.values().t(), second)
            assert after <= before * (1 + 1e-4)  # float32 sums of 512 products
            before = after


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The embedded model as a GGUF file of 16 bits, its model and tokenizer."""
    loaded = loading.load("swiglu")
    path = tmp_path_factory.mktemp("whole") / "swiglu.gguf"
    return convert(loaded.model, loaded.tokenizer, path, "swiglu"), loaded  # pyright: ignore


def test_a_converted_checkpoint_is_the_same_model(whole):
    path, loaded = whole
    model, tokenizer = files.load(path, torch.float32)
    text = "def main():\n    return 12 + x  # done\n"
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    assert torch.equal(tokenizer(text, return_tensors="pt")["input_ids"], ids)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, loaded.model(ids).logits, atol=1e-4)
    assert len(gguf.GGUFReader(path).tensors) == len(read(path).tensors)


def windows(path, count: int = 8) -> Windows:
    from moyu.model.zoo import corpus

    text = "".join(d.text for d in corpus.held_out("validation", max_bytes=40_000))
    ids = tokenizer_of(read(path))(text, add_special_tokens=False, verbose=False)["input_ids"]
    return Windows(torch.tensor(ids[: 128 * count]).view(count, 128), 0, {})  # pyright: ignore


def kl(model, loaded, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        p, q = (m(tokens).logits.float().log_softmax(-1) for m in (loaded.model, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_a_packed_model_is_nearer_than_one_rounded_weight_by_weight(whole, tmp_path):
    path, loaded = whole
    given = windows(path, 12)
    fit, held = Windows(given.tokens[:8], 0, {}), given.tokens[8:]
    file = read(path)
    errors = packer.pack(file, tmp_path / "packed.gguf", packer.kinds(file, "q4_0"), fit)
    assert set(errors) == set(packer.kinds(file, "q4_0"))
    packed = files.load_model(read(tmp_path / "packed.gguf"))
    plain = loading.load("swiglu")
    for name, module in packer.linears_of(file, plain.model).items():
        if name in errors:
            number = gguf.GGMLQuantizationType.Q4_0
            blocks = gguf.quants.quantize(module.weight.detach().float().numpy(), number)
            module.weight.data = torch.from_numpy(gguf.quants.dequantize(blocks, number))
    assert kl(packed, loaded, held) < 0.7 * kl(plain.model, loaded, held)


def test_bits_are_kept_and_spent_where_they_count(whole):
    path, _ = whole
    chosen = choosing.choose(read(path), windows(path, 2), 5.0)
    total, weights = packer.weight_bytes(read(path), chosen)
    assert 4.7 < 8 * total / weights <= 5.0
    assert len(set(chosen.values())) > 1
    with pytest.raises(UserError, match=r"2.6 bits a weight are out of reach: the smallest types take"):
        choosing.cheapest(read(path), {name: {"q4_0": 1.0} for name in chosen}, 2.6)


def test_the_command_packs_what_other_commands_read(tmp_path, capsys):
    from typer.testing import CliRunner

    from moyu.commands.cli import app

    out = tmp_path / "small.gguf"
    asked = [
        "pack",
        "swiglu",
        "--type",
        "q4_k",
        "--head",
        "q6_k",
        "--windows",
        "4",
        "--window",
        "64",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(app, [*asked, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["bytes"] == out.stat().st_size
    assert [p.name for p in tmp_path.iterdir()] == ["small.gguf"]
    done = CliRunner().invoke(app, ["generate", str(out), "--prompt", "def f(", "--new-tokens", "4", "--raw"])
    assert done.exit_code == 0, done.output
    plans = ["eval", str(out), "--method", "levels", "--window", "64", "--prompt-tokens", "32", "--json"]
    done = CliRunner().invoke(app, plans)
    assert done.exit_code == 0, done.output
    with pytest.raises(UserError, match="quantised already"):
        make(str(out), tmp_path / "again.gguf", kind="q4_0", window=64, windows=2)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"bits": 5.0, "kind": "q4_0"}, "give one of them"),
        ({"head": "q4_0"}, "give --type"),
        ({"out": "packed.bin"}, "packed.gguf"),
        ({"out": "missing/packed.gguf"}, "make the folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(asked, says, tmp_path):
    out = tmp_path / asked.pop("out", "packed.gguf")
    with pytest.raises(UserError, match=says):
        make("swiglu", out, **asked)
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused_with_the_way_out(tmp_path):
    with pytest.raises(UserError, match="convert_hf_to_gguf"):
        make("relu", tmp_path / "packed.gguf", kind="q4_0", window=64, windows=2)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_fails_leaves_nothing(tmp_path):
    (tmp_path / "kept.gguf").write_bytes(b"before")
    with pytest.raises(ValueError, match="were not written"), Writer(tmp_path / "kept.gguf", {}, {"a": ((2,), "F32")}):
        pass
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"before"]


def test_the_words_of_the_command_line_are_the_types():
    assert words.PACKED == packer.TYPES
