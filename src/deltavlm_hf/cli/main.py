"""`deltavlm COMMAND`. Results go to stdout, all else to stderr."""

import argparse
import os
import sys
from collections.abc import Sequence

from .. import __version__
from . import (
    ask,
    chat,
    compare,
    compose,
    convert,
    data,
    demo,
    evaluate,
    export,
    export_llm,
    predict,
    publish,
    scan,
    serve,
    train,
)
from .arguments import FAILED, INTERRUPTED

# As `--help` lists them.
COMMANDS = (
    ask,
    chat,
    predict,
    scan,
    serve,
    demo,
    evaluate,
    compare,
    train,
    compose,
    convert,
    export,
    export_llm,
    publish,
    data,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Exit codes: 0 done, 1 failed with a message, 2 wrong usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="deltavlm", description="Ask what changed between two images of one place.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(subparsers)
    args = parser.parse_args(argv)
    # Read when PyTorch is imported. Its threads that wait would spin, on cores that processes which read images need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return args.run(args)
    except (OSError, ValueError, ImportError) as error:
        print(f"deltavlm: error: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
