"""The C++ kernels under sanitizers: `.venv/bin/python scripts/sanitize.py address|thread [pytest arguments]`.

address: AddressSanitizer and UndefinedBehaviorSanitizer. thread: ThreadSanitizer, on a build without OpenMP, whose own
synchronisation that sanitizer does not know; the teams and barriers of support.cpp are the same.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=undefined", "thread": "-fsanitize=thread"}
LIBRARIES = {"address": ("libasan.so", "libubsan.so"), "thread": ("libtsan.so",)}
TESTS = ["tests/kernels/test_values.py", "tests/kernels/test_quantised.py", "tests/test_decoding.py"]


def build(kind: str) -> Path:
    """Compile the extension with the sanitizer; returns its file."""
    folder = ROOT / "build" / f"sanitize-{kind}"
    configure = [
        "cmake", "-S", ROOT, "-B", folder, "-DCMAKE_BUILD_TYPE=RelWithDebInfo", f"-DPython_EXECUTABLE={sys.executable}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'out'}", f"-DCMAKE_CXX_FLAGS={FLAGS[kind]} -fno-omit-frame-pointer",
        f"-DCMAKE_DISABLE_FIND_PACKAGE_OpenMP={'ON' if kind == 'thread' else 'OFF'}",
    ]  # fmt: skip
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL, env=environment)
    subprocess.run(
        ["cmake", "--build", folder, "--parallel", str(os.cpu_count())],
        check=True,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    return next((folder / "out").glob("_cpu.*.so"))


def run(extension: Path, arguments: list[str]) -> int:
    """The tests in this process, with the extension in the place of the usual one."""
    spec = importlib.util.spec_from_file_location("moyu.kernels._cpu", extension)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["moyu.kernels._cpu"] = module
    import pytest

    from moyu.kernels import cpu

    assert cpu.extension() is module
    chosen = arguments or ["-k", "not instruction"]
    return pytest.main(
        ["-q", "-s", "-n", "0", "-p", "no:cacheprovider", *chosen, *TESTS]
    )  # -s: a report goes to stderr


def main() -> None:
    """Build, then start again with the sanitizer's library loaded first, as Python itself is built without it."""
    kind, arguments = sys.argv[1], sys.argv[2:]
    if "MOYU_SANITIZED" in os.environ:
        os.chdir(ROOT)
        sys.exit(run(Path(os.environ["MOYU_SANITIZED"]), arguments))
    libraries = [
        subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in LIBRARIES[kind]
    ]
    options = {
        # Without the second gcc 13 stores AVX-512 registers out of line in the frames that the sanitizer moves (GCC bug 110027).
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": f"halt_on_error=1 report_signal_unsafe=0 suppressions={ROOT / 'scripts' / 'tsan.supp'}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    environment = os.environ | options | {"LD_PRELOAD": ":".join(libraries), "MOYU_SANITIZED": str(build(kind))}
    sys.exit(subprocess.call([sys.executable, __file__, kind, *arguments], env=environment))


if __name__ == "__main__":
    main()
