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


TYPES = {
    "x": "*bf16", "codes": "*u8", "words": "*i32", "plain": "*u8", "halves": "*fp16", "y": "*bf16", "sums": "*fp32", "base": "*fp32",
    "first": "*i32", "second": "*i32", "wide": "*i64", "shorts": "*i16", "picks": "*i32", "partial": "*fp32", "tickets": "*i32",
    "mask": "*i8", "times": "fp32", "less": "fp32", "centre": "fp32", "middle": "fp32",
}  # fmt: skip


def compiled(kernel, arch, types=None, options=None, **fixed):
    """Triton compiles without a GPU; fixed: constant arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = [parameter.name for parameter in kernel.params]
    known = TYPES | (types or {})
    signature = {name: known.get(name, "i32") for name in names} | dict.fromkeys(fixed, "constexpr")
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options or {}).asm["cubin"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_k", "q6_k"])
def test_they_compile_for_ampere_and_hopper(arch, name):
    """What the interpreter takes need not compile."""
    pytest.importorskip("triton")
    from moyu.kernels.gpu import blocks, planes
    from moyu.kernels.gpu.common import KINDS
    from moyu.weights import FORMATS
    from moyu.weights.planes import SPLITS

    kind, bits = KINDS[name], FORMATS[name].bits
    first, further = SPLITS[bits]
    assert compiled(
        blocks._one_row.fn, arch, {"x": "*i64"}, mask=None, bias=None, KIND=kind, BITS=bits, HALF=False, WIDE=True, BLOCK_J=4,
        BLOCK_C=128, STAGES=3,
    )  # fmt: skip
    codes = {"codes": "*i8"} if name == "q8_0" else {}
    assert compiled(blocks._rows.fn, arch, codes, mask=None, bias=None, KIND=kind, BLOCK_J=32, BLOCK_G=4)
    assert compiled(
        planes._levels.fn, arch, bias=None, KIND=kind, FIRST=first, FURTHER=further, BLOCK_T=4, BLOCK_U=4, GROUPS=8, BLOCK_L=32,
        CHUNK=128, STAGES=3,
    )  # fmt: skip
    if first == 4:
        second = {"second": "*u8"}
        assert compiled(
            blocks._further, arch, second, KIND=kind, BITS=further, BLOCK_J=4, BLOCK_G=4, options={"num_warps": 1}
        )
