"""What the README and the pages show is what the product does: tables, examples, commands, links."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoTokenizer

import moyu
from moyu import methods, records
from moyu.calibration import applying
from moyu.commands import cli
from moyu.measure.windows import Windows
from moyu.model import zoo
from moyu.reporting import beside_files
from tiny import lettered

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
HUB = '"Qwen/Qwen2.5-0.5B-Instruct"'
AGAIN = "run `python -m moyu.research.pages`"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


# ------------------------------------------------------------------------------------------------------------ generated


def test_the_readme_is_read_in_one_sitting():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1200


def test_method_table_is_the_registry():
    assert methods.markdown() in (DOCS / "methods.md").read_text(), AGAIN
    assert f"There are {len(methods.names())} methods" in README


def test_what_you_get_is_what_was_measured():
    rows = records.read(DOCS / "results" / "quants.jsonl")
    table = beside_files.markdown(rows)
    assert table in README and table in (DOCS / "plans.md").read_text(), AGAIN
    assert (DOCS / "results" / "levels.svg").read_text() == beside_files.picture(rows) + "\n", AGAIN


def test_no_file_that_is_shown_is_beaten_by_another_and_no_plan_is_left_out():
    rows = [r for r in records.read(DOCS / "results" / "quants.jsonl") if isinstance(r, records.Comparison)]
    source, *others = beside_files.shown(rows)
    assert source.what == "source"
    for row in others:
        assert row.what == "plan" or not [
            r for r in rows if r.what == "file" and r.model == row.model and r.step_bytes <= row.step_bytes and r.kl < row.kl
        ]  # fmt: skip
    own = [r for r in rows if r.plan and r.model == source.model and r.choice == "own"]
    plans = {r.row for r in own if r.row.startswith("levels .") and "whole" not in r.row}
    assert plans and plans == {r.row for r in others if r.what == "plan"}


def test_every_module_is_in_the_file_tree():
    page = (DOCS / "how.md").read_text()
    for path in (ROOT / "src" / "moyu").iterdir():
        if path.name not in ("__init__.py", "__main__.py", "__pycache__", "py.typed"):
            assert f"  {path.name}" in page, path.name


def test_the_page_of_commands_is_the_command_line(tmp_path):
    page = DOCS / "reference" / "cli.md"
    made = [
        sys.executable,
        "-m",
        "typer",
        "moyu.commands.cli",
        "utils",
        "docs",
        "--name",
        "moyu",
        "--title",
        "Commands",
    ]
    subprocess.run([*made, "--output", str(tmp_path / "cli.md")], check=True, capture_output=True, timeout=120)
    again = f"run `.venv/bin/python {' '.join(made[1:])} --output {page.relative_to(ROOT)}`"
    assert (tmp_path / "cli.md").read_text() == page.read_text(), again


def test_the_page_of_the_api_has_every_public_name():
    page = (DOCS / "reference" / "api.md").read_text()
    named = {name: home for home, name in re.findall(r"^::: moyu\.(\S+)\.(\w+)$", page, re.MULTILINE)}
    assert named == moyu._HOMES


# ------------------------------------------------------------------------------------------------------------- examples


def example(page: str, shown: str, model: object) -> str:
    """The first Python example of a page, on a model that is here in place of the one that it shows."""
    first, *_ = blocks((ROOT / page).read_text(), "python")
    assert first.count(shown) == 1
    return first.replace(shown, repr(str(model)))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The folder of a tiny model, in the present one; searches take a window for each part of the text, and two steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(applying, "Settings", partial(applying.Settings, calibration=1, test=1))
    monkeypatch.setattr(applying, "largest", partial(applying.largest, steps=2))
    made = lettered()
    made.model.save_pretrained("tiny")
    made.tokenizer.save_pretrained("tiny")
    return "tiny"


def test_the_example_with_transformers_runs(tmp_path, monkeypatch, capsys):
    page = "docs/use/transformers.md"
    monkeypatch.chdir(tmp_path)
    loaded = moyu.load("swiglu")
    ids = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    moyu.calibrate(loaded.model, "estimate", Windows(ids, 16), sparsity=0.25, name="swiglu").save("runs/plans/estimate")
    names: dict = {}
    exec(compile(example(page, HUB, zoo.path("swiglu")), page, "exec"), names)
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("swiglu"))
    assert capsys.readouterr().out.startswith(tokenizer.decode(tokenizer("Three rivers of Europe are")["input_ids"]))
    assert names["model"].moyu_applied.plan.method.name == "estimate"


def test_the_example_of_the_readme_runs(tiny, capsys):
    Path("mine.txt").write_text("".join(d.text for d in zoo.corpus.held_out("validation", max_bytes=30_000)))
    exec(compile(example("README.md", HUB, tiny), "README.md", "exec"), {})
    plan = moyu.Plan.load("plan")
    assert plan.method.name == "estimate" and plan.calibration["search"]["kl"] <= 0.02
    assert "Three rivers of Europe are" in capsys.readouterr().out


def test_the_examples_in_python_run(tiny, capsys):
    page = "docs/use/python.md"
    _, stages, tokens = blocks((ROOT / page).read_text(), "python")
    exec(compile(example(page, '"swiglu"', tiny), page, "exec"), {})
    assert "def main():" in capsys.readouterr().out
    assert moyu.Plan.load("plan").calibration["search"]["max_kl"] == 0.02
    exec(compile(stages, page, "exec"), {})
    assert 1 < float(capsys.readouterr().out) < 12  # dense: 7.5
    exec(compile(tokens, page, "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 8  # two tokens a line


def command_lines() -> list[tuple[str, str]]:
    """Every line of a shell block that calls moyu, with its page."""
    found = []
    for page in PAGES:
        for block in blocks(page.read_text(), "sh"):
            for line in re.findall(r"^(?:\.venv/bin/)?moyu (.*)$", block, re.MULTILINE):
                found.append((str(page.relative_to(ROOT)), line.partition("  #")[0].strip()))
    return found


def test_every_command_that_is_shown_exists():
    """Its sub-command, its options and its methods."""
    lines = command_lines()
    assert len(lines) > 30
    for page, line in lines:
        command, words = typer.main.get_command(cli.app), line.split()
        while words and hasattr(command, "commands") and words[0] in command.commands:  # pyright: ignore
            command = command.commands[words.pop(0)]  # pyright: ignore
        assert command.name or words[0].startswith("-"), f"{page}: moyu {line}"
        options = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"-h", "--help"}
        for word in (w for w in words if re.match(r"--?[a-z]", w)):
            assert word in options | {"--install-completion"}, f"{page}: moyu {line}: {word}"
        for name in re.findall(r"(?:--method|-m) (\S+)", line):
            assert name in {*methods.names(), "relative"}, f"{page}: moyu {line}"  # CONTRIBUTING's example


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", t.lower()).strip().replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link
