"""What several commands have in common."""

import argparse
import sys
from collections.abc import Callable

FAILED, INTERRUPTED = 1, 130


def add_command(subparsers, name: str, run: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
    """A command that `run` carries out; what that returns is the exit code."""
    command = subparsers.add_parser(name, help=help, description=help)
    command.set_defaults(run=run)
    return command


def positive_integer(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def whole_number(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be an integer of at least 0, got {text!r}")
    return int(text)


def add_pair(command: argparse.ArgumentParser) -> None:
    command.add_argument("before", metavar="BEFORE", help="image of the first date: a path or a URL")
    command.add_argument("after", metavar="AFTER", help="image of the second date")


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default="small",
        help="folder or Hub id; inside the package are `small` (for real imagery, the default for images of your own) "
        "and `tiny` (for generated scenes)",
    )
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    command.add_argument("--max-new-tokens", type=positive_integer, metavar="N", help="default: the model's own")


def add_workers(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--workers",
        type=whole_number,
        default=1,
        metavar="N",
        help="processes that read images, ahead of the model; 0: none but the model's own (default: %(default)s)",
    )


def add_engine(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="what reads and answers: this machine's processes, or those of a Ray cluster (default: %(default)s)",
    )
    command.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running cluster, `auto` for this machine's (default: $RAY_ADDRESS, or a Ray of this machine alone)",
    )
    command.add_argument(
        "--actors",
        type=positive_integer,
        metavar="N",
        help="with --engine ray, copies of the model (default: one for each GPU, or for every two CPUs)",
    )


def add_llm_url(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--llm-url",
        metavar="URL",
        help="have vLLM decode, whose API is there, such as http://127.0.0.1:8001/v1 (docs/serving.md)",
    )


def generate_kwargs(args: argparse.Namespace) -> dict[str, int]:
    return {} if args.max_new_tokens is None else {"max_new_tokens": args.max_new_tokens}


def hide_progress_bars() -> None:
    """Those of loading, where nobody looks."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def load(model: str, device: str, llm_url: str | None = None):
    """The model and processor of [`add_model`]'s arguments; of one inside the package it is said what it knows."""
    from ..inference.loading import load_model

    hide_progress_bars()
    loaded = load_model(model, device, llm_url=llm_url)
    tell_note(model)
    return loaded


def tell_note(model: str) -> None:
    """What is to be known of a model inside the package, where it answers."""
    from ..inference.loading import NOTES

    if model in NOTES:
        print(f"deltavlm: {NOTES[model]}", file=sys.stderr)


def open_session(args: argparse.Namespace):
    """[`add_pair`]'s images, and a conversation about them."""
    from ..inference import ChangeSession
    from ..processing import DeltaVLMImageProcessor

    (pair,) = DeltaVLMImageProcessor().fetch_images((args.before, args.after))
    model, processor = load(args.model, args.device)  # takes its time: after what can go wrong with images
    return pair, ChangeSession(model, processor, *pair)
