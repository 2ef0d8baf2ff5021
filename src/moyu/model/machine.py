"""Where a model is to run and how its weights are kept: refused here before anything is loaded. Imports torch alone."""

from __future__ import annotations

from typing import cast

import torch

from moyu import kernels
from moyu.errors import UserError, check_one_of
from moyu.kernels import BackendName
from moyu.weights import QUANTISED, named

WEIGHTS = ("bf16", *QUANTISED)
WIDTH = 32  # of the product that asks a back end whether it can


def device_of(name: str) -> torch.device:
    """The device of this name; UserError where there is none, or where this torch cannot use it."""
    remedy = "`--device cpu` always works; cuda needs an NVIDIA GPU and a torch that is built for it"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"no device is called {name!r}", "write cpu, cuda, or cuda:1 for the second GPU") from error
    if device.type == "meta":
        raise UserError("device 'meta' cannot be used (it computes nothing)", remedy)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise UserError(f"device {name!r} cannot be used ({line})", remedy) from error
    return device


def backend_of(name: str) -> BackendName:
    """The back end of this name; UserError where there is none."""
    check_one_of("back end is", name, ("auto", *kernels.BACKENDS))
    return cast(BackendName, name)


def check_backend(backend: BackendName, device: str = "cpu", weights: str | None = None) -> None:
    """Refuse a back end that cannot be used here, or that cannot serve these weights on this device."""
    if backend_of(backend) == "auto":
        return
    if reason := kernels.available()[backend]:
        raise UserError(f"back end {backend!r} cannot be used here", reason)
    x = torch.zeros(1, WIDTH, dtype=torch.bfloat16, device=device_of(device))
    with kernels.use(backend):
        try:
            kernels.serves(x)
            if weights in QUANTISED:
                kernels.rows(x, named(weights).store(torch.zeros(WIDTH, WIDTH, device=x.device)))
        except RuntimeError as error:
            kept = f" with weights in {weights}" if weights in QUANTISED else ""
            raise UserError(
                f"back end {backend!r} cannot run on device {device!r}{kept}",
                "give it its own --device (gpu runs on cuda, cpu on cpu), or leave out --backend",
            ) from error


def check(device: str = "cpu", backend: BackendName = "auto", weights: str | None = None) -> None:
    """All three checks: the device, the back end on it, and the weights."""
    if weights is not None:
        check_one_of("weights are", weights, WEIGHTS)
    device_of(device)
    check_backend(backend, device, weights)
