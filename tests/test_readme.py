"""What the README shows is what the product does."""

import re
from pathlib import Path

from moyu import methods

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_method_table_is_the_registry():
    assert methods.markdown() in README, "run `python -m moyu.methods`"


def test_python_example_runs(capsys):
    example = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    text, perplexity = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "def main():" in text
    assert 1 < float(perplexity) < 50


def test_every_module_is_in_the_file_tree():
    source = Path(__file__).parent.parent / "src" / "moyu"
    for path in source.iterdir():
        if path.name not in ("__init__.py", "__pycache__", "py.typed"):
            assert path.name in README, path.name
