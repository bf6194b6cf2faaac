"""Pairs from tables and folders of every form, and what is said of those that are none."""

import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Features, Image, Value
from pyarrow import parquet

from deltavlm_hf.data.asked import meaning_of, meanings, questions_of
from deltavlm_hf.data.pairs import find_pair_table
from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.inference.results import columns_of
from deltavlm_hf.processing.reading import read_image

OTHERS = [
    {"id": "007", "pair": 7, "share": 0.5, "seen": True, "place": "Ürzig, Mosel"},
    {"id": "010", "pair": None, "share": 1.25, "seen": False, "place": 'a "b"'},
]


@pytest.fixture(scope="module")
def images(pairs, tmp_path_factory):
    """The two pairs as files: `0-before.png` and so on."""
    folder = tmp_path_factory.mktemp("images")
    for number, pair in enumerate(pairs):
        for date, image in zip(("before", "after"), pair, strict=True):
            image.save(folder / f"{number}-{date}.png")
    return folder


def write(path, rows):
    """Rows of plain values as a table, by its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        quoted = [['"' + str("" if v is None else v).replace('"', '""') + '"' for v in row.values()] for row in rows]
        text = "\n".join([",".join(rows[0]), *map(",".join, quoted), ""])
        path.write_text("\ufeff" + text.replace('"True"', "true").replace('"False"', "false"), encoding="utf-8")


def check_images(table, pairs):
    assert len(table) == len(pairs)
    for number, pair in enumerate(pairs):
        for source, image in zip(table[number], pair, strict=True):
            assert (np.asarray(read_image(source)) == np.asarray(image)).all()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", ["table", "imagefolder"])
def test_tables(form, suffix, images, pairs, tmp_path):
    folder = shutil.copytree(images, tmp_path / "data" / "images").parent
    names = ("before", "after") if form == "table" else ("before_file_name", "after_file_name")
    rows = [
        {names[0]: f"images/{number}-before.png", **other, names[1]: f"images/{number}-after.png"}
        for number, other in enumerate(OTHERS)
    ]
    path = folder / ("pairs" if form == "table" else "metadata")
    write(path.with_suffix(suffix), rows)
    table = find_pair_table(path.with_suffix(suffix) if form == "table" else folder)
    check_images(table, pairs)
    assert table.rows.drop_columns(["before", "after"]).to_pylist() == OTHERS
    assert table.rows.column_names == ["before", *OTHERS[0], "after"]
    assert len(table.first(1)) == 1 and len(table.first(None)) == len(table.first(9)) == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("A/{}.png", "B/{}.png"),
        ("before/{}.png", "after/{}.png"),
        ("{}_pre.png", "{}_post.png"),
        ("{}_before.png", "{}_after.png"),
        ("{}_pre_disaster.png", "{}_post_disaster.png"),
    ],
)
def test_folders(before, after, images, pairs, tmp_path):
    for number in range(2):
        for date, form in (("before", before), ("after", after)):
            path = tmp_path / form.format(f"x_{number}")
            path.parent.mkdir(exist_ok=True)
            shutil.copy(images / f"{number}-{date}.png", path)
    (path.parent / "notes.txt").write_text("no image")
    table = find_pair_table(tmp_path)
    check_images(table, pairs)
    assert table.rows.to_pylist() == [
        {"name": name, "before": before.format(name), "after": after.format(name)} for name in ("x_0", "x_1")
    ]
    path.unlink()
    with pytest.raises(ValueError, match="without their other date: .*x_1"):
        find_pair_table(tmp_path)


def test_images_within_a_table(images, pairs, tmp_path):
    """As `datasets` writes them; they do not come back, their names do."""
    features = Features({"before": Image(), "after": Image(), "id": Value("int64")})
    rows = {"before": [pair[0] for pair in pairs], "after": [pair[1] for pair in pairs], "id": [1, 2]}
    Dataset.from_dict(rows, features).to_parquet(tmp_path / "pairs.parquet")
    table = find_pair_table(tmp_path / "pairs.parquet")
    check_images(table, pairs)
    assert table.named().to_pylist()[1]["id"] == 2
    assert table.named().schema.field("before").type == pa.string() and not table.named().schema.metadata


def test_addresses_and_empty_fields(tmp_path):
    write(tmp_path / "p.csv", [{"before": "https://example.org/a.png", "after": "b"}, {"before": "/a", "after": ""}])
    table = find_pair_table(tmp_path / "p.csv")
    table = pickle.loads(pickle.dumps(table))  # as it goes to processes that are spawned
    assert table[0] == ("https://example.org/a.png", tmp_path / "b")
    with pytest.raises(ValueError, match="after image: none is named"):
        table[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "left,right\na,b\n", "has the columns left, right; expected `before` and `after`"),
        ("p.csv", "before,after,before\na,b,c\n", "each name once"),
        ("p.csv", "before,after\na\n", "p.csv cannot be read: CSV parse error"),
        ("p.csv", "", "cannot be read: Empty CSV file"),
        ("p.csv", "before,after\n", "has no rows"),
        ("p.jsonl", '{"before": "a"\n', "p.jsonl cannot be read: Expecting"),
        ("p.jsonl", '["a", "b"]\n', "line 1 is no JSON object"),
        ("p.jsonl", '{"before": 1, "after": "b"}\n', "column `before`: expected paths, URLs .* got int64"),
        ("p.jsonl", '{"before": "a", "after": "b", "n": 1}\n{"before": "a", "after": "b", "n": "1"}\n', "cannot be"),
        ("p.parquet", "before,after\n", "p.parquet cannot be read"),
        ("p.xlsx", "", "is no table of pairs; expected a table"),
        ("d/x.png", "", "There are no pairs in .*d; expected a table"),
        ("d/A/notes", "", "There are no pairs in .*d; expected a table"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_table(name, content, message, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    if name == "d/A/notes":
        (tmp_path / "d" / "B").mkdir()
    with pytest.raises(ValueError, match=message):
        find_pair_table(tmp_path / "d" if name.startswith("d") else path)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone does not exist; expected a table"):
        find_pair_table(tmp_path / "gone")


def test_names_of_tasks():
    assert [len(questions_of(name)) for name in ("caption", "binary", "count", "grid", "dialogue")] == [1, 1, 1, 1, 3]
    assert questions_of("grid") == (INSTRUCTIONS["grid"],) and questions_of(" What? ") == ("What?",)
    with pytest.raises(ValueError, match="`open` has no fixed question"):
        questions_of("open")
    with pytest.raises(ValueError, match="A question is empty"):
        questions_of(" ")


def test_what_answers_mean():
    def said(task, answer):
        found = meaning_of(INSTRUCTIONS.get(task, task), answer)
        assert tuple(found) == meanings()
        return {name: value for name, value in found.items() if value is not None}

    assert set(meanings()) < set(columns_of().names)
    assert said("binary", "Yes.") == {"changed": True} and said("binary", "no") == {"changed": False}
    assert said("count", "no new roads, 2 new buildings") == {"roads": 0, "buildings": 2}
    assert said("grid", "roads: [] buildings: [top-left, center-center]") == {
        "road_cells": [],
        "building_cells": ["top-left", "center-center"],
    }
    for task in ("binary", "count", "grid", "caption", "Was something built?"):
        assert said(task, "a shed is built") == {}
