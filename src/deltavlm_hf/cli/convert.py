"""`deltavlm convert`."""

import argparse
from pathlib import Path

from .arguments import add_command


def add(subparsers) -> None:
    help = "Convert a checkpoint of the authors' release to a folder for from_pretrained."
    command = add_command(subparsers, "convert", run, help)
    command.set_defaults(error=command.error)
    command.add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    start = command.add_mutually_exclusive_group(required=True)
    start.add_argument("--checkpoint", type=Path, help="the authors' checkpoint_best.pth")
    start.add_argument("--instructblip", help="folder or Hub id: a model to train, from InstructBLIP alone")
    command.add_argument("--vision", help="EVA-ViT file, or folder or Hub id of InstructBLIP")
    command.add_argument("--language-model", help="folder or Hub id, such as lmsys/vicuna-7b-v1.5")
    command.add_argument("--qformer-tokenizer", help="bert-base-uncased: folder, Hub id or vocab.txt")
    command.add_argument("--config", type=Path, help="config.json with the sizes (default: the paper's)")
    command.add_argument("--small", action="store_true", help="point to the weights of the bases, do not copy them")
    command.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    needed = {name: getattr(args, name) for name in ("vision", "language_model", "qformer_tokenizer")}
    options = {"output_dir": args.output_dir, "small": args.small, "max_shard_size": args.max_shard_size}
    if args.instructblip:
        given = [name for name, value in {**needed, "config": args.config}.items() if value is not None]
    else:
        given = [name for name, value in needed.items() if value is None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        args.error(
            f"--instructblip holds all parts itself: leave out {flags}" if args.instructblip else f"add {flags}"
        )
    from ..hub.conversion import convert_instructblip, convert_original_checkpoint
    from ..modeling import DeltaVLMConfig

    if args.instructblip:
        folder = convert_instructblip(args.instructblip, **options)
    else:
        config = DeltaVLMConfig.from_json_file(args.config) if args.config else None
        folder = convert_original_checkpoint(args.checkpoint, **needed, **options, config=config)
    print(folder)
    return 0
