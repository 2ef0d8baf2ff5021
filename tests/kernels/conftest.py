"""A test that takes `backend` runs on each back end; cpu is skipped, by name, where the extension was not built."""

import os
import sys

import pytest

from moyu import kernels

sys.path.insert(
    0, os.path.dirname(__file__)
)  # kernel_cases is imported by the tests, and --import-mode=importlib adds no path


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    reason = kernels.available()[request.param]
    if reason is not None:
        pytest.skip(reason)
    with kernels.use(request.param):
        yield request.param


@pytest.fixture
def needs_cpu():
    if kernels.available()["cpu"] is not None:
        pytest.skip(kernels.available()["cpu"])
