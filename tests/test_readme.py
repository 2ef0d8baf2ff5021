"""What the README shows is what the product does."""

import re
from pathlib import Path

from moyu import methods

README = (Path(__file__).parent.parent / "README.md").read_text()


def python_examples():
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_method_table_is_the_registry():
    assert methods.markdown() in README, "run `python -m moyu.research.pages`"


def test_python_example_runs(capsys):
    example = python_examples()[0]
    exec(compile(example, "README.md", "exec"), {})
    text, perplexity = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "def main():" in text
    assert 1 < float(perplexity) < 50


def test_the_example_through_transformers_loading_runs(capsys):
    names: dict = {}
    exec(compile(python_examples()[1], "README.md", "exec"), names)
    assert "def main():" in capsys.readouterr().out
    assert names["model"].moyu_applied.plan.method.name == "griffin"


def test_every_module_is_in_the_file_tree():
    source = Path(__file__).parent.parent / "src" / "moyu"
    for path in source.iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path.name in README, path.name
