"""Image pairs to ask about: a table that names them, or the files of a folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from .changechat import ENDINGS, dated_images, images_in
from .words import shorten

DATES = ("before", "after")
_IMAGE_FOLDER = {f"{date}_file_name": date for date in DATES}  # as ImageFolder names columns of images
_FOLDERS = (("A", "B"), DATES)
_FORMS = (
    "a table (.csv, .jsonl or .parquet) with columns `before` and `after`, or a folder that has such a table as "
    "`metadata`, images of the same names in A and B, or images named like x_pre.png and x_post.png"
)


@dataclass(frozen=True)
class PairTable:
    """
    Pairs by their number: `table[i]` is `(before, after)`, each a path, a URL or, of a table that holds images,
    `{"bytes", "path"}`.

    Attributes:
        rows (`pyarrow.Table`): `before` and `after`, and whatever else is known of each pair.
        folder (`Path`): what relative paths are relative to.
    """

    rows: pa.Table
    folder: Path

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        before, after = (self._image(date, self.rows[date][index].as_py()) for date in DATES)
        return before, after

    def _image(self, date: str, value: Any) -> Any:
        if isinstance(value, dict):
            if value["bytes"] is not None:
                return value
            value = value["path"]
        if not value:
            raise ValueError(f"{date} image: none is named")
        return value if "://" in value else self.folder / value

    def first(self, number: int | None) -> "PairTable":
        """As many pairs as there are, or as are asked for."""
        return PairTable(self.rows.slice(0, number), self.folder)

    def named(self) -> pa.Table:
        """The rows with the paths of images in place of images."""
        rows = self.rows
        for date in DATES:
            if pa.types.is_struct(rows[date].type):
                paths = pc.struct_field(rows[date], "path")
                rows = rows.set_column(rows.column_names.index(date), date, paths)
        return rows.replace_schema_metadata(None)  # of whoever wrote it, about columns that are no longer there


def find_pair_table(source: str | Path) -> PairTable:
    """
    The pairs of a table or a folder, in the table's order or sorted by name.

    Args:
        source (`str` or `Path`): a table (`.csv`, `.jsonl` or `.parquet`) with columns `before` and `after`, paths
            relative to the table's folder, URLs or, in Parquet, images of `datasets`; or a folder: with such a table
            named `metadata`, whose columns may be `before_file_name` and `after_file_name` as ImageFolder has them;
            with images of the same names in `A` and `B` (or `before` and `after`); or with images named `x_pre` and
            `x_post`, `x_before` and `x_after` or, as in xBD, `x_pre_disaster` and `x_post_disaster`.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it has no pairs, the table cannot be read, or images lack a partner; the message names some.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return _read_pairs(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{source} does not exist; expected {_FORMS}.")
    for suffix in _READERS:
        if (path / f"metadata{suffix}").is_file():
            return _read_pairs(path / f"metadata{suffix}")
    for first, second in _FOLDERS:
        if (path / first).is_dir() and (path / second).is_dir():
            return _match(path, images_in(path / first), images_in(path / second))
    before, after = dated_images(path)
    if not before and not after:
        raise ValueError(f"There are no pairs in {source}; expected {_FORMS}.")
    return _match(path, before, after, lambda key: ENDINGS.fullmatch(key)[1])  # type: ignore[index]


def _match(
    folder: Path, before: dict[str, Path], after: dict[str, Path], name: Callable[[str], str] = str
) -> PairTable:
    alone = sorted(
        str(path.relative_to(folder))
        for one, other in ((before, after), (after, before))
        for key, path in one.items()
        if key not in other
    )
    if alone:
        raise ValueError(f"{folder}: images without their other date: {shorten(alone)}.")
    if not before:
        raise ValueError(f"There are no pairs in {folder}; expected {_FORMS}.")
    keys = sorted(before)
    columns = {"name": [name(key) for key in keys]}
    for date, files in zip(DATES, (before, after), strict=True):
        columns[date] = [files[key].relative_to(folder).as_posix() for key in keys]
    return PairTable(pa.table(columns), folder)


def read_table(path: Path) -> pa.Table:
    """A table of any columns; `ValueError` if it is none."""
    suffix = path.suffix.lower()
    if suffix not in _READERS:
        raise ValueError(f"{path} is no table; expected a name that ends with {', '.join(_READERS)}.")
    try:
        return _READERS[suffix](path)
    except (pa.ArrowException, ValueError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _read_pairs(path: Path) -> PairTable:
    if path.suffix.lower() not in _READERS:
        raise ValueError(f"{path} is no table of pairs; expected {_FORMS}.")
    rows = read_table(path)
    names = [_IMAGE_FOLDER.get(name, name) for name in rows.column_names]
    rows = rows.rename_columns(names)
    if any(names.count(date) != 1 for date in DATES) or len(set(names)) < len(names):
        raise ValueError(f"{path} has the columns {', '.join(names)}; expected `before` and `after`, each name once.")
    for date in DATES:
        kind = rows[date].type
        of_datasets = pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes", "path"}
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or of_datasets):
            raise ValueError(f"{path}, column `{date}`: expected paths, URLs or images of `datasets`, got {kind}.")
    if not len(rows):
        raise ValueError(f"{path} has no rows.")
    return PairTable(rows, path.parent)


def _read_csv(path: Path) -> pa.Table:
    """A column is numbers, or true and false, only where that gives back its very text: `007` stays as it is."""
    with csv.open_csv(path) as reader:
        names = reader.schema.names
    rows = csv.read_csv(
        path,
        parse_options=csv.ParseOptions(newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string())),
    )
    return pa.table([_typed(column) for column in rows.columns], rows.column_names)


def _typed(column: pa.ChunkedArray) -> pa.ChunkedArray:
    filled = pc.if_else(pc.equal(column, ""), None, column)
    for kind in (pa.int64(), pa.float64(), pa.bool_()):
        try:
            values = filled.cast(kind)
        except pa.ArrowInvalid:
            continue
        if filled.null_count < len(filled) and values.cast(pa.string()).equals(filled):
            return values
    return column


def _read_jsonl(path: Path) -> pa.Table:
    rows: list[dict[str, Any]] = []
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": lambda path: parquet.ParquetFile(path).read(),
}
