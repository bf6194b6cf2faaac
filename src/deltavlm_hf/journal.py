"""Files that only grow, so that a run that was killed can go on, and several processes can write."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock


class Journal:
    """
    A file of JSON lines: first a header, which says what it was made with, then entries. A last line that a kill left
    half-written is cut off. Any number of processes may open and write it at once: a lock beside it (`.NAME.lock`)
    lets in one at a time.

    Args:
        path (`Path`): the file; it is made if it is not there.
        header (`dict`): what a run must have in common with the earlier runs that wrote here.
        key (`tuple[str, ...]`): the fields that name an entry; a later one takes the place of an earlier one.

    Attributes:
        entries (`dict[tuple, dict]`): what was in the file when it was opened, and what was appended here, by key.

    Raises:
        ValueError: if the file was made with something else, or is damaged before its last line.
    """

    def __init__(self, path: Path, header: dict[str, Any], key: tuple[str, ...]):
        self.path = path
        self.key = key
        self.entries: dict[tuple, dict] = {}
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        with self._lock, path.open("a+b") as file:
            _cut_off_half_a_line(file)
            file.seek(0)
            lines = file.read().split(b"\n")[:-1]
            if not lines:
                _write(file, header)
        for number, line in enumerate(lines):
            try:
                entry = json.loads(line)
                if number:
                    self.entries[self._name(entry)] = entry
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number + 1}, is damaged; repair or remove it.") from None
            if number == 0 and entry != header:
                raise ValueError(
                    f"{path} was made with {entry}, not {header}; go on with the same settings or choose another "
                    "folder or name."
                )

    def append(self, *entries: dict[str, Any]) -> None:
        """Writes entries and waits until they are on the disk."""
        with self._lock, self.path.open("a+b") as file:
            _cut_off_half_a_line(file)
            _write(file, *entries)
        self.entries |= {self._name(entry): entry for entry in entries}

    def _name(self, entry: dict[str, Any]) -> tuple:
        return tuple(entry[field] for field in self.key)


def _cut_off_half_a_line(file: BinaryIO) -> None:
    """Under the lock nobody else is writing: what does not end in a line break was left by a process that died."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(size - 1, 0))
    if size and file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _write(file: BinaryIO, *lines: dict[str, Any]) -> None:
    file.write(b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines))
    file.flush()
    os.fsync(file.fileno())
