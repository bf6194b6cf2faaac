"""`deltavlm demo`."""

import argparse
from pathlib import Path

from .arguments import add_command, add_model, generate_kwargs, load


def add(subparsers) -> None:
    help = "Show a generated pair, with answers of a model, as text and as a picture."
    command = add_command(subparsers, "demo", run, help)
    add_model(command)
    command.set_defaults(model=None)  # the one that knows what is shown
    command.add_argument("--seed", type=int, default=18, help="which pair to show (default: %(default)s)")
    command.add_argument("--output", type=Path, default=Path("deltavlm_demo.png"), help="default: %(default)s")
    command.add_argument("--web", action="store_true", help="serve a page to drop images on and talk about them")
    command.add_argument("--host", default="127.0.0.1", help="of the page (default: %(default)s)")
    command.add_argument("--port", type=int, help="of the page (default: the first free one from 7860)")
    command.add_argument("--share", action="store_true", help="a public link to the page, through gradio's servers")


def run(args: argparse.Namespace) -> int:
    args.model = args.model or ("small" if args.web else "tiny")
    model, processor = load(args.model, args.device)
    if args.web:
        from ..app.page import build, launch
        from ..inference.loading import NOTES

        launch(
            build(model, processor, note=NOTES.get(args.model)),
            server_name=args.host,
            server_port=args.port,
            share=args.share,
        )
        return 0
    from ..app.picture import ask_and_draw

    text, picture = ask_and_draw(model, processor, args.seed, **generate_kwargs(args))
    print(text)
    picture.save(args.output)
    print(f"\nPicture: {args.output}")
    return 0
