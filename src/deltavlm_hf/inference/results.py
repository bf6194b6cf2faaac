"""Answers as rows of a file: JSON lines, CSV or Parquet, with what they mean beside them."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from ..data.asked import meaning_of
from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.questions import name_task
from ..files import write_bytes

_TEXT, _CELLS = pa.string(), pa.list_(pa.string())


def columns_of(classes: Classes = ROADS_AND_BUILDINGS) -> pa.Schema:
    """What answers add to the columns of pairs: with a number and a list of cells for each class."""
    return pa.schema(
        {
            "question": _TEXT,
            "task": _TEXT,
            "answer": _TEXT,
            "changed": pa.bool_(),
            **{each.count_column: pa.int64() for each in classes},
            **{each.cells_column: _CELLS for each in classes},
            "error": _TEXT,
            "model": _TEXT,
            "commit": _TEXT,
        }
    )


def check_output(path: Path) -> None:
    """Refuses a file of a form that is not written."""
    if path.suffix.lower() not in _WRITERS:
        raise ValueError(f"--output {path}: expected a name that ends with {', '.join(_WRITERS)}.")


def check_columns(pairs: pa.Table, classes: Classes = ROADS_AND_BUILDINGS) -> None:
    """Refuses pairs whose own columns would stand beside others of the same name."""
    if both := [name for name in pairs.column_names if name in columns_of(classes).names]:
        raise ValueError(
            f"The table of pairs has the columns {', '.join(both)}, which answers have too: rename or remove them."
        )


def result_rows(
    pairs: pa.Table,
    dialogues: Sequence[Sequence[str]],
    entries: Sequence[dict[str, Any]],
    model: str,
    commit: str,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> pa.Table:
    """
    One row for each pair and question, pair by pair.

    Args:
        pairs (`pyarrow.Table`): what is known of each pair; comes back in the first columns.
        dialogues (`Sequence[Sequence[str]]`): the questions, one or more turns each.
        entries (`Sequence[dict]`): for each pair its `answers`, of all turns, or the `error`.
        model (`str`): what the model is called.
        commit (`str`): which one it is, see [`commit_of`].
        classes ([`Classes`], *optional*): what it counts and places, see [`classes_of`]; by default roads and
            buildings.

    Returns:
        `pyarrow.Table`: the pairs' columns and those of [`columns_of`]: question, task (see [`name_task`]), answer,
        what it means (see [`meaning_of`]), error, model and commit. What is not there is null.
    """
    asked = [
        {"question": question, "task": name_task(tuple((each, "") for each in turns), classes)}
        for turns in dialogues
        for question in turns
    ]
    rows = []
    for entry in entries:
        answers = entry.get("answers") or [None] * len(asked)
        for what, answer in zip(asked, answers, strict=True):
            meaning = {} if answer is None else meaning_of(what["question"], answer, classes)
            rows.append({**what, "answer": answer, **meaning, "error": entry.get("error")})
    columns = columns_of(classes)
    found = pa.Table.from_pylist([{**row, "model": model, "commit": commit} for row in rows], columns)
    result = pairs.take([index for index in range(len(entries)) for _ in asked])
    for name in columns.names:
        result = result.append_column(columns.field(name), found[name])
    return result


def write_rows(path: Path, rows: pa.Table) -> None:
    """Writes a table by the suffix of its file, whole or not at all; in CSV, lists stand as JSON."""
    write_bytes(path, _WRITERS[path.suffix.lower()](rows))


def _as_jsonl(rows: pa.Table) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows.to_pylist())
    return "".join(f"{line}\n" for line in lines).encode()


def _as_csv(rows: pa.Table) -> bytes:
    for number, field in enumerate(rows.schema):
        if pa.types.is_nested(field.type):
            texts = [
                None if value is None else json.dumps(value, ensure_ascii=False, default=str)
                for value in rows[field.name].to_pylist()
            ]
            rows = rows.set_column(number, field.name, pa.array(texts, pa.string()))
    buffer = io.BytesIO()
    csv.write_csv(rows, buffer)
    return buffer.getvalue()


def _as_parquet(rows: pa.Table) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(rows, buffer)
    return buffer.getvalue()


_WRITERS = {".jsonl": _as_jsonl, ".csv": _as_csv, ".parquet": _as_parquet}
