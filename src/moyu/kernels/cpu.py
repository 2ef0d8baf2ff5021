"""The C++ kernels: float32, bfloat16 and float16 on the CPU, with AVX-512, AVX2 or portable code chosen at run time.

MOYU_ISA=avx512bf16|avx512vnni|avx512|avxvnni|avx2|portable asks for one of them. Threads: as many
as torch.get_num_threads() says at each call.
The bytes of weights and biases that were read are added up where they are read.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import statistics
import time
from typing import Any

import torch
from torch import Tensor

from moyu.kernels.backend import Backend, Neurons
from moyu.weights import Format, Plain, Stored, held

_REMEDY = "install moyu where there is a C++17 compiler (g++ or clang), or run `make setup` in a checkout"
try:
    from moyu.kernels import _cpu  # pyright: ignore[reportAttributeAccessIssue]

    _why_not: str | None = None
except (ImportError, RuntimeError) as error:  # not built, built for another Python, or an instruction set not to be had
    _cpu = None
    _why_not = f"the extension moyu.kernels._cpu did not load ({error}); {_REMEDY}"
    if "MOYU_ISA" in str(error):
        _why_not = str(error)

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMATS: dict[str, int] = {} if _cpu is None else {name: code for code, name in enumerate(_cpu.formats)}
_CODES: dict[str, int] = {} if _cpu is None else {name: code for code, name in enumerate(_cpu.activations)}
if _CODES:
    _CODES["gelu_new"] = _CODES["gelu_pytorch_tanh"] = _CODES["gelu_tanh"]


def unavailable() -> str | None:
    """Why this back end cannot be used here, with the remedy; None = it can."""
    return _why_not


def unsupported(x: Tensor) -> str | None:
    """Why it cannot serve tensors of x's device and dtype; None = it can."""
    if x.device.type != "cpu":
        return f"its tensors live on the CPU, x is on {x.device}"
    if x.dtype not in _DTYPES:
        return f"it has float32, bfloat16 and float16, x is {x.dtype}"
    return None


def forced() -> bool:
    """True where the environment names an instruction set, so that falling back to another back end would disobey."""
    return bool(os.environ.get("MOYU_ISA"))


def dtype_code(dtype: torch.dtype) -> int:
    """The extension's number of a dtype."""
    return _DTYPES[dtype]


def activation_code(act: str) -> int:
    """The extension's number of an activation."""
    return _CODES[act]


def format_code(format: Format) -> int:
    """The extension's number of a weight format."""
    return _FORMATS[format.native or ""]


