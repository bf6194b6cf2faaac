"""Pairs that are kept for some minutes, by what is in them: sent twice, a pair is encoded once."""

import hashlib
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass
class Pair:
    """A pair as pixels `(1, 2, 3, H, W)`, then, once the model has seen it, as features `(2N, D)`."""

    id: str
    pixels: np.ndarray | None
    features: torch.Tensor | None = None
    used: float = field(default_factory=time.monotonic)


class Pairs:
    """
    The pairs that are known. Used by one thread.

    A pair's id is a digest of its files under a secret of this process: who has not got the files, or an answer about
    them, cannot make it.

    Args:
        most (`int`): pairs that are kept; for another one, that unused for longest goes.
        seconds (`float`): how long one is kept after it was used.
    """

    def __init__(self, most: int, seconds: float):
        self.most = most
        self.seconds = seconds
        self._secret = secrets.token_bytes(32)
        self._kept: OrderedDict[str, Pair] = OrderedDict()  # the latest used last

    def __len__(self) -> int:
        return len(self._kept)

    def name(self, files: Sequence[bytes]) -> str:
        """The id of a pair of files. May be called in any thread."""
        digest = hashlib.blake2b(key=self._secret, digest_size=24)
        for file in files:
            digest.update(len(file).to_bytes(8))
            digest.update(file)
        return f"pair-{digest.hexdigest()}"

    def get(self, id: str) -> Pair | None:
        """A pair that is kept, from now on for so long again."""
        self.forget()
        pair = self._kept.get(id)
        if pair is not None:
            pair.used = time.monotonic()
            self._kept.move_to_end(id)
        return pair

    def keep(self, id: str, pixels: np.ndarray) -> Pair:
        """The pair of this id: the one that is there, or a new one."""
        pair = self.get(id)
        if pair is None:
            pair = self._kept[id] = Pair(id, pixels)
            self.forget()
        return pair

    def forget(self) -> None:
        """Lets go what is too old or too much. Rows that wait hold their pairs themselves."""
        oldest = time.monotonic() - self.seconds
        while self._kept and (len(self._kept) > self.most or next(iter(self._kept.values())).used < oldest):
            self._kept.popitem(last=False)
