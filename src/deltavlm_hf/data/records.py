"""
The one record type for all six tasks, and the border to ChangeChat-105k's JSON files: the upstream names are used here
and nowhere else.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import ijson

from ..files import writing
from .questions import INSTRUCTIONS, TASKS, Turns, name_task

_SPEAKERS = ("human", "gpt")
_IMAGE_MARK = "<image>"
_HEAD = 64  # bytes in which a list's bracket must come


class RecordError(ValueError):
    """An annotation that is not of either of ChangeChat-105k's two forms."""


@dataclass(frozen=True)
class Record:
    """
    A conversation about an image pair.

    Attributes:
        id (`str`): of the record, unique within its file.
        task (`str`): one of `caption`, `binary`, `count`, `grid`, `open`, `dialogue`.
        before (`str`): the image of the first date, a path relative to the folder of images, with `/`.
        after (`str`): the image of the second date, likewise.
        turns (`tuple[tuple[str, str], ...]`): questions with their answers; several for dialogues only.
        changed (`bool`, *optional*): whether the pair changed, where it is known; upstream's `changeflag`.
        captions (`tuple[str, ...]`, *optional*): reference captions of the pair, in captioning test files only.
    """

    id: str
    task: str
    before: str
    after: str
    turns: Turns
    changed: bool | None = None
    captions: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, item: Any, task: str | None = None) -> "Record":
        """
        Reads either form of an annotation: `image` and `conversations`, or `image_A`, `image_B` and `captions`.

        Args:
            item: what stands in the JSON list.
            task (`str`, *optional*): the task, where the file's name gives it. Else it is the record's own `task`, or
                told from its questions.

        Raises:
            RecordError: if something is missing or of another type; the message says what.
        """
        if not isinstance(item, dict):
            raise RecordError(f"expected an object, got {_shorten(item)}")
        if "captions" in item:
            return cls._from_captions(item)
        images = item.get("image")
        if not isinstance(images, list) or len(images) != 2:
            raise RecordError(f"'image' must list the paths of two images, got {_shorten(images)}")
        before, after = map(check_path, images)
        turns = _read_turns(item.get("conversations"))
        task = task or item.get("task") or name_task(turns)
        if task not in TASKS:
            raise RecordError(f"'task' must be one of {', '.join(TASKS)}, got {_shorten(task)}")
        return cls(_read_id(item, before), task, before, after, turns, _read_flag(item))

    @classmethod
    def _from_captions(cls, item: dict) -> "Record":
        before, after = (check_path(item.get(name)) for name in ("image_A", "image_B"))
        captions = item["captions"]
        if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
            raise RecordError(f"'captions' must list at least one text, got {_shorten(captions)}")
        turns = ((INSTRUCTIONS["caption"], captions[0]),)
        return cls(_read_id(item, before), "caption", before, after, turns, _read_flag(item), tuple(captions))

    def to_json(self) -> dict[str, Any]:
        """
        The upstream form, `task` added; [`~Record.from_json`] reads it back. White space around questions is lost, and
        a record with `captions` is read back with the fixed instruction and the first of them.
        """
        flag = {} if self.changed is None else {"changeflag": int(self.changed)}
        if self.captions:
            paths = {"image_A": self.before, "image_B": self.after}
            return {"id": self.id, **paths, "captions": list(self.captions), **flag}
        texts = [text for turn in self.turns for text in turn]
        texts[0] = f"{_IMAGE_MARK} {_IMAGE_MARK} {texts[0]}"
        conversations = [{"from": _SPEAKERS[i % 2], "value": text} for i, text in enumerate(texts)]
        images = {"image": [self.before, self.after]}
        return {"id": self.id, "task": self.task, **images, **flag, "conversations": conversations}


def write_records(path: str | Path, records: Iterable[Record]) -> int:
    """
    Writes annotations, one record a line within a JSON list. The file appears when it is complete.

    Returns:
        `int`: how many were written.
    """
    count = 0
    with writing(path) as file:
        for count, record in enumerate(records, start=1):
            file.write(",\n" if count > 1 else "[\n")
            json.dump(record.to_json(), file, ensure_ascii=False)
        file.write("\n]\n" if count else "[]\n")
    return count


def read_items(path: str | Path) -> Iterator[Any]:
    """
    The items of a file with a JSON list, one by one: memory does not grow with the file.

    Raises:
        ValueError: if the file is no JSON list; the message names it.
    """
    with open(path, "rb") as file:
        mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(mark)
        if not file.read(_HEAD).lstrip().startswith(b"["):
            raise ValueError(f"{path} holds no JSON list of records.")
        file.seek(mark)
        try:
            yield from ijson.items(file, "item", use_float=True)
        except ijson.JSONError as error:
            raise ValueError(f"{path} is not readable as JSON: {' '.join(str(error).split())}") from error


def read_records(path: str | Path, task: str | None = None) -> Iterator[Record]:
    """
    The records of an annotation file, one by one.

    Raises:
        RecordError: at the first item that is not of either form; the message names file and item.
        ValueError: if the file is no JSON list.
    """
    for index, item in enumerate(read_items(path)):
        try:
            yield Record.from_json(item, task)
        except RecordError as error:
            raise RecordError(f"{path}, item {index} (id {_id_of(item)}): {error}") from None


def _id_of(item: Any) -> str:
    return _shorten(item.get("id")) if isinstance(item, dict) else "none"


def _read_id(item: dict, before: str) -> str:
    identity = item.get("id")
    if identity is None:
        return PurePosixPath(before).stem  # captioning test files have none
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise RecordError(f"'id' must be a number or a text, got {_shorten(identity)}")
    return str(identity)


def _read_flag(item: dict) -> bool | None:
    flag = item.get("changeflag")
    if flag is not None and not isinstance(flag, int):
        raise RecordError(f"'changeflag' must be 0 or 1, got {_shorten(flag)}")
    return None if flag is None else flag != 0  # upstream: "non-zero values flag changed pairs"


def check_path(path: Any) -> str:
    """A path as records have it; RecordError for anything else."""
    if not isinstance(path, str) or not path:
        raise RecordError(f"expected the path of an image, got {_shorten(path)}")
    posix = PurePosixPath(path)
    if "\\" in path or PureWindowsPath(path).drive or posix.is_absolute() or ".." in posix.parts:
        raise RecordError(f"image paths must lie below the folder of images, got {_shorten(path)}")
    if "::" in path:
        raise RecordError(
            f"image paths must not have '::' in them, which `datasets` takes for a nested path: {path!r}"
        )
    return path


def _read_turns(conversations: Any) -> Turns:
    if not isinstance(conversations, list) or not conversations or len(conversations) % 2:
        raise RecordError(f"'conversations' must list questions with their answers, got {_shorten(conversations)}")
    texts = []
    for index, message in enumerate(conversations):
        speaker = message.get("from") if isinstance(message, dict) else None
        if speaker != _SPEAKERS[index % 2] or not isinstance(message.get("value"), str):
            raise RecordError(
                f"message {index} must have 'from': '{_SPEAKERS[index % 2]}' and a text 'value', "
                f"got {_shorten(message)}"
            )
        texts.append(message["value"])
    questions = (text.replace(_IMAGE_MARK, "").strip() for text in texts[::2])
    return tuple(zip(questions, texts[1::2], strict=True))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
