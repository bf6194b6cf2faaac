"""`deltavlm publish`."""

import argparse
from pathlib import Path

from .arguments import add_command


def add(subparsers) -> None:
    command = add_command(subparsers, "publish", run, "Put a model on the Hub, with its card.")
    add_argument = command.add_argument
    add_argument("folder", type=Path, metavar="FOLDER", help="a saved model")
    add_argument("repo_id", metavar="REPO", help="owner/name on the Hub")
    add_argument("--dry-run", action="store_true", help="show what would go up, the card included; send nothing")
    add_argument("--report", type=Path, metavar="FILE", help="report.json of `deltavlm evaluate`, for the card")
    add_argument("--license", default="other", help="of the weights (default: %(default)s)")
    add_argument("--base-model", nargs="+", default=(), metavar="ID", help="what the model was made from")
    add_argument("--private", action="store_true", help="make a new repository private")
    add_argument("--revision", help="branch to publish to (default: main)")


def run(args: argparse.Namespace) -> int:
    from ..hub.publishing import Publication

    publication = Publication(args.folder, args.repo_id, args.report, args.license, args.base_model)
    if args.dry_run:
        print(publication.preview())
    else:
        print(publication.push(private=args.private, revision=args.revision))
    return 0
