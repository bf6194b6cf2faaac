"""What several of the data commands have in common."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import positive_integer


def add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("--images", type=Path, metavar="DIR", help="default: `images` in or beside DATA")
    command.add_argument("--revision", help="branch, tag or commit of the Hub's data set")


def add_pairs(command: argparse.ArgumentParser, name: str, splits: tuple[str, ...] = ()) -> None:
    add_argument = command.add_argument
    add_argument(
        "--images",
        type=Path,
        required=True,
        metavar="DIR",
        help="with [SPLIT/]A and [SPLIT/]B, or x_pre.png, x_post.png",
    )
    add_argument("--captions", type=Path, metavar="FILE", help='{"name.png": [captions]}, or LEVIR-CC\'s')
    add_argument("--masks", type=Path, metavar="DIR", help="default: `label` beside A; or label/x.png, x_mask.png")
    add_argument(
        "--classes",
        type=Path,
        metavar="FILE",
        help="what masks mark, see docs/data.md (default: classes.yaml in DIR of --images, else roads and buildings)",
    )
    add_argument("--binary-masks", action="store_true", help="masks have one class, taken for buildings")
    add_argument("--min-area", type=positive_integer, metavar="PIXELS", help="of what is counted")
    add_argument("--min-cell-area", type=positive_integer, metavar="PIXELS", help="of change in a cell")
    add_argument("--output", type=Path, required=True, metavar="DIR", help="where annotations go")
    add_argument("--split", default="train", choices=("train", "val", "test", *splits), help="default: %(default)s")
    add_argument("--name", default=name, help="how file names begin (default: %(default)s)")


def find_pairs_of(args: argparse.Namespace):
    """The pairs of [`add_pairs`]'s arguments."""
    from ...data.build import find_pairs

    return find_pairs(args.images, args.captions, args.masks, args.split)


def build_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """[`add_pairs`]'s other arguments, for building and for writing."""
    from ...data.classes import classes_in, read_classes
    from ...data.rules import LEVIR, Thresholds

    return {
        "output": args.output,
        "name": args.name,
        "thresholds": Thresholds(args.min_area or LEVIR.min_area, args.min_cell_area or LEVIR.min_cell_area),
        "binary_masks": args.binary_masks,
        "classes": read_classes(args.classes) if args.classes else classes_in(args.images),
    }
