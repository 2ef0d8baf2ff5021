"""docs/measured.md says what its records say: every cell of its tables is a record's number, rounded."""

import json
import re
from pathlib import Path

from moyu import records
from moyu.reporting import beside_files

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "measured.md").read_text()
SHAPE = "llama-3.2-1b"


def table(first: str) -> dict[str, list[str]]:
    """The table whose head begins with these cells: the cells of each row by its name."""
    (found,) = re.findall(rf"^\| {re.escape(first)} .*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found.splitlines()]
    return {name: cells for name, *cells in rows}


def agrees(cell: str, value: float) -> bool:
    """Whether a cell is this value, to half a unit of its last digit (and a rounding that went the other way)."""
    number = re.fullmatch(r"([\d,]*\.?\d*)[ ×%]*", cell)
    assert number is not None, cell
    digits = len(number[1].partition(".")[2])
    return abs(float(number[1].replace(",", "")) - value * (100 if "%" in cell else 1)) <= 0.501 * 10**-digits


def name(row: records.Speed) -> str:
    """A record's name in the tables."""
    own = re.fullmatch(r"moyu (\d+)% (\w+)", row.backend.partition(":")[0])
    return f"MOYU {own[1]} % of {own[2]} skipped" if own else row.backend.partition(":")[0].replace("moyu", "MOYU")


def speeds(file: str) -> list[records.Speed]:
    found = records.read(DOCS / "results" / file)
    return [r for r in found if isinstance(r, records.Speed) and r.model == SHAPE]


def test_speed_in_16_bits():
    rows = {name(r): r for r in speeds("cpu.jsonl")}
    shown = table("variant | byte fraction")
    assert list(shown) == list(rows)
    eager, rival, dense = (rows[n].tok_s for n in ("transformers eager", "llama.cpp", "MOYU dense"))
    for n, (size, tokens, over_eager, over_rival, over_dense, share) in shown.items():
        r = rows[n]
        assert agrees(size, r.byte_fraction) and agrees(tokens, r.tok_s), n
        assert agrees(over_eager, r.tok_s / eager) and agrees(over_rival, r.tok_s / rival), n
        assert agrees(over_dense, r.tok_s / dense) if n.startswith("MOYU") else not over_dense, n
        assert agrees(share, r.ceiling_share), n


def test_speed_in_8_and_4_bits():
    shown = table("variant | bf16")
    for column, dtype in enumerate(("bfloat16", "q8_0", "q4_0")):
        rows = {name(r): r.tok_s for r in speeds("cpu-zen3.jsonl") if r.dtype == dtype}
        assert [n for n, cells in shown.items() if cells[column] != "–"] == list(rows)
        for n, tokens in rows.items():
            own, ratio = shown[n][column].split(", ")
            assert agrees(own, tokens) and agrees(ratio, tokens / rows["llama.cpp"]), (n, dtype)


def test_speed_on_many_cores():
    columns = [("q8_0", 8), ("q8_0", 16), ("q4_k_m", 8), ("q4_k_m", 16)]
    shown = table("variant | Q8_0, 8 threads")
    for column, (dtype, threads) in enumerate(columns):
        rows = {name(r): r.tok_s for r in speeds("cpu-cores.jsonl") if (r.dtype, r.threads) == (dtype, threads)}
        assert list(shown) == list(rows)
        rival = max(tokens for n, tokens in rows.items() if not n.startswith("MOYU"))
        for n, tokens in rows.items():
            own, ratio = shown[n][column].split(", ")
            assert agrees(own, tokens) and agrees(ratio, tokens / rival), (n, dtype, threads)


def test_quality_of_one_run():
    found = records.read(DOCS / "results" / "run-swiglu.jsonl")
    rows = {r.method: r for r in found if isinstance(r, records.Quality) and r.protocol and r.protocol.table == "main"}
    shown = table("method | realised sparsity")
    assert list(shown) == list(rows)
    for method, cells in shown.items():
        r = rows[method]
        values = (r.realized_sparsity, r.byte_fraction, r.ppl, r.ppl_random, r.ppl_oracle, r.kl)
        for cell, value in zip(cells, values, strict=True):
            assert value is not None and agrees(cell, value), (method, cell, value)


def test_the_speeds_in_the_readme():
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    said = r"llama\.cpp writes (\S+) tokens a second, MOYU (\S+) with nothing skipped and (\S+) with half of the neurons skipped"
    (shown,) = re.findall(said, words)
    rows = {name(r): r.tok_s for r in speeds("cpu-zen3.jsonl") if r.dtype == "q8_0"}
    for cell, n in zip(shown, ("llama.cpp", "MOYU dense", "MOYU 50 % of neurons skipped"), strict=True):
        assert agrees(cell, rows[n]), n


def test_what_the_readme_says_of_levels_beside_files():
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    (sentence,) = re.findall(r"At \d+ % of the bytes `levels` is [^.]*\.", words)
    said = {int(size): int(times) for size, times in re.findall(r"(\d+) %\D* (\d+) times", sentence)}
    source, *others = beside_files.shown(records.read(DOCS / "results" / "quants.jsonl"))
    plans = {round(100 * r.step_bytes / source.step_bytes): r for r in others if r.what == "plan"}
    beaten = {
        size: min((f.kl for f in others if f.what == "file" and f.step_bytes <= plan.step_bytes * 1.001), default=0)
        / plan.kl
        for size, plan in plans.items()
    }
    assert len(said) == 3 and said == {size: round(beaten[size]) for size in said}


def test_what_the_readme_says_of_gemma():
    words = " ".join((DOCS.parent / "README.md").read_text().split())
    said = r"On Gemma 3 270M's Q4_K_M file, .*? at (\d+) % of the bytes has a KL of (\S+), and the smaller file of that size (\S+)\."
    ((share, kl, of_file),) = re.findall(said, words)
    rows = [r for r in records.read(DOCS / "results" / "quants.jsonl") if isinstance(r, records.Comparison)]
    gemma = [r for r in rows if r.model.startswith("gemma")]
    (source,) = (r for r in gemma if r.what == "source")
    near = [r for r in gemma if round(100 * r.step_bytes / source.step_bytes) == int(share)]
    assert agrees(kl, min(r.kl for r in near if r.what == "plan"))
    assert agrees(of_file, min(r.kl for r in near if r.what == "file"))


def test_lossless_figures_of_the_page_are_the_records():
    """Each record of docs/results/lossless.jsonl is a row of the page, and every text in it was the dense one."""
    page = (DOCS / "use" / "lossless.md").read_text()
    found = [json.loads(line) for line in (DOCS / "results" / "lossless.jsonl").read_text().splitlines()]
    first_bits = [row for row in found if "first bits" in row["ways"]]
    for row in first_bits:
        for way in set(row["ways"]) - {"dense"}:
            own = row["ways"][way]
            cells = f"| {own['over_dense']:.2f} | {own['least_over_dense']:.2f} "
            assert own["same"] == row["prompts"] and any(
                row["model"] in line and cells in line for line in page.splitlines()
            )
    rows = [row for row in found if row not in first_bits]
    assert len(rows) >= 3
    for row in rows:
        dense, own = row["ways"]["dense"], row["ways"]["text"]
        assert own["same"] == row["prompts"]
        cells = (
            f"| {dense['tok_s']:.0f} | {own['tok_s']:.0f} | {own['over_dense']:.2f} | {own['least_over_dense']:.2f} "
        )
        assert any(row["model"] in line and cells in line for line in page.splitlines())
    least = min(row["ways"]["text"]["least_over_dense"] for row in rows)
    assert f"the least gain was {least:.2f}" in (DOCS / "LOG.md").read_text()
    assert all(row["threads"] == 2 for row in rows)
    gains = {told: [] for told in (True, False)}  # by whether a model was trained to answer
    for row in rows:
        gains["Instruct" in row["model"]].append(row["ways"]["text"]["over_dense"])
    readme = (DOCS.parent / "README.md").read_text()
    assert f"On 2 threads {min(gains[True]):.2f} to {max(gains[True]):.2f} times dense decoding" in readme
    assert f"{max(gains[False]):.2f} with a base model" in readme
