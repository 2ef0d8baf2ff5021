"""The Triton kernels in Triton's interpreter, in a process of its own: the choice is made when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moyu import kernels

CHECKS = Path(__file__).with_name("gpu_checks.py")


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, CHECKS], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    names = [line.removeprefix("def ").removesuffix("():") for line in CHECKS.read_text().splitlines()]
    assert done.stdout.split() == [name for name in names if name.startswith("check_")]


def test_without_a_gpu_the_reason_and_the_remedy_are_said():
    if kernels.available()["gpu"] is None:
        pytest.skip("there is a GPU here")
    with pytest.raises(RuntimeError, match=r"moyu-llm\[gpu\]"):
        kernels.use("gpu").__enter__()
