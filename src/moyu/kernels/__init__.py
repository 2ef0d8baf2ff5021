"""Kernels that read only the weights that a mask keeps: whole neurons, rows, columns, or the further bits of columns or rows.

The five are ``torch.library`` operators (``torch.ops.moyu.neurons``, ``rows``, ``columns``, ``levels``, ``words``) with fake
implementations, and these thin functions are in front. Any number of rows N is correct; speed is for small decode batches: all rows that
keep a piece of weight use it while it is in the cache, so it is read once (once per 32 rows in the ``cpu`` back end).

Weights are tensors of x's dtype, or ``weights.Stored`` in any format. With those of GGUF files x is rounded to 8 bits, with one scale
for every 32 values, and products are sums of integers.

Back ends: ``reference`` (plain torch, defines the meaning), ``cpu`` (C++) and ``gpu`` (Triton). ``use("cpu")`` insists on
one; ``auto`` takes the first of ``BACKENDS`` that can be used here and has the format, the dtype and the device of the call;
``describe()`` says which.
"""

import torch
from torch import Tensor

from moyu.kernels import choosing, cpu, gpu, operators, reference
from moyu.kernels.backend import Backend
from moyu.kernels.checks import activation
from moyu.kernels.choosing import (
    BACKENDS,
    BackendName,
    ByteCounter,
    available,
    count,
    count_bytes,
    describe,
    require,
    serves,
    use,
)
from moyu.kernels.cpu import ReadCeiling
from moyu.kernels.dense import helps as product_helps
from moyu.kernels.dense import product
from moyu.kernels.reference import ACTIVATIONS
from moyu.weights import Plain, Stored

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "Backend",
    "BackendName",
    "ByteCounter",
    "ReadCeiling",
    "activation",
    "available",
    "columns",
    "columns_above",
    "count",
    "count_bytes",
    "cpu",
    "describe",
    "first_values",
    "gpu",
    "levels",
    "neurons",
    "product",
    "product_helps",
    "reference",
    "require",
    "rows",
    "serves",
    "use",
    "values",
    "whole",
    "words",
]


def neurons(
    x: Tensor,
    gate: Tensor | Stored | None,
    up: Tensor | Stored | None,
    down: Tensor | Stored,
    mask: Tensor,
    *,
    act: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    given: Tensor | None = None,
) -> Tensor:
    """The feed-forward network of the kept neurons: ``y = sum over kept j of value_j * down[:, j] + down_bias``.

    =============  ==================================================  ==================================
    passed         value of neuron j                                   for
    =============  ==================================================  ==================================
    gate, up       act(gate_j · x + gate_bias_j) * (up_j · x + up_bias_j)  gated feed-forward networks
    up             act(up_j · x + up_bias_j)                           plain ones
    up, given      given_j * (up_j · x + up_bias_j)                    gate computed first (CATS)
    gate, given    act(gate_j · x + gate_bias_j) * given_j             up computed first (COUNTDOWN)
    =============  ==================================================  ==================================

    Args:
        x: (N, d).
        gate: (f, d) or None, ``stride(1) == 1``, any row stride.
        up: (f, d) or None, ``stride(1) == 1``, any row stride.
        down: (d_out, f), ``stride(0) == 1``, any column stride. Fastest is the layout ``neuron_major``: gate, up and
            down are views of one storage (f, k, d), so that what a neuron needs is side by side. Or all of them are
            stored in formats that are not plain, gate and up by rows and down by columns.
        mask: (N, f) bool, True = computed. The weights of neurons that no row keeps are not read.
        act: a name in ``ACTIVATIONS``.
        gate_bias, up_bias: (f,) or None.
        down_bias: (d_out,) or None; always added.
        given: (N, f) or None, the factor that the caller has already computed; skipped entries are ignored.

    Returns:
        (N, d_out) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError: a shape, stride, combination or activation that does not fit.
        TypeError: dtypes or devices that differ (all floating tensors share x's), a mask that is not bool.
    """
    return operators.neurons(
        x,
        *operators.opened("neurons", "gate", gate, "rows"),
        *operators.opened("neurons", "up", up, "rows"),
        *operators.opened("neurons", "down", down, "columns"),
        mask,
        act,
        gate_bias,
        up_bias,
        down_bias,
        given,
    )


