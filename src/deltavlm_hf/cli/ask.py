"""`deltavlm ask`."""

import argparse
import json

from .arguments import add_command, add_model, add_pair, generate_kwargs, open_session


def add(subparsers) -> None:
    command = add_command(subparsers, "ask", run, "Ask one question about a pair of images.")
    add_pair(command)
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--json", action="store_true", help="print the answer as a JSON object")
    add_model(command)


def run(args: argparse.Namespace) -> int:
    answer = open_session(args).ask(args.question, **generate_kwargs(args))
    if args.json:
        asked = {"before": args.before, "after": args.after, "question": args.question}
        print(json.dumps({**asked, "answer": answer, "model": args.model or "tiny"}, ensure_ascii=False))
    else:
        print(answer)
    return 0
