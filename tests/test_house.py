"""The house: rooms on floors. No module imports from a higher floor, and no modules import each other in a circle."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import moyu

SOURCE = Path(moyu.__file__).parent
FLOORS = (
    "errors", "files", "weights", "kernels", "model", "methods", "plan", "engine", "measure", "records", "calibration", "packing",
    "reporting", "integrations", "research", "commands", "__main__",
)  # fmt: skip
COMPILED = "kernels._cpu"  # a module that is no file of Python


def imports() -> dict[str, set[str]]:
    """The modules that each module imports, by name without `moyu.`: at the top, inside functions, for type checkers alike."""
    files = {
        ".".join(p.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): p for p in SOURCE.rglob("*.py")
    }
    found: dict[str, set[str]] = {}
    for name, file in files.items():
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
        assert not any(n.level for n in nodes if isinstance(n, ast.ImportFrom)), f"{name} has a relative import"
        for node in (n for n in nodes if isinstance(n, ast.ImportFrom)):
            inside = {f"{node.module}.{a.name}" for a in node.names}
            modules += [m if m.removeprefix("moyu.") in (*files, COMPILED) else str(node.module) for m in inside]
        found[name] = {m.removeprefix("moyu.") for m in modules if m.startswith("moyu.")} - {name}
    return found


def test_no_module_imports_from_a_higher_floor():
    floor = {room: number for number, room in enumerate(FLOORS)}
    arrows = [(name, to) for name, modules in imports().items() if name != "__init__" for to in modules]
    assert len(arrows) > 100, "the arrows were not found"
    assert [(a, b) for a, b in arrows if floor[a.partition(".")[0]] < floor[b.partition(".")[0]]] == []


def test_no_file_holds_the_marks_of_a_merge():
    root = SOURCE.parents[1]
    files = [p for place in ("src", "tests", "docs", "benchmarks", "scripts") for p in (root / place).rglob("*")]
    kept = [p for p in (*files, *root.glob("*")) if p.suffix in (".py", ".md", ".h", ".cpp", ".toml", ".yml", ".txt")]
    assert len(kept) > 400, "the files were not found"
    assert [p for p in kept if re.search(r"^(<{7}|>{7}) ", p.read_text(errors="replace"), re.MULTILINE)] == []


def test_no_modules_import_each_other_in_a_circle():
    graph = {name: modules for name, modules in imports().items() if name != "__init__"}
    TopologicalSorter(graph).prepare()  # CycleError names the circle
