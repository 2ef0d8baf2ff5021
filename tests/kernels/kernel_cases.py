"""Cases for the kernels' tests, their float64 truth by plain loops over pieces, and the comparison that decides."""

import os
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moyu import kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative to the sum of the magnitudes of what was added up: fp32 accumulation, and for 16 bits the output's rounding.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}
FORMS = ("gated", "plain", "gate_given", "up_given")


def examples(usual: int) -> int:
    """How many random cases a property has: scripts/fuzz.py asks for more than usual."""
    return int(os.environ.get("KERNEL_EXAMPLES", usual))


def one_candidate(*modules: object) -> dict[object, list]:
    """Let every tuned kernel of these modules take its first candidate: a GPU else compiles and times all of them for each case.

    Returns what candidates each had.
    """
    tuned = [kernel for module in modules for kernel in vars(module).values() if hasattr(kernel, "configs")]
    had = {kernel: list(kernel.configs) for kernel in tuned}
    for kernel in tuned:
        del kernel.configs[1:]
    return had


@dataclass(frozen=True)
class Neurons:
    """The arguments of one call of ``kernels.neurons``."""

    x: Tensor
    gate: Tensor | None
    up: Tensor | None
    down: Tensor
    mask: Tensor
    act: str = "silu"
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    given: Tensor | None = None

    def run(self) -> Tensor:
        return kernels.neurons(**vars(self))

    def double(self) -> "Neurons":
        """The same numbers in float64, in the same strides' order."""
        return replace(self, **{k: _double(v) for k, v in vars(self).items() if isinstance(v, Tensor)})

    def truth(self) -> tuple[Tensor, Tensor]:
        """The output in float64 by a loop over rows and kept neurons, and the magnitude of what was added up."""
        c = self.double()
        y = torch.zeros(c.x.shape[0], c.down.shape[0], dtype=torch.float64)
        size = torch.full_like(y, 1e-30)
        act = kernels.activation(self.act)
        for n in range(y.shape[0]):
            own = self.mask[n]
            value = torch.ones(int(own.sum()), dtype=torch.float64)
            if c.gate is not None:
                value = value * act(c.gate[own] @ c.x[n] + (0 if c.gate_bias is None else c.gate_bias[own]))
            if c.up is not None:
                u = c.up[own] @ c.x[n] + (0 if c.up_bias is None else c.up_bias[own])
                value = value * (act(u) if c.gate is None and c.given is None else u)
            if c.given is not None:
                value = value * c.given[n][own]
            y[n] = c.down[:, own] @ value + (0 if c.down_bias is None else c.down_bias)
            size[n] += c.down[:, own].abs() @ value.abs() + (0 if c.down_bias is None else c.down_bias.abs())
        return y, size


def make_neurons(n, d, f, d_out=None, dtype=torch.float32, form="gated", act="silu", layout="neuron_major",
                 density=0.4, biases=True, seed=0) -> Neurons:  # fmt: skip
    """A random case. density 0 and 1 are exact; layout: neuron_major, separate, or padded (rows longer than d)."""
    generator = torch.Generator().manual_seed(seed)
    d_out = d if d_out is None else d_out

    def draw(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    parts = {"gated": 2, "plain": 1, "gate_given": 1, "up_given": 1}[form]
    if layout == "neuron_major" and d_out == d:
        storage = draw(f, parts + 1, d, scale=d**-0.5)
        first, second, down = storage[:, 0], storage[:, parts - 1], storage[:, parts].T
    else:
        pad = 5 if layout == "padded" else 0
        first, second = (draw(f, d + pad, scale=d**-0.5)[:, :d] for _ in range(2))
        down = draw(f, d_out + pad)[:, :d_out].T
    has_gate, has_up = form in ("gated", "gate_given"), form != "gate_given"
    return Neurons(
        x=draw(n, d),
        gate=first if has_gate else None,
        up=second if has_up else None,
        down=down,
        mask=make_mask(n, f, density, generator),
        act=act,
        gate_bias=draw(f) if biases and has_gate else None,
        up_bias=draw(f) if biases and has_up else None,
        down_bias=draw(d_out) if biases else None,
        given=draw(n, f) if form.endswith("given") else None,
    )


def make_mask(n: int, units: int, density: float, generator: torch.Generator | None = None) -> Tensor:
    return torch.rand(n, units, generator=generator) < density


def linear_truth(x: Tensor, weight: Tensor, mask: Tensor | None, bias: Tensor | None, by: str) -> tuple[Tensor, Tensor]:
    """rows or columns in float64 and the magnitude of what was added up; skipped pieces are never touched."""
    x, weight = x.double(), weight.double()
    y = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.float64)
    size = torch.full_like(y, 1e-30)
    for n in range(x.shape[0]):
        outputs, inputs = torch.ones(weight.shape[0], dtype=torch.bool), torch.ones(x.shape[1], dtype=torch.bool)
        if mask is not None and by == "rows":
            outputs = mask[n]
        elif mask is not None:
            inputs = mask[n]
        w, v = weight[outputs][:, inputs], x[n][inputs]
        y[n, outputs] = w @ v + (0 if bias is None else bias.double()[outputs])
        size[n, outputs] += w.abs() @ v.abs() + (0 if bias is None else bias.double().abs()[outputs])
    return y, size


def assert_close(y: Tensor, truth: tuple[Tensor, Tensor], dtype: torch.dtype | None = None) -> None:
    """Every element within the dtype's tolerance of the float64 truth; NaN and infinities fail.

    Below the dtype's smallest normal number rounding is absolute, as coarse as it is there.
    """
    dtype = y.dtype if dtype is None else dtype
    expected, size = truth
    size = size.clamp_min(torch.finfo(dtype).tiny)
    assert y.shape == expected.shape and y.is_contiguous()
    error = (y.double() - expected).abs() / size
    assert torch.isfinite(y).all(), "the output is not finite"
    assert error.numel() == 0 or error.max() <= TOLERANCE[dtype], f"relative error {error.max().item():.2e}"


def _double(tensor: Tensor) -> Tensor:
    """In float64 with each dimension's stride in the same order, so that a column stays contiguous."""
    if tensor.dtype == torch.bool:
        return tensor
    if tensor.ndim == 2 and tensor.stride(0) < tensor.stride(1):
        return tensor.T.double().contiguous().T
    return tensor.double().contiguous()
