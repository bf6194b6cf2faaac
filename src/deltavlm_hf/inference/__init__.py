"""Asking: the one place where answers are generated; and masks."""

from .asking import answer, ask_pairs, encode
from .masks import predict_mask
from .session import ChangeSession

__all__ = ["ChangeSession", "answer", "ask_pairs", "encode", "predict_mask"]
