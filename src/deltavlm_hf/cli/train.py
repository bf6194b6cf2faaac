"""`deltavlm train`."""

import argparse
import sys
from pathlib import Path

from .arguments import add_command


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "train",
        run,
        "Fine-tune a model as a YAML file says, see docs/training.md. A run that was stopped goes on from its last "
        "checkpoint; `torchrun` or `accelerate launch` spread it over processes.",
    )
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as examples/finetune.yaml")
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="in place of what the file says, such as data.source=annotations training.max_steps=100",
    )


def run(args: argparse.Namespace) -> int:
    from ..training.run import TrainingRun, train

    print(train(TrainingRun.from_yaml(args.config, args.set), show=lambda text: print(text, file=sys.stderr)))
    return 0
