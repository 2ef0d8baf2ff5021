"""llama.cpp's types of a model, made by its own quantiser and measured by MOYU, beside plans: `python -m benchmarks.quants --help`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.quants.documents import texts
from benchmarks.quants.rows import INDIFFERENT, TYPES, Asked, Table
from benchmarks.quants.table import markdown

from moyu import records
from moyu.errors import UserError
from moyu.model import loading
from moyu.model.gguf.reader import BLOCKS, read
from moyu.model.gguf.tokenizer import tokenizer_of

IMPORTANCE = {"both": (False, True), "with": (True,), "without": (False,)}


def wanted(options: argparse.Namespace) -> list[Asked]:
    """The rows that were asked for."""
    found = [Asked()]
    for kind in filter(None, options.types.split(",")):
        made = Asked(kind).making()
        if made["kind"] not in TYPES or made["head"] not in (None, *BLOCKS):
            raise UserError(f"{kind!r} is no type of files that MOYU reads", f"there are {', '.join(TYPES)}")
        ways = (False,) if kind in INDIFFERENT else IMPORTANCE[options.importance]
        found += [Asked(kind, way) for way in ways]
    for given in options.file:
        name, _, path = given.rpartition("=")
        found.append(Asked(name or Path(path).stem, given=Path(path)))
    for plan in options.plan:
        name, _, folder = plan.rpartition("=")
        folder, _, of = folder.partition(":")
        whose = Path(of) if of else None
        found.append(Asked(name or Path(folder).name, plan=Path(folder), nulls=options.nulls, of=whose))
    return found


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quants", description=__doc__)
    parser.add_argument("source", type=Path, help="a GGUF file, of 16 bits or of blocks, which are requantised")
    parser.add_argument(
        "--text", type=Path, required=True, help='documents to score: WikiText, or lines of {"text": "..."}'
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        required=True,
        help="other text for the importance matrix; of the same file the rest",
    )
    parser.add_argument("--out", type=Path, required=True, help="records; rows that are there are not measured again")
    parser.add_argument("--types", default=",".join(TYPES), help="with commas; empty: no files")
    parser.add_argument("--importance", default="both", choices=list(IMPORTANCE))
    parser.add_argument(
        "--plan",
        action="append",
        default=[],
        metavar="[NAME=]FOLDER[:FILE]",
        help="a plan on the source, or on a --file",
    )
    parser.add_argument(
        "--file", action="append", default=[], metavar="[NAME=]FILE", help="a file that `moyu pack` made"
    )
    parser.add_argument(
        "--nulls", action="store_true", help="plans beside a random and the best choice of as many units"
    )
    parser.add_argument("--documents", type=int, default=15)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=128, help="positions that are not scored")
    parser.add_argument("--chunks", type=int, default=64, help="windows of 512 tokens for the importance matrix")
    parser.add_argument("--tokenizer", help="the model whose tokenizer is used, if the file has none")
    parser.add_argument("--work", type=Path, default=Path("runs/quants"), help="for files that are made on the way")
    parser.add_argument("--keep", action="store_true", help="keep the files of llama.cpp's types there")
    parser.add_argument(
        "--make-only",
        type=Path,
        metavar="FOLDER",
        help="put the files there and measure nothing: for `moyu trinity --competitors`",
    )
    parser.add_argument("--threads", type=int, default=0, help="of llama.cpp's quantiser; 0: all")
    options = parser.parse_args()
    try:
        asked = wanted(options)
        named = options.tokenizer
        tokenizer = tokenizer_of(read(options.source)) if named is None else loading.load(named).tokenizer
        given = texts(
            tokenizer,
            options.text,
            options.calibration,
            count=options.documents,
            length=options.window,
            prompt=options.prompt,
            chunks=options.chunks,
            chunk=min(512, 2 * options.window),
        )
        options.work.mkdir(parents=True, exist_ok=True)
        rest = options.work / f"{options.source.stem}-{given.scored.digest}.txt"
        rest.write_text(given.rest, encoding="utf-8")
        print(f"calibrate plans for this text on {rest}", flush=True)
        table = Table(options.source, given, options.out, options.work, options.threads, options.keep)
        if options.make_only is not None:
            options.make_only.mkdir(parents=True, exist_ok=True)
            for one in (a for a in asked if a.row in options.types.split(",")):
                print(table.make(one, options.make_only / one.file), flush=True)
            return
        for one in asked:
            start = time.monotonic()
            for row in table.fill([one]):
                took = time.monotonic() - start
                print(f"{one}, {row.choice}: KL {row.kl:.5f}, {row.step_bytes / 1e6:.1f} MB, {took:.0f} s", flush=True)
    except UserError as error:
        parser.exit(2, f"{error}\n")
    print(f"\n{markdown(records.read(options.out))}")


if __name__ == "__main__":
    main()
