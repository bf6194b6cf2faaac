"""Asking: the one place where answers are generated."""

from .asking import answer, ask_pairs, encode
from .session import ChangeSession

__all__ = ["ChangeSession", "answer", "ask_pairs", "encode"]
