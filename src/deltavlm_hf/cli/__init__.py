"""The command line, `deltavlm COMMAND`: each file parses one command's arguments and calls the package."""

from .main import main

__all__ = ["main"]
