"""`deltavlm export-llm`."""

import argparse
from pathlib import Path

from .arguments import add_command, hide_progress_bars


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "export-llm",
        run,
        "Make a plain folder of a model's language model, an adapter merged, with its tokenizer: for vLLM, which "
        "decodes for `--llm-url`, and for whatever else loads language models.",
    )
    command.add_argument("model", metavar="MODEL", help="folder or Hub id; inside the package are `small` and `tiny`")
    command.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    command.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: as it is loaded)")
    command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    from ..hub.export import export_language_model

    hide_progress_bars()
    done = export_language_model(args.model, args.output_dir, dtype=args.dtype, max_shard_size=args.max_shard_size)
    changes = f"; {', '.join(done.changes)}" if done.changes else ""
    print(f"The language model of {args.model} is in {done.folder}: {done.weights:,} weights in {done.dtype}{changes}")
    return 0
