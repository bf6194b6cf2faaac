"""`deltavlm data show`."""

import argparse
from pathlib import Path

from ..arguments import add_command, positive_integer
from .arguments import add_images


def add(subparsers) -> None:
    command = add_command(subparsers, "show", run, "Write records with their images to an HTML page.")
    add_argument = command.add_argument
    generated = "generated scenes, by the same rules"
    add_argument("source", metavar="DATA", nargs="?", help=f"folder, file or Hub id (default: {generated})")
    add_images(command)
    add_argument("--output", type=Path, default=Path("records.html"), metavar="FILE", help="default: %(default)s")
    add_argument("--split", default="train", help="of DATA (default: %(default)s)")
    add_argument("--task", help="of this task only")
    add_argument("--number", type=positive_integer, default=24, metavar="N", help="default: %(default)s")
    add_argument("--seed", type=int, default=0, help="chooses the records (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    from ...data.show import choose_rows, write_sheet

    choice = {"split": args.split, "task": args.task, "number": args.number, "seed": args.seed}
    rows, title, classes = choose_rows(args.source, args.images, **choice, revision=args.revision)
    print(f"{args.output}: {write_sheet(rows, args.output, title, classes)} records")
    return 0
