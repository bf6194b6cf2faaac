"""`deltavlm export`."""

import argparse
from pathlib import Path

from .arguments import add_command, hide_progress_bars


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "export",
        run,
        "Make a whole model of a checkpoint that points to others' weights or holds an adapter: to move, or to "
        "publish. A report of the checkpoint holds for it.",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a trained model")
    command.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as it is loaded)")
    command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from ..hub.export import export

    hide_progress_bars()
    done = export(args.checkpoint, args.output_dir, dtype=args.dtype, max_shard_size=args.max_shard_size)
    changes = f"; {', '.join(done.changes)}" if done.changes else ""
    print(f"{args.checkpoint} is whole in {done.folder}: {done.weights:,} weights in {done.dtype}{changes}")
    return 0
