"""`deltavlm compare`."""

import argparse
import sys
from pathlib import Path

from .arguments import add_command


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "compare",
        run,
        "Set reports of `deltavlm evaluate` on the same data beside each other: one table with the differences to the "
        "first and their intervals, a paired bootstrap over pairs.",
    )
    command.add_argument(
        "reports", nargs="+", metavar="REPORT", help="report.json or its folder; of one, all systems are compared"
    )
    command.add_argument("--output", type=Path, default=Path("comparison"), metavar="DIR", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from ..evaluation.compare import compare, write_comparison

    found = compare(args.reports)
    files = write_comparison(found, args.output)
    print(found.markdown())
    print(f"{len(found.systems)} systems on {found.pairs} pairs: {', '.join(map(str, files))}", file=sys.stderr)
    return 0
