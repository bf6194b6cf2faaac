"""`deltavlm chat`."""

import argparse
import sys

from .arguments import add_command, add_model, add_pair, generate_kwargs, open_session


def add(subparsers) -> None:
    help = "Talk about a pair of images: one question a line, an empty line or Ctrl-D ends."
    command = add_command(subparsers, "chat", run, help)
    add_pair(command)
    add_model(command)


def run(args: argparse.Namespace) -> int:
    _, session = open_session(args)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return 0
        session.ask(question, stream=_print_piece, **generate_kwargs(args))
        print()


def _print_piece(text: str) -> None:
    print(text, end="", flush=True)
