"""The page docs/coverage.md, generated from records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from moyu.records import Coverage

HEAD = """# Coverage

Every causal LM of transformers {version} is built tiny from its configuration, with random weights, in its own process.
`make coverage` writes this page; `moyu coverage` does the same anywhere. A type is *taken* if:

- every feed-forward network is found and proved;
- with nothing skipped, logits equal the dense model's;
- at 50 %, the skipping kernels give the same as masking and read fewer bytes, for every kernel shape with a site in the type
  (input channels, rows after the gate, whole neurons);
- `generate` gives the dense tokens at sparsity 0 and runs at 50 %;
- afterwards weights and logits are bit-identical.

Attention is taken if it is proved ([how](architectures.md)). The input channels of its linears are then checked too, and
whole heads can be skipped if heads are listed. Names decide which parameters belong to a feed-forward network, independently
of what was found.

**{taken} of {networks} types that build and have a feed-forward network are taken ({share:.1%})**, of {types} types in all;
{unbuilt} do not build from their default configuration, {without} have no feed-forward network.
Last run: {date}, transformers {version}, torch {torch}; {seconds:.0f} s, summed over processes.
"""

TITLES = {
    "partly": "Partly taken",
    "dense": "Left dense",
    "fails": "Fails a check",
    "no network": "Without a feed-forward network",
    "does not build": "Do not build from their default configuration",
}


def share(records: Sequence[Coverage]) -> tuple[int, int]:
    """The number of supported types, and of types that build and have a feed-forward network."""
    counted = [r for r in records if r.status not in ("does not build", "no network")]
    return sum(r.taken for r in counted), len(counted)


def page(records: Sequence[Coverage]) -> str:
    """docs/coverage.md."""
    records = sorted(records, key=lambda r: r.architecture)
    taken, networks = share(records)
    counts = Counter(r.status for r in records)
    last = max(records, key=lambda r: r.date)
    parts = [
        HEAD.format(
            version=last.versions["transformers"],
            torch=last.versions["torch"],
            taken=taken,
            networks=networks,
            share=taken / max(networks, 1),
            types=len(records),
            unbuilt=counts["does not build"],
            without=counts["no network"],
            date=last.date[:10],
            seconds=sum(r.seconds or 0.0 for r in records),
        )
    ]
    for status, title in TITLES.items():
        rows = [r for r in records if r.status == status]
        if rows:
            parts.append(f"## {title}\n\n| type | reason |\n|---|---|\n" + "".join(_row(r) for r in rows))
    rows = "".join(
        f"| {r.architecture} | {r.networks} | {r.attention or '–'} | {', '.join(r.checks)} |\n"
        for r in records
        if r.taken
    )
    parts.append(
        f"## Taken\n\n| type | networks in the tiny model | attention in it | checked |\n|---|---|---|---|\n{rows}"
    )
    return "\n".join(parts)


def _row(record: Coverage) -> str:
    return f"| {record.architecture} | {' '.join(record.reason.split()).replace('|', chr(92) + '|')} |\n"
