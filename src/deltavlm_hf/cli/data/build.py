"""`deltavlm data build`."""

import argparse
import json
import sys

from ..arguments import add_command
from .arguments import add_pairs, build_kwargs, find_pairs_of


def add(subparsers) -> None:
    command = add_command(subparsers, "build", run, "Build annotations by rule from captions and change masks.")
    command.set_defaults(error=command.error)
    add_pairs(command, name="changechat", splits=("all",))
    command.add_argument(
        "--places",
        metavar="PLACES",
        help="with --split all, which place a pair is of: TABLE.csv:COLUMN (with a column `name`), or an expression "
        r"whose group in a name is the place, such as '(.+)_\d+'. One folder of pairs is split by it, each place on "
        "one side; of folders train, val and test it is told which places are in several",
    )
    command.add_argument(
        "--shares", nargs=3, type=float, metavar=("TRAIN", "VAL", "TEST"), help="default: 0.7 0.15 0.15"
    )
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="default: caption binary count grid dialogue")
    command.add_argument("--paraphrase", type=float, default=0.0, help="share of instructions in other words, 0 to 1")
    command.add_argument(
        "--seed", type=int, default=0, help="chooses paraphrases, and the places of splits (default: %(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    from ...data.build import RULE_TASKS, SHARES, build_dataset, build_splits, find_splits, places_on_both_sides
    from ...data.words import shorten

    choices = {"tasks": args.tasks or RULE_TASKS, "seed": args.seed, "paraphrase": args.paraphrase}
    choices["overwrite"] = args.overwrite
    if args.split != "all":
        if args.places or args.shares:
            args.error("--places and --shares go with --split all")
        summary = build_dataset(find_pairs_of(args), split=args.split, **build_kwargs(args), **choices)
        print(json.dumps(vars(summary), indent=1, ensure_ascii=False))
        return 0
    splits, place_of = find_splits(
        args.images, args.captions, args.masks, args.places, args.shares or SHARES, args.seed
    )
    summaries = build_splits(splits, **build_kwargs(args), **choices)
    print(json.dumps({split: vars(each) for split, each in summaries.items()}, indent=1, ensure_ascii=False))
    if on_both_sides := places_on_both_sides(splits, place_of) if place_of else []:
        print(
            f"deltavlm: warning: {len(on_both_sides)} places are in more than one split, so that what is asked may be "
            f"what was learnt: {shorten(on_both_sides)}",
            file=sys.stderr,
        )
    for split, summary in summaries.items():
        told = f"{summary.pairs} pairs in {split}, {summary.changed} changed"
        if places := sorted({place_of[pair.name] for pair in splits[split] if place_of}):
            told += f", of {len(places)} places: {shorten(places)}"
        if summary.changed in (0, summary.pairs):
            told += "; one kind alone: figures of it say little"
        print(f"{args.output}: {told}", file=sys.stderr)
    return 0
