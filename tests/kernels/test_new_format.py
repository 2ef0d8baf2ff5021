"""A new weight format is one object and one line: a toy of 6 bits, first by its values alone, then with a C++ header."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moyu import kernels, weights
from moyu.weights import named
from moyu.weights.grouped import Grouped, inverse

ROOT = Path(__file__).resolve().parents[2]


class Six(Grouped):
    """x_i = d * (q_i - 32) with q_i in 1 .. 63: a plane of four bits and one of two."""

    name = "six"
    bits = 6
    zero = 32
    rounds_inputs = False

    def rounded(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.abs().amax(2) / 31
        return ((groups * inverse(scale)[..., None]).round() + 32).byte(), scale

    def split(self, blocks: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("no file has it")


@pytest.fixture
def six(monkeypatch):
    monkeypatch.setitem(weights.FORMATS, "six", Six())  # the one line
    return named("six")


def test_a_format_without_kernels_computes_with_its_values(six):
    weight, x = six.store(torch.randn(40, 96)), torch.randn(3, 96)
    values, mask, inputs = weight.values(), torch.rand(3, 40) < 0.5, torch.rand(3, 96) < 0.5
    with kernels.count_bytes() as counted:
        y = kernels.rows(x, weight, mask)
    assert torch.allclose(y, torch.where(mask, x @ values.t(), 0), atol=1e-4)
    assert counted.total == int(mask.any(0).sum()) * (96 * 6 // 8 + 3 * 2)
    turned = weight.laid_out("columns")
    y = kernels.columns(x, turned, inputs)
    assert torch.allclose(y, torch.where(inputs, x, 0) @ values.t(), atol=1e-4)
    gate, up, down = (six.store(torch.randn(s) / 8) for s in ((64, 96), (64, 96), (96, 64)))
    mask = torch.rand(3, 64) < 0.5
    y = kernels.neurons(x, gate, up, down.laid_out("columns"), mask, act="silu")
    mid = torch.nn.functional.silu(x @ gate.values().t()) * (x @ up.values().t()) * mask
    assert torch.allclose(y, mid @ down.values().t(), atol=1e-4)
    if kernels.available()["cpu"] is None:
        with kernels.use("cpu"), pytest.raises(RuntimeError, match="no kernels for weights in six"):
            kernels.rows(x, weight)


HEADER = """
#pragma once
#include "formats/format.h"
namespace {
struct Six : Planar<6, HalfScales<false>, 32> {};
}  // namespace
"""

NATIVE = """
import sys, importlib.util
spec = importlib.util.spec_from_file_location("moyu.kernels._cpu", sys.argv[2])
sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.path.insert(0, sys.argv[1])
import torch
import test_new_format as toy
from moyu import kernels, weights
assert kernels.cpu.extension() is module and "six" in module.formats and module.isa() == "portable"

class Native(toy.Six):
    native = "six"
    rounds_inputs = True

six = weights.FORMATS["six"] = Native()
torch.manual_seed(0)
for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
    x, mask, inputs = torch.randn(3, 100).to(dtype), torch.rand(3, 64) < 0.5, torch.rand(3, 100) < 0.5
    gate, up, down = six.store(torch.randn(64, 100)), six.store(torch.randn(64, 100)), six.store(torch.randn(100, 64))
    calls = (
        lambda: kernels.rows(x, gate, mask), lambda: kernels.columns(x, gate.laid_out("columns"), inputs),
        lambda: kernels.neurons(x, gate, up, down.laid_out("columns"), mask, act="relu"),
        lambda: kernels.levels(x, gate.laid_out("planes"), inputs),
    )
    for call in calls:
        results = []
        for name in ("reference", "cpu"):
            with kernels.use(name), kernels.count_bytes() as counted:
                results.append((call().float(), counted.total))
        (expected, read), (found, native) = results
        assert read == native > 0
        assert (found - expected).norm() <= tolerance * expected.norm(), (dtype, (found - expected).norm() / expected.norm())
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_header_and_a_line_make_it_native(tmp_path):
    """The sources with one header and one line more, compiled without vector code and with checked arenas, against the reference."""
    if shutil.which("cmake") is None or importlib.util.find_spec("nanobind") is None or kernels.cpu.unavailable():
        pytest.skip("the extension cannot be built here")
    (tmp_path / "CMakeLists.txt").write_text(
        (ROOT / "CMakeLists.txt").read_text().replace("-O3", "-O1")
    )  # half a minute
    formats = shutil.copytree(ROOT / "src/moyu/kernels/csrc", tmp_path / "src/moyu/kernels/csrc") / "formats"
    (formats / "six.h").write_text(HEADER)
    (formats / "formats.def").write_text((formats / "formats.def").read_text() + "X(six, Six)\n")
    build = tmp_path / "build"
    configure = [
        "cmake",
        "-S",
        tmp_path,
        "-B",
        build,
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DMOYU_VECTORS=OFF",
        "-DCMAKE_BUILD_TYPE=Debug",
    ]
    for command in ([*configure, f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={build}"], ["cmake", "--build", build]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    extension = next(build.glob("_cpu.*.so"))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", NATIVE, Path(__file__).parent, extension],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
