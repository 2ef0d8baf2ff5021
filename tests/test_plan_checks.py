"""A plan whose tensors or numbers are not what its model needs is refused: when it is read, when it is applied, and at the kernels."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import safetensors.torch
import torch

from equality import plan_for
from moyu import UserError, methods
from moyu.engine.applied import Applied
from moyu.engine.generate import generate
from moyu.kernels import cpu
from moyu.plan import Plan
from plan_mutations import with_tensor
from tiny import build, tokens


def planned(name, **knobs):
    model = build("llama", torch.float32)
    return model, plan_for(model, methods.method(name, **knobs))


@pytest.fixture(scope="module")
def teal():
    return planned("teal")


BORDER = [
    ("was", "buffer.norms", lambda t: t[:1], "factors of"),
    ("estimate", "buffer.rest.quants", lambda t: torch.zeros(1, 100_000, dtype=t.dtype), "copy of"),
    ("estimate", "buffer.rest.scales", lambda t: t[:, :1], "copy of"),
    ("estimate", "bias", lambda t: t[:1], "bias of"),
    ("popularity", "buffer.popularity", lambda t: t[:1], "a mask is"),
]


@pytest.mark.parametrize(("name", "tensor", "change", "said"), BORDER)
def test_kernels_take_no_address_of_a_tensor_that_is_too_short(name, tensor, change, said):
    """Also where nobody has asked the plan whether it fits."""
    if cpu.unavailable() is not None:
        pytest.skip(cpu.unavailable())
    model, plan = planned(name)
    key = next(reversed(plan.parts))
    wrong = with_tensor(plan, key, tensor, change(plan.parts[key][1].tensors()[tensor]))
    with Applied(model, wrong, check=False) as applied:
        assert applied.native is not None
        with pytest.raises(ValueError, match=said):
            list(generate(applied, tokens(1, 6), max_new_tokens=4))
    with pytest.raises(UserError, match="does not fit 'tiny'"):
        Applied(model, wrong)


def test_kernels_that_run_alone_look_at_a_weight_in_groups():
    from moyu import kernels
    from moyu.weights import named

    stored = named("q8_0").store(torch.randn(64, 64)).laid_out("columns")
    mask = torch.ones(1, 64, dtype=torch.bool)
    for part, short in ((0, lambda t: t[:1]), (0, lambda t: t[:, :8]), (1, lambda t: t[:, :8])):
        tensors = list(stored.tensors)
        tensors[part] = short(tensors[part])
        wrong = type(stored)(stored.format, stored.order, tuple(tensors), stored.shape)
        with pytest.raises(ValueError, match="a tensor of weight is"):
            kernels.columns(torch.randn(1, 64), wrong, mask)


def written(plan, folder, header=None, tensors=None):
    """A plan's folder whose JSON or whose tensors have been changed, with the checksum of what is there."""
    plan.save(folder)
    found = json.loads((folder / "plan.json").read_text())
    if tensors is not None:
        payload = safetensors.torch.save(tensors(safetensors.torch.load((folder / "plan.safetensors").read_bytes())))
        (folder / "plan.safetensors").write_bytes(payload)
        found["tensors_sha256"] = hashlib.sha256(payload).hexdigest()
    if header is not None:
        header(found)
    (folder / "plan.json").write_text(json.dumps(found))
    return folder


def put(path, value):
    """A change of a header at a place in it."""

    def change(header):
        *way, last = path
        for step in way:
            header = header[step]
        header[last] = value

    return change


WRONG = {
    "threshold NaN": (("parts", 0, "rule"), {"threshold": math.nan}),
    "threshold inf": (("parts", 0, "rule"), {"threshold": math.inf}),
    "threshold word": (("parts", 0, "rule"), {"threshold": "much"}),
    "top_k of a billion": (("parts", 0, "rule"), {"top_k": 10**9}),
    "top_k below 0": (("parts", 0, "rule"), {"top_k": -1}),
    "top_k a number with a point": (("parts", 0, "rule"), {"top_k": 1.5}),
    "no rule": (("parts", 0, "rule"), {}),
    "units": (("parts", 0, "site", "units"), 10**30),
    "units none": (("parts", 0, "site", "units"), None),
    "linears none": (("parts", 0, "site", "linears"), None),
    "tap": (("parts", 0, "site", "reads"), "nowhere"),
    "knobs": (("knobs",), []),
    "method": (("method",), 3),
    "model": (("model",), {"name": "tiny"}),
    "calibration": (("calibration",), {"kv_bytes": [1]}),
    "parts": (("parts",), {}),
    "target": (("target_sparsity",), 1e999),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_with_a_wrong_number_is_refused_in_one_line(what, teal, tmp_path):
    with pytest.raises(UserError) as error:
        Plan.load(written(teal[1], tmp_path, header=put(*WRONG[what])))
    assert "\n" not in str(error.value) and "moyu calibrate" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", "{", "[" * 100_000, '{"format": ' * 5_000, '{"format": NaN}', "\x00", '{"format": {}}'],
)
def test_what_is_no_header_is_refused_in_one_line(text, teal, tmp_path):
    teal[1].save(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"plan\.json is truncated or not a plan"):
        Plan.load(tmp_path)


def test_a_file_with_other_tensors_is_refused_in_one_line(tmp_path):
    _, plan = planned("was")
    first = next(iter(plan.parts))
    for n, (change, said) in enumerate(
        (
            (lambda t: t | {f"{first}/buffer.norms": torch.full((64,), math.nan)}, "not finite"),
            (lambda t: t | {"layer9/buffer.norms": torch.ones(1)}, "of no site"),
            (lambda t: t | {f"{first}/outer": torch.ones(2, 2)}, "outer"),
        )
    ):
        with pytest.raises(UserError, match=said):
            Plan.load(written(plan, tmp_path / str(n), tensors=change))


def test_folders_may_be_words(teal, tmp_path):
    _, plan = teal
    assert Plan.load(str(plan.save(str(tmp_path / "p")))).hash == plan.hash
