"""Dense products of many rows: the same values in every layout, whichever way this processor multiplies."""

import pytest
import torch
from kernel_cases import assert_close, linear_truth

from moyu import kernels
from moyu.kernels import dense


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rows", [1, 9, 32, 33, 70])
def test_products_of_every_layout(monkeypatch, rows, dtype, fast):
    monkeypatch.setattr(dense, "_torch_is_fast", lambda asked: fast or asked == torch.float32)
    monkeypatch.setattr(dense, "BLOCK", 1000)  # several blocks, and a last one that is smaller
    x, bias = torch.randn(rows, 48).to(dtype), torch.randn(70).to(dtype)
    layouts = {
        "row_major": torch.randn(70, 48).to(dtype),
        "input_major": torch.randn(48, 70).to(dtype).t(),
        "neuron_major": torch.randn(70, 3, 48).to(dtype)[:, 1],
        "turned": torch.randn(48, 3, 70).to(dtype)[:, 2].t(),
        "neither": torch.randn(70, 96).to(dtype)[:, ::2],
    }
    with torch.no_grad():
        for weight in layouts.values():
            for added in (None, bias):
                truth = linear_truth(x, weight, None, added, "rows")
                assert_close(kernels.product(x, weight, added), truth)
                out = torch.empty(rows, 70, dtype=dtype)
                assert kernels.product(x, weight, added, out=out).data_ptr() == out.data_ptr()
                assert_close(out, truth)


def test_gradients_go_through_torch():
    weight = torch.nn.Parameter(torch.randn(7, 40).bfloat16())
    x = torch.randn(50, 40).bfloat16()
    assert not kernels.product_helps(x)
    kernels.product(x, weight).sum().backward()
    assert weight.grad is not None
