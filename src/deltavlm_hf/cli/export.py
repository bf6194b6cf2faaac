"""`deltavlm export`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import add_command, hide_progress_bars

if TYPE_CHECKING:
    from ..hub.export import Export


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "export",
        run,
        "Make a whole model of a checkpoint that points to others' weights or holds an adapter: to move, or to "
        "publish. A report of the checkpoint holds for it.",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id of a trained model")
    add_form(command)


def run(args: argparse.Namespace) -> int:
    from ..hub.export import export

    hide_progress_bars()
    done = export(args.checkpoint, args.output_dir, dtype=args.dtype, max_shard_size=args.max_shard_size)
    print(f"{args.checkpoint} is whole in {tell(done)}")
    return 0


def add_form(command: argparse.ArgumentParser) -> None:
    """Where to, and in which form, weights are written; `export-llm` has it too."""
    command.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as it is loaded)")
    command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")


def tell(done: "Export") -> str:
    """Where it is, and what."""
    changes = f"; {', '.join(done.changes)}" if done.changes else ""
    return f"{done.folder}: {done.weights:,} weights in {done.dtype}{changes}"
