"""Packed weights: the format in torch, the kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moyu.kernels import gpu_packed

CHECKS = Path(__file__).with_name("gpu_packed_checks.py")


@pytest.mark.parametrize(("bits", "steps"), [(8, 127), (4, 8)])
def test_packing_is_within_half_a_step_of_the_largest_weight(bits, steps):
    weight = torch.randn(20, 96, generator=torch.Generator().manual_seed(0))
    weight[3, 32:64] = 0
    packed = gpu_packed.pack(weight, bits)
    assert packed.shape == (20, 96) and packed.bits == bits and packed.row_bytes == 96 * bits // 8 + 6
    error = (gpu_packed.unpack(packed) - weight).abs().unflatten(1, (3, 32)).amax(-1)
    largest = weight.abs().unflatten(1, (3, 32)).amax(-1)
    # 4 bits reach 8 steps to one side and 7 to the other: the far end of the short side is a whole step off
    assert (error <= largest / steps * (0.51 if bits == 8 else 1.01)).all()
    assert gpu_packed.unpack(packed)[3, 32:64].eq(0).all()


def test_packing_again_changes_nothing():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for bits in (8, 4):
        once = gpu_packed.unpack(gpu_packed.pack(weight, bits))
        assert torch.allclose(gpu_packed.unpack(gpu_packed.pack(once, bits)), once, rtol=1e-3)


def test_what_cannot_be_packed_is_refused():
    for weight, bits in ((torch.ones(2, 40), 8), (torch.ones(2, 32), 5), (torch.ones(32), 4)):
        with pytest.raises(ValueError, match="multiple of 32"):
            gpu_packed.pack(weight, bits)


def test_without_a_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    weight = gpu_packed.pack(torch.ones(4, 32), 8)
    with pytest.raises(RuntimeError, match="gpu back end"):
        gpu_packed.rows(torch.ones(1, 32), weight)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CHECKS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == CHECKS.read_text().count("\ndef check_")
