"""
The one way to write a file or a folder whole: a reader, or the next run after a kill, meets the old one or the new
one, never half of one. Files that only grow are in `journal`.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, TextIO


@contextmanager
def _opened(path: str | os.PathLike, mode: str, **options: Any) -> Iterator[Any]:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file to write to, which takes its place when it is complete. Its folder is made if it is not there."""
    with _opened(path, "w", encoding="utf-8", newline="\n") as file:
        yield file


def write_text(path: str | os.PathLike, text: str) -> None:
    """A text file at once, see [`writing`]."""
    with writing(path) as file:
        file.write(text)


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Any other file at once, see [`writing`]."""
    with _opened(path, "wb") as file:
        file.write(content)


@contextmanager
def placing(path: str | os.PathLike) -> Iterator[Path]:
    """
    For what other libraries write by a file's name: the path of a file of another name and the same ending, which
    takes its place at the end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    partial.unlink(missing_ok=True)  # such libraries add to what is there
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def replacing(folder: str | os.PathLike) -> AbstractContextManager[str]:
    """
    A folder to write to, whose files go to `folder` at the end, all or none: see [`~modeling.saving.replacing`], which
    is there and not here because it goes to the Hub with the model's code, and that cannot import the package.
    """
    from .modeling import saving

    return saving.replacing(folder)


@contextmanager
def making(folder: str | os.PathLike) -> Iterator[str]:
    """As [`replacing`], for a folder that is empty, or is not there: then it is not until it is complete."""
    folder = Path(folder)
    # An empty folder, perhaps a mount point, cannot always be renamed over.
    made = folder if folder.exists() else folder.with_name(f".{folder.name}-converting")
    try:
        with replacing(made) as new:
            yield new
        made.replace(folder)
    except BaseException:
        if made != folder:
            shutil.rmtree(made, ignore_errors=True)
        raise


def find_licences(folder: Path) -> list[Path]:
    """The licence files beside a model, which go along with what is made of it."""
    return [path for path in sorted(folder.glob("LICENSE*")) if path.is_file()]
