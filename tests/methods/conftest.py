"""The small block that these tests share."""

import sys
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).parent)
)  # small_block is imported by the tests, and --import-mode=importlib adds no path
