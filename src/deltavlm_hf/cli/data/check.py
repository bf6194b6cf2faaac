"""`deltavlm data check`."""

import argparse
import json
from pathlib import Path

from ..arguments import FAILED, add_command
from .arguments import add_images


def add(subparsers) -> None:
    help = "Say what is missing, broken or contradictory. Exit code 1 if anything is."
    command = add_command(subparsers, "check", run, help)
    command.add_argument("source", metavar="DATA", help="folder, file or Hub id, such as hlwu/changechat-105k")
    add_images(command)
    command.add_argument("--no-images", action="store_true", help="look at annotations alone")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the whole report there")


def run(args: argparse.Namespace) -> int:
    from ...data.check import check_data
    from ...files import write_text

    report = check_data(args.source, args.images, look_at_images=not args.no_images, revision=args.revision)
    print(report.table())
    if args.json:
        write_text(args.json, json.dumps(report.to_dict(), indent=1, ensure_ascii=False))
    return FAILED if report.problems else 0
