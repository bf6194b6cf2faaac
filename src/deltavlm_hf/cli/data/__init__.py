"""`deltavlm data COMMAND`."""

from . import build, check, show, write


def add(subparsers) -> None:
    data = subparsers.add_parser("data", help="Check, build and look at data of ChangeChat-105k's form.")
    commands = data.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (check, build, write, show):
        command.add(commands)
