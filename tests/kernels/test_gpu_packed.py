"""Packed weights: their kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moyu import kernels
from moyu.weights import named

CHECKS = Path(__file__).with_name("gpu_packed_checks.py")


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_gpu_the_reference_serves(bits):
    weight, x = named(f"packed{bits}").store(torch.randn(4, 32)), torch.randn(2, 32)
    mask = torch.tensor([[True, False, True, True], [False, False, True, True]])
    with kernels.count_bytes() as counted:
        y = kernels.rows(x, weight, mask)
    assert torch.allclose(y, torch.where(mask, x @ weight.values().t(), 0), atol=1e-5)
    assert counted.total == 3 * weight.row_bytes
    if kernels.available()["cpu"] is None:
        with kernels.use("cpu"), pytest.raises(RuntimeError, match=f"no kernels for weights in packed{bits}"):
            kernels.rows(x, weight)


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CHECKS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == CHECKS.read_text().count("\ndef check_")
