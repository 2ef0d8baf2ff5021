"""What a scoreboard shows of its claims, on cells whose differences are known."""

from __future__ import annotations

from moyu import records
from moyu.reporting import claims

NOISE = [0.01, -0.01, 0.02, -0.02, 0.0, 0.01, -0.01, 0.0]


def cell(method, level, *, family="threshold", bits=16.0, target=0.6, **further):
    """A cell whose documents lie around a KL, and a log-perplexity 2 above it; further: of matched random and oracle."""
    means = {"kl": [max(0.0, level + n) for n in NOISE], "nll": [level + 2 + n for n in NOISE]}
    means |= {f"nll_{name}": [value + 2 - n for n in NOISE] for name, value in further.items()}
    return records.stamp(
        kind="cell", model="tiny", weights="trained", method=method, family=family, simulated=True, weight_bits=bits,
        target_byte_fraction=target, byte_fraction=target or 1.0, byte_fraction_16=(target or 1.0) * bits / 16, documents=len(NOISE),
        tokens=80, ppl_dense=5.0, ppl=6.0, kl=level, by_document=means,
    )  # fmt: skip


def verdicts(cells, claim):
    return {(v.cell.method, v.against): v.holds for v in claims.verdicts(cells) if v.claim == claim}


def test_a_method_lies_between_its_oracle_and_its_random():
    cells = [cell("cats", 1.0, oracle=0.5, random=2.0), cell("teal", 1.0, oracle=1.0, random=0.4)]
    assert verdicts(cells, "oracle ≤ method") == {("cats", "matched oracle"): True, ("teal", "matched oracle"): None}
    assert verdicts(cells, "method ≤ random") == {("cats", "matched random"): True, ("teal", "matched random"): False}
    same = cell("wina", 1.0, oracle=1.0, random=2.0)
    same.by_document["nll_oracle"] = same.by_document["nll"]
    assert verdicts([same], "oracle ≤ method") == {("wina", "matched oracle"): True}  # not "<": equal is enough


def test_routers_are_held_against_popularity_at_the_same_bytes():
    null = cell("popularity", 1.0, family="static")
    cells = [null, cell("deja-vu", 0.5), cell("lte", 1.5), cell("polar", 0.5, target=0.75), cell("cats", 0.5)]
    assert verdicts(cells, "router < popularity") == {("deja-vu", "popularity"): True, ("lte", "popularity"): False}


def test_the_own_method_is_held_against_every_method():
    low = {"bits": 4.5, "target": 0.8}
    cells = [cell("estimate", 0.5, family="own", **low), cell("teal", 0.6, **low), cell("wina", 0.4, **low)]
    cells.append(cell("oracle", 0.1, family="reference", **low))  # a bound is no method
    assert verdicts(cells, "estimate < every method") == {("estimate", "teal"): True, ("estimate", "wina"): False}
    line = next(line for line in claims.lines(cells) if line[0] == "estimate < every method")
    assert line[1:4] == ["1", "0", "1"] and "estimate against wina on tiny, 0.80 of the bytes, 4.5 bits" in line[4]


def file(row, size, level):
    """A file whose documents lie around a KL."""
    means = {"kl": [max(0.0, level + n) for n in NOISE], "nll": [level + 2 + n for n in NOISE]}
    return records.stamp(
        kind="comparison", model="tiny", weights="trained", row=row, what="file", source_sha256="0" * 64, tensors="2 Q4_0", step_bytes=size,
        step_bytes_moyu=size, documents=len(NOISE), tokens=80, ppl_source=5.0, ppl=6.0, kl=level, kl_interval=[level, level],
        top1_agreement=0.9, by_document=means,
    )  # fmt: skip


def on_file(method, level, size, **more):
    """A cell on a quantised file."""
    return cell(method, level, bits=4.5, **more).model_copy(update={"step_bytes": size})


def test_plans_on_a_file_are_held_against_the_next_larger_file():
    files = [file("Q2_K", 60.0, 0.9), file("Q3_K_S", 71.0, 0.3), file("Q3_K_M", 80.0, 0.1)]
    cells = [on_file("levels", 0.05, 70.0, family="own"), on_file("teal", 0.5, 70.0), on_file("wina", 0.5, 81.0)]
    shown = {(v.claim, v.cell.method, v.against): v.holds for v in claims.verdicts(cells, files)}
    assert shown["levels < the next larger file", "levels", "Q3_K_S"] is True
    assert shown["any other method < the next larger file", "teal", "Q3_K_S"] is False
    assert shown["levels < every method", "levels", "teal"] is True
    assert not any(method == "wina" for claim, method, _ in shown if "file" in claim), "no file is larger"


def test_the_order_is_of_the_documents_that_the_references_have():
    one = on_file("teal", 1.0, 70.0, random=2.0, oracle=0.5)
    for name in ("random", "oracle"):
        one.by_document[f"nll_{name}"] = one.by_document[f"nll_{name}"][:4]
    assert verdicts([one], "method ≤ random") == {("teal", "matched random"): True}
