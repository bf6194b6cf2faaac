"""`deltavlm compose`."""

import argparse
from pathlib import Path

from .arguments import add_command, hide_progress_bars, positive_integer, whole_number


def add(subparsers) -> None:
    command = add_command(
        subparsers,
        "compose",
        run,
        "Make a model to train of a vision encoder and a language model of your choice, see docs/encoders.md. What "
        "the parts hold is pointed to; what is new is told, and must be trained.",
    )
    add_argument = command.add_argument
    add_argument("output_dir", type=Path, metavar="OUT", help="the folder to make")
    add_argument("--vision", required=True, metavar="V", help="folder or Hub id: any backbone, or an InstructBLIP")
    add_argument(
        "--language-model",
        required=True,
        metavar="L",
        help="folder or Hub id of a causal language model, or a GGUF file (on the Hub: owner/name/file.gguf)",
    )
    add_argument(
        "--qformer",
        metavar="Q",
        help="folder or Hub id of an InstructBLIP, DeltaVLM or BERT (default: a new Q-Former)",
    )
    add_argument("--tokenizer", metavar="T", help="folder or Hub id (default: the language model's own)")
    add_argument(
        "--qformer-tokenizer",
        metavar="T",
        help="folder, Hub id or vocab.txt (default: that of the Q-Former, else the language model's)",
    )
    add_argument("--image-size", type=positive_integer, metavar="N", help="pixels (default: the encoder's)")
    add_argument("--query-tokens", type=positive_integer, default=32, metavar="N", help="default: %(default)s")
    add_argument("--mask-classes", nargs="+", metavar="NAME", help="make change masks of these (default: no masks)")
    add_argument("--ground-resolution", type=float, metavar="M", help="metres per pixel of the images, for scenes")
    add_argument("--dtype", help="float32, bfloat16, ... (default: the language model's)")
    add_argument("--seed", type=whole_number, default=0, help="of what is new (default: %(default)s)")
    add_argument("--whole", action="store_true", help="write all weights, do not point to those of the parts")


def run(args: argparse.Namespace) -> int:
    import torch

    from ..hub.compose import compose
    from ..hub.parts import find_dtype

    hide_progress_bars()
    torch.manual_seed(args.seed)
    made = compose(
        args.vision,
        args.language_model,
        qformer=args.qformer,
        tokenizer=args.tokenizer,
        qformer_tokenizer=args.qformer_tokenizer,
        image_size=args.image_size,
        num_query_tokens=args.query_tokens,
        mask_classes=args.mask_classes,
        ground_resolution=args.ground_resolution,
        dtype=None if args.dtype is None else find_dtype(args.dtype),
        output_dir=args.output_dir,
        small=not args.whole,
    )
    trained = sum(weight.numel() for weight in made.model.parameters() if weight.requires_grad)
    stated = {each["part"]: each.get("license") for each in made.model.config.made_from or []}
    licences = [f"{part} {licence or 'not stated'}" for part, licence in stated.items()]
    print(
        f"{args.output_dir} is a model to train, {trained:,} weights of it. New, and to be trained before any answer "
        f"means something: {', '.join(made.new)}. Licences: {'; '.join(licences)}"
    )
    return 0
