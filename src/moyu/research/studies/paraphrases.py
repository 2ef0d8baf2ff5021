"""Pairs of texts with the same meaning in other words. The meaning is generated first, so that it is certainly the same.

Programs: names are changed, comments and formatting removed, the syntax tree stays. Sums: digits and English words. Records:
JSON and sentences.
"""

from __future__ import annotations

import ast
import builtins
import json
import keyword
import random
from collections.abc import Callable

from moyu.research.studies.domains import documents, people, spelled

SHORTEST = 500  # bytes of a program


class _Renamer(ast.NodeTransformer):
    """Renames every name that the program binds and removes its documentation."""

    def __init__(self, tree: ast.AST, seed: int) -> None:
        bound: dict[str, None] = {}
        for node in ast.walk(tree):
            match node:
                case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                    bound[name] = None
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    bound[name] = None
        rng = random.Random(seed)
        syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]
        self.names: dict[str, str] = {}
        for name in bound:
            if name not in vars(builtins) and not name.startswith("__") and not keyword.iskeyword(name):
                self.names[name] = "".join(rng.choices(syllables, k=3))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        node.id = self.names.get(node.id, node.id)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.arg, node.annotation = self.names.get(node.arg, node.arg), None
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        if node.arg is not None:
            node.arg = self.names.get(node.arg, node.arg)
        self.generic_visit(node)
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.name, node.returns = self.names.get(node.name, node.name), None
        self.generic_visit(node)
        return _without_documentation(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        node.name = self.names.get(node.name, node.name)
        self.generic_visit(node)
        return _without_documentation(node)


def _without_documentation(node: ast.FunctionDef | ast.ClassDef) -> ast.AST:
    if ast.get_docstring(node) is not None and len(node.body) > 1:
        node.body = node.body[1:]
    return node


def programs(count: int, seed: int) -> list[tuple[str, str]]:
    """Functions of held-out files and the same functions with other names."""
    found = []
    for text in documents("library"):
        try:
            tree = ast.parse(text)
        except SyntaxError:
            continue
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        sources = [(n, ast.get_source_segment(text, n)) for n in functions]
        long = [(n, s) for n, s in sources if s is not None and SHORTEST <= len(s) <= 4000]
        if long:
            node, source = max(long, key=lambda item: len(item[1]))
            renamed = _Renamer(node, seed + len(found)).visit(ast.parse(ast.unparse(node)))
            found.append((source, ast.unparse(renamed)))
        if len(found) == count:
            break
    return found


def sums(count: int, seed: int) -> list[tuple[str, str]]:
    """Sums and differences in digits and in words."""
    out = []
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + index)
        digits, words = [], []
        for _ in range(16):
            a, b = rng.randrange(500), rng.randrange(400)
            sign, word, result = ("+", "plus", a + b) if rng.random() < 0.5 or a < b else ("-", "minus", a - b)
            digits.append(f"{a} {sign} {b} = {result}")
            words.append(f"{spelled(a)} {word} {spelled(b)} equals {spelled(result)}")
        out.append(("\n".join(digits), "\n".join(words)))
    return out


def records(count: int, seed: int) -> list[tuple[str, str]]:
    """Records as JSON and as English sentences."""
    out = []
    for index in range(count):
        rng = random.Random(seed * 1_000_003 + 7 + index)
        rows = people(rng, 8)
        said = [
            f"Our member {r['name']}, number {r['id']}, lives near {r['town']} and turned {spelled(int(str(r['age'])))}; "
            f"the last result was {r['score']} points, and the account is {'open' if r['active'] else 'closed'}."
            for r in rows
        ]
        out.append((json.dumps(rows), "\n".join(said)))
    return out


KINDS: dict[str, Callable[[int, int], list[tuple[str, str]]]] = {
    "programs": programs,
    "sums": sums,
    "records": records,
}
