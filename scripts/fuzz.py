"""The C++ kernels against sums in float64, on random cases: `.venv/bin/python scripts/fuzz.py [MINUTES [SEED]]`.

Each instruction set of this machine has MINUTES, 10 by default. The cases are those of the property tests, EXAMPLES of each and then
others: a failure names the seed, and `MOYU_ISA=... pytest --hypothesis-profile=explore --hypothesis-seed=... tests/kernels` repeats it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

from moyu.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/kernels/test_values.py", "tests/kernels/test_quantised.py", "tests/kernels/test_levels.py"]
PROPERTIES = "(cpu and (any_size or sums_of_integers)) or product_is_the_reference"
EXAMPLES = 100  # of a property in a round


def check(isa: str, seconds: float, seed: int) -> None:
    """Rounds with a seed each until the time is over; the process ends at the first failure."""
    end, cases, rounds = time.monotonic() + seconds, 0, 0
    while not rounds or time.monotonic() < end:
        command = [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "0", *TESTS, "-k", PROPERTIES,
            "--hypothesis-profile=explore", f"--hypothesis-seed={seed + rounds}",
        ]  # fmt: skip
        environment = os.environ | {"MOYU_ISA": isa, "KERNEL_EXAMPLES": str(EXAMPLES)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        passed = re.search(r"(\d+) passed", done.stdout)
        if done.returncode or passed is None:
            sys.exit(f"{done.stdout[-4000:]}{done.stderr[-1000:]}\n{isa}, seed {seed + rounds}: a case is wrong")
        cases, rounds = cases + int(passed[1]) * EXAMPLES, rounds + 1
    print(f"{isa}: {cases:,} cases in {rounds} rounds from seed {seed}, all within the tolerance", flush=True)


if __name__ == "__main__":
    minutes, first = (*sys.argv[1:], *("10", "1")[len(sys.argv) - 1 :])
    for name in cpu.extension().isas():
        check(name, 60 * float(minutes), int(first))
