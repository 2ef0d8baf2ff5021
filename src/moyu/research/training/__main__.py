"""`python -m moyu.research.training`: make the zoo's data, train its models and measure them, here or on another machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moyu.model.zoo import names
from moyu.research import training


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m moyu.research.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="read the corpus, train the tokenizer, write token files")
    prepare.add_argument("--data", type=Path, required=True)
    prepare.add_argument("--size", choices=training.SIZES, default=training.SHIPPED)
    train = commands.add_parser("train", help="train one model; resumes where it was stopped")
    train.add_argument("name", choices=names())
    train.add_argument("--data", type=Path, required=True)
    train.add_argument("--out", type=Path, required=True)
    train.add_argument("--tokens", type=int, help="default: the size's")
    train.add_argument("--batch", type=int, help="sequences a step; default: the size's")
    train.add_argument("--device")
    train.add_argument("--minutes", type=float)
    train.add_argument("--size", choices=training.SIZES, default=training.SHIPPED)
    train.add_argument("--watch", action="store_true", help="log sparsity and the sign statistic on the way")
    measure = commands.add_parser("measure", help="measure a shipped model again, into its training.json")
    measure.add_argument("name", choices=names())
    args = parser.parse_args()
    if args.command == "prepare":
        print(json.dumps(training.prepare(args.data, args.size), indent=1))
    elif args.command == "measure":
        print(json.dumps(training.measure_shipped(args.name), indent=1))
    else:
        done = training.train(
            args.name, args.data, args.out, size=args.size, tokens=args.tokens, batch=args.batch, device=args.device, minutes=args.minutes,
            watched=args.watch,
        )  # fmt: skip
        print("finished" if done else "stopped by --minutes; run again to go on")


if __name__ == "__main__":
    main()