class Cpu(Backend):
    """The C++ kernels."""

    name = "cpu"

    def why_not(self) -> str | None:
        return unavailable()

    def supports(self, op: str, format: Format, x: Tensor) -> str | None:
        if format.native is None or (_FORMATS and format.native not in _FORMATS):
            return f"it has no kernels for weights in {format.name}"
        return unsupported(x)

    def details(self) -> str:
        return f"{extension().isa()}, {torch.get_num_threads()} threads"

    def rows(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
        return _multiply(extension().rows, x, weight, mask, bias)

    def columns(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
        return _multiply(extension().columns, x, weight, mask, bias)

    def levels(self, x: Tensor, weight: Stored, mask: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        return _multiply(extension().levels, x, weight, mask, bias)

    def words(self, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
        return _multiply(extension().words, x, weight, mask, bias)

    def neurons(self, call: Neurons) -> tuple[Tensor, int]:
        given = None if call.given is None else _inner(call.given)
        call = call._replace(x=_inner(call.x), mask=_inner(call.mask), given=given)
        y = torch.empty((len(call.x), call.down.shape[0]), dtype=call.x.dtype)
        return y, extension().neurons(native_neurons(call, y))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x @ weight.T + bias``, (N, n) -> (N, q), of a plain weight whose rows or columns are contiguous."""
    order = "rows" if weight.stride(1) == 1 else "columns"
    return _multiply(getattr(extension(), order), x, held(weight, order), None, bias)[0]


def values(weight: Stored, dtype: torch.dtype, first: bool = False) -> Tensor:
    """A weight that is not plain, (q, n) in `dtype`: what `Stored.values` gives, in every bit, in a tenth of the time.

    first: what `Stored.first_values` gives; not of a weight by columns.
    """
    out = torch.empty(weight.shape, dtype=dtype)
    extension().values(native_weight(weight), first, _DTYPES[dtype], torch.get_num_threads(), out.data_ptr())
    return out


def native_weight(weight: Stored) -> Any:
    """A weight as the extension takes it; its addresses are those of the live tensors."""
    outputs, inputs = weight.shape
    codes, *scales = weight.tensors
    first = scales[1] if weight.order in ("planes", "parted") else None
    by_step = 1 if isinstance(weight.format, Plain) and weight.order == "columns" else 0
    return extension().Weight(
        format=weight.format.native,
        order=weight.order,
        outputs=outputs,
        inputs=inputs,
        address=codes.data_ptr(),
        stride=codes.stride(by_step) * codes.element_size(),
        scales=scales[0].data_ptr() if scales else 0,
        scales_stride=scales[0].stride(0) * scales[0].element_size() if scales else 0,
        first=0 if first is None else first.data_ptr(),
        first_stride=0 if first is None else first.stride(0),
    )


def native_neurons(call: Neurons, out: Tensor) -> Any:
    """The arguments of the extension's `neurons`; addresses are those of the live tensors, whose rows are contiguous."""
    x, gate, up, down, mask, act, gate_bias, up_bias, down_bias, given = call
    return extension().NeuronsArgs(
        dtype=_DTYPES[x.dtype],
        act=_CODES[act],
        threads=torch.get_num_threads(),
        rows=len(x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        gate=None if gate is None else native_weight(gate),
        up=None if up is None else native_weight(up),
        down=native_weight(down),
        mask=mask.data_ptr(),
        mask_stride=mask.stride(0),
        gate_bias=_address(gate_bias),
        up_bias=_address(up_bias),
        down_bias=_address(down_bias),
        given=_address(given),
        given_stride=0 if given is None else given.stride(0),
        out=out.data_ptr(),
    )


def _multiply(kernel: Any, x: Tensor, weight: Stored, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, int]:
    x = _inner(x)
    mask = None if mask is None else _inner(mask)
    y = torch.empty((len(x), weight.shape[0]), dtype=x.dtype)
    arguments = extension().LinearArgs(
        dtype=_DTYPES[x.dtype],
        threads=torch.get_num_threads(),
        rows=len(x),
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weight=native_weight(weight),
        mask=_address(mask),
        mask_stride=0 if mask is None else mask.stride(0),
        bias=_address(bias),
        out=y.data_ptr(),
    )
    return y, kernel(arguments)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def empty_weights(*shape: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for laid-out weights, on huge pages where the system grants them.

    Scattered pieces then miss the TLB less: 5 to 10 % at kept 0.3 where the memory is fast.
    """
    size = math.prod(shape) * dtype.itemsize
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or size < 4 << 20:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(advice)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class ReadCeiling:
    """How fast torch.get_num_threads() threads read memory here: several loops, timed in between other measurements.

    A shared machine's memory changes its rate from second to second, so hold medians against medians of the same seconds.
    """

    def __init__(self, bytes: int = 256 << 20) -> None:
        """`bytes` should be several times the last-level cache. ValueError for less than 1 MiB."""
        if bytes < 1 << 20:
            raise ValueError(f"ReadCeiling needs bytes >= {1 << 20}, got {bytes}")
        self._buffer = torch.ones(bytes // 4, dtype=torch.float32)
        self._seconds: list[list[float]] = [[] for _ in range(1 if _cpu is None else _cpu.read_loops)]

    def sample(self, times: int = 1) -> ReadCeiling:
        """Run each loop once, or so many times."""
        for _ in range(times):
            for loop, seconds in enumerate(self._seconds):
                start = time.perf_counter()
                self._read(loop)
                seconds.append(time.perf_counter() - start)
        return self

    def _read(self, loop: int) -> None:
        if _cpu is None:
            self._buffer.sum()
        else:
            _cpu.read(self._buffer.data_ptr(), self._buffer.nbytes, loop, torch.get_num_threads())

    @property
    def gb_s(self) -> float:
        """The best loop's median, in GB/s (10^9)."""
        return self._buffer.nbytes / min(map(statistics.median, self._seconds)) / 1e9

    @property
    def best_gb_s(self) -> float:
        """The best sample of the best loop, in GB/s."""
        return self._buffer.nbytes / min(map(min, self._seconds)) / 1e9


def _inner(activation: Tensor) -> Tensor:
    """Activations and masks (not weights) are copied where their rows are not contiguous."""
    return activation if activation.stride(1) == 1 else activation.contiguous()


def extension():
    """The compiled module. Raises RuntimeError with the remedy where there is none."""
    if _cpu is None:
        raise RuntimeError(f"The cpu kernels are not available: {_why_not}")
    return _cpu