def rows(x: Tensor, weight: Tensor | Stored, mask: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` where the mask keeps an output; skipped outputs are exactly 0, without bias.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(1) == 1``, any row stride; or stored by rows.
        mask: (N, q) bool, True = computed, or None = all.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    return operators.rows(x, *operators.opened("rows", "weight", weight, "rows"), mask, bias)


def columns(x: Tensor, weight: Tensor | Stored, mask: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``sum over kept i of x_i * weight[:, i] + bias``: skipped inputs count as 0, their columns are not read.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(0) == 1`` (layout ``input_major``: weight.T is contiguous), any column stride; or stored by
            columns.
        mask: (N, n) bool, True = used.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    return operators.columns(x, *operators.opened("columns", "weight", weight, "columns"), mask, bias)


def levels(x: Tensor, weight: Stored, mask: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """``sum over i of x_i * w_i + bias``, w_i all bits of column i where the mask chooses input i, else its first bits.

    Args:
        x: (N, n).
        weight: (q, n), stored in planes.
        mask: (N, n) bool, True = all bits. The further bits of inputs that no row chooses are not read.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    return operators.levels(x, *operators.opened("levels", "weight", weight, "planes"), mask, bias)


def words(x: Tensor, weight: Stored, mask: Tensor | None = None, *, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` with all bits of the outputs that the mask keeps, and with the first bits of the others.

    Args:
        x: (N, n).
        weight: (q, n), parted.
        mask: (N, q) bool, True = all bits, or None = all bits of all outputs: what `rows` gives for the weight by rows, in every bit.
            The further bits of outputs that no row keeps are not read.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous; sums are taken in float32 (float64 for float64).

    Raises:
        ValueError, TypeError: as ``neurons``.
    """
    return operators.words(x, *operators.opened("words", "weight", weight, "parted"), mask, bias)


def whole(x: Tensor, weight: Tensor | Stored, *, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, (N, n) -> (N, q), nothing skipped, however a stored weight lies; of a plain one ``stride(1) == 1``."""
    if not isinstance(weight, Stored) or weight.order == "rows":
        return rows(x, weight, bias=bias)
    if weight.order == "parted":
        return words(x, weight, bias=bias)
    every = torch.ones(x.shape, dtype=torch.bool, device=x.device)
    return (columns if weight.order == "columns" else levels)(x, weight, every, bias=bias)


def values(weight: Stored, dtype: torch.dtype) -> Tensor:
    """The weight (q, n), dequantised, in `dtype`: by the C++ kernels where they read its format, else by the format itself."""
    x = torch.empty(0, 0, dtype=dtype, device=weight.device)
    if isinstance(weight.format, Plain) or choosing.choose("rows", weight.format, x).name != "cpu":
        return weight.values(dtype)
    return cpu.values(weight, dtype)


def first_values(weight: Stored, dtype: torch.dtype) -> Tensor:
    """What the first bits of a weight stand for, (q, n) in `dtype`, however it lies; `weights.planes` says which bits they are."""
    x = torch.empty(0, 0, dtype=dtype, device=weight.device)
    if choosing.choose("rows", weight.format, x).name != "cpu" or not weight.format.splits:
        return weight.laid_out("planes").first_values(dtype)
    return cpu.values(weight.laid_out("rows") if weight.order == "columns" else weight, dtype, first=True)


def columns_above(x: Tensor, weight: Tensor, thresholds: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """`columns` where |x_i| > thresholds[o] decides whether output o uses input i; decided on load by ``gpu``.

    Projections that share an input can lie side by side in one weight, each with a threshold of its own.

    Args:
        x: (N, n).
        weight: (q, n), ``stride(0) == 1``, any column stride.
        thresholds: (q,) float32, the same for 256 outputs in a row at least; values are compared in x's dtype.
        bias: (q,) or None.

    Returns:
        (N, q) in x's dtype, contiguous.
    """
    return operators.columns_above(x, weight, thresholds, bias)
