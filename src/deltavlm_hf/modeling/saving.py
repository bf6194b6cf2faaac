"""
Saving over what is there: at any moment, also after a kill, a folder holds either all of the old or all of the new.

A save writes its files to `FOLDER/.saving-new/files` and their names, the decisive one first, to `names.json` beside.
When all of it is on the disk the files are renamed into the folder. The first of these renames decides: before it the
folder is the old one; after it, it is the new one, and who loads it next finishes what is left to rename. That file is
`config.json` where there is one, which Auto classes read before they ask ours.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME, logging

logger = logging.get_logger(__name__)

# Of the single file, the shards and the index of a variant, `from_pretrained` would read one, the newest or not.
_WEIGHTS = (
    re.compile(r"model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?\.safetensors"),
    re.compile(r"model\.safetensors\.index(?:\.([\w-]+))?\.json"),
)


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """
    A folder to write to, whose files go to `folder` at the end, all or none. Weights take the place of all weights
    there. Another process that saves to the same folder is waited for.

        with replacing("model") as new:  # both, or neither
            model.save_pretrained(new)
            processor.save_pretrained(new)

    Args:
        folder (`str` or `os.PathLike`): is made if it is not there. Its other files stay.

    Raises:
        OSError: if it cannot be written to. What was there before is untouched.
    """
    folder = Path(folder)
    if folder.parts[-2:] == (".saving-new", "files"):  # within another of these, which does all of it
        yield str(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder) as saving:
        new = saving / "files"
        new.mkdir()
        try:
            yield str(new)
        except SafetensorError as error:
            raise OSError(
                f"The weights cannot be written to {os.fspath(folder)!r}: {error}. What was there before is untouched."
            ) from error
        names = sorted(_files_in(new), key=lambda name: (name != CONFIG_NAME, name))
        if not names:
            return
        _make_room(folder, names)
        (saving / "names.json").write_text(json.dumps(names))
        for path in (*(new / name for name in names), saving / "names.json", new, saving):
            _to_disk(path)
        _move(folder, names[:1])
        _finish(folder, names)


@contextmanager
def loading(folder: str | os.PathLike, decisive: str = CONFIG_NAME) -> Iterator[None]:
    """
    Around the reading of a folder: finishes first what a killed process left, and tells if another saved meanwhile.

    Args:
        folder (`str` or `os.PathLike`): if it is none, nothing is done.
        decisive (`str`, *optional*, defaults to `"config.json"`): a file that every save to the folder replaces.

    Raises:
        OSError: if files of two saves were read, or if what was left cannot be finished, see [`finish_saving`].
    """
    folder = Path(folder)
    finish_saving(folder)
    before = _identity(folder / decisive)
    try:
        yield
    finally:
        if _identity(folder / decisive) != before:
            raise OSError(f"{os.fspath(folder)!r} was saved anew while it was being loaded: load it once more.")


def finish_saving(folder: str | os.PathLike) -> None:
    """
    Finishes a save that was killed after it had begun to replace files. Every `from_pretrained` of DeltaVLM does this.

    Raises:
        OSError: if the folder cannot be written to. Until then old and new files stand beside each other there.
    """
    folder = Path(folder)
    if _decided(folder) is None:
        return
    try:
        with _alone(folder):
            pass
    except OSError as error:
        raise OSError(
            f"A save to {os.fspath(folder)!r} was cut short: old and new files stand beside each other. It cannot be "
            f"finished here: {error}. Load it once where it can be written to, or load a copy of it."
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[Path]:
    """`.saving-new`, empty, while no other process saves to the folder. What a killed one left is done with."""
    saving = folder / ".saving-new"
    if saving.is_symlink():
        saving.unlink()  # a stranger's, to anywhere
    lock = FileLock(saving / "lock")
    while not lock.is_locked:
        saving.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # the other was through, and removed it all
            try:
                lock.acquire(timeout=1)
            except Timeout:
                logger.warning_once(f"Another process is saving to {folder}: waiting for it.")
    try:
        names = _decided(folder)
        if names is not None:
            _finish(folder, names)
        _clear(saving)
        for left in folder.glob(".saving-*"):
            if left != saving:  # by earlier versions
                shutil.rmtree(left, ignore_errors=True)
        yield saving
    finally:
        if _decided(folder) is None:
            _clear(saving)
            shutil.rmtree(saving, ignore_errors=True)
        lock.release()


def _decided(folder: Path) -> list[str] | None:
    """The names of the new files, if the first of them has been renamed; else the folder is the old one."""
    saving = folder / ".saving-new"
    try:
        names = list(map(str, json.loads((saving / "names.json").read_text())))
        return None if os.path.lexists(saving / "files" / names[0]) else names
    except (OSError, ValueError, LookupError, TypeError):  # not there, or not written to its end
        return None


def _finish(folder: Path, names: list[str]) -> None:
    saving = folder / ".saving-new"
    left = _files_in(saving / "files")  # not by `names`: a stranger's file could name any place
    _make_room(folder, left)
    _move(folder, left)
    weights = {_variant(name) for name in names} - {None}
    for path in folder.iterdir():
        if _variant(path.name) in weights and path.name not in names:
            path.unlink()
    _clear(saving)


def _move(folder: Path, names: list[str]) -> None:
    for name in names:
        os.replace(folder / ".saving-new" / "files" / name, folder / name)
    for place in {(folder / name).parent for name in names}:
        _to_disk(place)


def _clear(saving: Path) -> None:
    """The names go first: without the files they would say that these have been renamed."""
    (saving / "names.json").unlink(missing_ok=True)
    shutil.rmtree(saving / "files", ignore_errors=True)


def _make_room(folder: Path, names: list[str]) -> None:
    """Whatever could keep a file from being renamed into the folder is told before the first one is."""
    for parent in {Path(name).parent for name in names}:
        place = folder / parent
        place.mkdir(parents=True, exist_ok=True)
        if place.resolve() != folder.resolve() / parent:
            raise OSError(f"{os.fspath(place)!r} leads out of the folder: replace the link by a folder.")
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{os.fspath(place)!r} cannot be written to.")
    for name in names:
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{os.fspath(folder / name)!r} is a folder, where a file is to be saved.")


def _files_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


def _variant(name: str) -> str | None:
    """Of a file of weights: the variant that it belongs to, mostly an empty one. `None` for other files."""
    matches = (pattern.fullmatch(name) for pattern in _WEIGHTS)
    return next((match[1] or "" for match in matches if match), None)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, would outlive a loss of power."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not path.is_dir():  # for which some file systems have no such call
            raise
