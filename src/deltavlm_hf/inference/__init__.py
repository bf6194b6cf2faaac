"""Asking: the one place where answers are generated; and masks."""

from .asking import answer, ask_pairs, encode
from .masks import predict_mask
from .session import ChangeSession
from .stream import Answered, stream_answers

__all__ = ["Answered", "ChangeSession", "answer", "ask_pairs", "encode", "predict_mask", "stream_answers"]
