"""`deltavlm data build`."""

import argparse
import json

from ..arguments import add_command
from .arguments import add_pairs, pairs_kwargs


def add(subparsers) -> None:
    command = add_command(subparsers, "build", run, "Build annotations by rule from captions and change masks.")
    add_pairs(command, name="changechat")
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="default: caption binary count grid dialogue")
    command.add_argument("--paraphrase", type=float, default=0.0, help="share of instructions in other words, 0 to 1")
    command.add_argument("--seed", type=int, default=0, help="chooses paraphrases (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace files that are there")


def run(args: argparse.Namespace) -> int:
    from ...data.build import RULE_TASKS, build_dataset

    choices = {"tasks": args.tasks or RULE_TASKS, "seed": args.seed, "paraphrase": args.paraphrase}
    summary = build_dataset(**pairs_kwargs(args), **choices, overwrite=args.overwrite)
    print(json.dumps(vars(summary), indent=1, ensure_ascii=False))
    return 0
