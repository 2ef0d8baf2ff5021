"""What every test shares: no network, a fixed seed, and examples that are the same in every run."""

import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: tests download nothing
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from hypothesis import settings

# No deadline: the first call of an operator can take seconds. To look further: `pytest --hypothesis-profile=explore`.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("explore", derandomize=False, deadline=None, max_examples=1000)
settings.load_profile("repeatable")

BROWSER = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
BROWSER += ["--disable-background-networking", "--disable-component-update"]


def pytest_configure(config):
    """Under xdist the workers share the cores, and torch would start a thread for each core in each worker."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium; a test needs one of the machine's own."""
    executable = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)
    if executable is None:
        pytest.skip("no Chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as api:
        found = api.chromium.launch(executable_path=executable, args=BROWSER)
        yield found
        found.close()
