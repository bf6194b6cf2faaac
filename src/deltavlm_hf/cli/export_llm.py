"""`deltavlm export-llm`."""

import argparse

from .arguments import add_command, hide_progress_bars
from .export import add_form, tell


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "export-llm",
        run,
        "Make a plain folder of a model's language model, an adapter merged, with its tokenizer: for vLLM, which "
        "decodes for `--llm-url`, and for whatever else loads language models.",
    )
    command.add_argument("model", metavar="MODEL", help="folder or Hub id; inside the package are `small` and `tiny`")
    add_form(command)


def run(args: argparse.Namespace) -> int:
    from ..hub.export import export_language_model

    hide_progress_bars()
    done = export_language_model(args.model, args.output_dir, dtype=args.dtype, max_shard_size=args.max_shard_size)
    print(f"The language model of {args.model} is in {tell(done)}")
    return 0
