"""Whose turn it is with a model that several threads use."""

import threading


class Turns:
    """
    A lock that is had in the order in which it is asked for: a thread that comes back at once, as one that has always
    more to do does with a `threading.Lock`, waits behind those that are there.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked = self._done = 0

    def __enter__(self) -> None:
        with self._changed:
            turn = self._asked
            self._asked += 1
            self._changed.wait_for(lambda: self._done == turn)

    def __exit__(self, *_) -> None:
        with self._changed:
            self._done += 1
            self._changed.notify_all()
