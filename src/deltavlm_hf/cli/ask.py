"""`deltavlm ask`."""

import argparse
import json
from pathlib import Path

from .arguments import add_command, add_model, add_pair, generate_kwargs, open_session


def add(subparsers) -> None:
    command = add_command(subparsers, "ask", run, "Ask one question about a pair of images.")
    add_pair(command)
    command.add_argument("question", metavar="QUESTION")
    command.add_argument(
        "--mask", type=Path, metavar="PNG", help="write which pixels changed: grey, 128 a road, 255 a building"
    )
    command.add_argument("--json", action="store_true", help="print the answer as a JSON object")
    add_model(command)


def run(args: argparse.Namespace) -> int:
    from ..inference.masks import predict_mask, write_mask

    pair, session = open_session(args)
    if args.mask is not None:
        write_mask(args.mask, predict_mask(session.model, session.processor, *pair))
    answer = session.ask(args.question, **generate_kwargs(args))
    if args.json:
        said = {"before": args.before, "after": args.after, "question": args.question, "answer": answer}
        said |= {"model": args.model} | ({"mask": str(args.mask)} if args.mask else {})
        print(json.dumps(said, ensure_ascii=False))
    else:
        print(answer)
    return 0
