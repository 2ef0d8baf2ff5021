"""Draw docs/report.png, the report of `docs/results/run-swiglu.jsonl` in headless Chromium: `make pictures`."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from moyu import records
from moyu.reporting import write_report

DOCS = Path(__file__).parent.parent / "docs"
SIZE = {"width": 1180, "height": 1500}


def main() -> None:
    """Raises SystemExit without a browser."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next((p for name in names if (p := shutil.which(name))), None)
    if browser is None:
        sys.exit("no Chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        page = Path(folder) / "report.html"
        write_report(records.read(DOCS / "results" / "run-swiglu.jsonl"), page)
        chromium = api.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        tab = chromium.new_page(viewport=SIZE)
        tab.goto(page.as_uri())
        tab.screenshot(path=str(DOCS / "report.png"))
        chromium.close()


if __name__ == "__main__":
    main()
