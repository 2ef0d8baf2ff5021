"""Formats of GGUF files on a GPU: their kernels in Triton's interpreter, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).with_name("gpu_blocks_checks.py")


@pytest.mark.slow
def test_the_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, CHECKS], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == CHECKS.read_text().count("\ndef check_")


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(("rows", "outputs", "groups"), [(1, 2, 32), (16, 32, 4)])
def test_they_compile_for_ampere_and_hopper(arch, rows, outputs, groups):
    """What the interpreter takes need not compile; Triton compiles without a GPU."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from moyu.kernels.gpu import blocks
    from moyu.kernels.gpu.common import KINDS

    kernel = blocks._rows.fn
    names = [parameter.name for parameter in kernel.params]
    for kind in KINDS.values():
        types = {"x": "*bf16", "codes": "*u8" if kind else "*i8", "plain": "*u8", "halves": "*fp16", "y": "*bf16"}
        fixed = {"mask": None, "bias": None, "KIND": kind, "ROWS": rows, "BLOCK_J": outputs, "BLOCK_G": groups}
        signature = {name: types.get(name, "i32") for name in names} | dict.fromkeys(fixed, "constexpr")
        constants = {(names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(kernel, signature, constexprs=constants)
        assert compile(source, target=GPUTarget("cuda", arch, 32)).asm["cubin"]
