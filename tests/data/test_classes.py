"""Classes of a data set's own: the worked examples of docs/data.md end to end, and what a file may not say."""

import itertools
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig
from deltavlm_hf.cli import main
from deltavlm_hf.data import find_classes, load_changechat, load_mask, make_turns, read_classes, read_facts
from deltavlm_hf.data.asked import meaning_of, questions_of
from deltavlm_hf.data.classes import NEW, REMOVED, ROADS_AND_BUILDINGS, STATED, ChangeClass, Classes, classes_of
from deltavlm_hf.data.masks import class_colours, read_mask, to_mask
from deltavlm_hf.data.questions import (
    captions_of,
    describe_in_detail,
    format_count,
    format_grid,
    parse_count,
    parse_grid,
    wording,
)
from deltavlm_hf.data.rules import Facts, Thresholds

DOCUMENT = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
SECTION = DOCUMENT.split("## Classes of your own")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL)
YAML, PYTHON, SHELL = ([text for kind, text in BLOCKS if kind == name] for name in ("yaml", "python", "sh"))
# Names that begin or end like others.
ALIKE = Classes(
    (
        ChangeClass("building", "buildings", 1),
        ChangeClass("building with damage", "buildings with damage", 2, how=STATED),
        ChangeClass("old building", "old buildings", 3, "red", how=REMOVED),
        ChangeClass("lorry", "lorries", 4),
    )
)


def make_facts(*counts: int, classes: Classes = ALIKE) -> Facts:
    cells = tuple(np.arange(9) % (number + 2) == 1 if number else np.zeros(9, bool) for number in counts)
    return Facts(counts, cells, (np.zeros(9, int),) * len(counts), classes)


@pytest.fixture(params=("damage", "land cover"))
def example(request, tmp_path, monkeypatch, capsys) -> str:
    """A worked example, with what it makes in the working folder and the commands run."""
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[request.param == "land cover"], {})
    if request.param == "damage":
        (tmp_path / "pairs" / "classes.yaml").write_text(YAML[1])
    for line in SHELL[0].splitlines():
        assert main(shlex.split(line, comments=True)[1:]) == 0, capsys.readouterr()
    return request.param


def test_worked_examples(example):
    classes = find_classes("pairs")
    assert classes == read_classes("pairs/classes.yaml") == read_classes("pairs/annotations/classes.yaml")
    assert len(classes) == (3 if example == "damage" else 6)
    rows = load_changechat("pairs", split="test", tasks=["count", "grid"], masks=True)
    for row in rows:
        facts = read_facts(read_mask(row, classes), classes=classes)
        answer = row["turns"][0]["answer"]
        if row["task"] == "count":
            assert row["turns"][0]["question"] == questions_of("count", classes)[0]
            assert parse_count(answer, classes) == facts.counts and row["changed"] == (sum(facts.counts) > 0)
        else:
            assert np.array_equal(parse_grid(answer, classes), facts.cells)
    report = json.loads(open("report/report.json").read())["systems"]
    for system in ("majority", "no-change"):
        for task in ("count", "grid"):
            assert set(classes.plurals) < set(report[system][task]) and report[system][task]["unreadable_truths"] == 0
            assert not any(report[system][task][plural]["unparsed"] for plural in classes.plurals)
    assert report["no-change"]["binary"]["accuracy"] == 0.25
    text = open("report/report.md").read()
    assert all(f"3x3 grid, {plural}" in text and f"{plural} mae" in text for plural in classes.plurals)
    assert "road" not in text
    assert main(["data", "show", "pairs", "--output", "sheet.html"]) == 0
    assert f"rgb{class_colours(classes.names, classes)[classes.names[0]]}" in open("sheet.html").read()


def test_a_trained_model_carries_its_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[0], {})
    (tmp_path / "pairs" / "classes.yaml").write_text(YAML[1])
    assert main(shlex.split(SHELL[0].splitlines()[0], comments=True)[1:]) == 0
    (tmp_path / "train.yaml").write_text(
        "model: tiny\ndata: {source: pairs, validation: null, tasks: [count]}\n"
        "training: {output_dir: trained, max_steps: 1, per_device_train_batch_size: 1, report_to: none}\n"
    )
    assert main(["train", "train.yaml"]) == 0
    classes = read_classes("pairs/classes.yaml")
    assert classes_of(DeltaVLMConfig.from_pretrained("trained")) == classes
    run = [
        "predict",
        "pairs/test",
        "--questions",
        "count",
        "--model",
        "trained",
        "--output",
        "out.jsonl",
        "--limit",
        "1",
    ]
    assert main(run) == 0
    (row,) = map(json.loads, open("out.jsonl"))
    assert (row["question"], row["task"]) == (*questions_of("count", classes), "count")
    assert {*classes.columns} < {*row} and "roads" not in row


def test_a_mask_against_its_answers_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[0], {})
    (tmp_path / "pairs" / "classes.yaml").write_text(YAML[1])
    assert main(shlex.split(SHELL[0].splitlines()[0], comments=True)[1:]) == 0
    mask = np.full((96, 96), 3, np.uint8)
    Image.fromarray(mask).save("pairs/train/label/0.png")
    path = tmp_path / "pairs" / "annotations" / "changechat_test_count.json"
    path.write_text(path.read_text().replace("destroyed building", "ruined building"))
    assert main(["data", "check", "pairs"]) == 1
    said = capsys.readouterr().out
    assert "caption against mask: 1" in said and "unparsed answer: 4" in said


def test_annotations_of_other_classes_stay(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(PYTHON[0], {})
    (tmp_path / "own.yaml").write_text(YAML[1])
    build = ["data", "build", "--images", "pairs", "--output", "annotations"]
    assert main([*build, "--classes", "own.yaml"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "annotations").iterdir()}
    (tmp_path / "pairs" / "classes.yaml").write_text(YAML[1].replace("#d00000", "#d00001"))
    assert main([*build, "--split", "test"]) != 0
    assert main([*build, "--overwrite"]) != 0
    assert "of other classes" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in (tmp_path / "annotations").iterdir()} == before


@pytest.mark.parametrize("counts", itertools.product((0, 1, 3), repeat=4))
def test_answers_parse_back(counts):
    facts = make_facts(*counts)
    assert parse_count(format_count(facts), ALIKE) == counts
    assert np.array_equal(parse_grid(format_grid(facts), ALIKE), facts.cells)
    for task in ("binary", "count", "grid"):
        ((question, answer),) = make_turns(task, facts, np.random.default_rng(0), paraphrase=1)
        found = meaning_of(question, answer, ALIKE)
        assert found["changed"] == (facts.changed if task == "binary" else None)
        assert found["old_buildings"] == (counts[2] if task == "count" else None)
        assert (found["lorry_cells"] is not None) == (task == "grid")


def test_answers_are_worded_by_how_objects_changed():
    facts = make_facts(2, 1, 1, 0)
    assert format_count(facts) == "2 new buildings, 1 building with damage, 1 removed old building, no new lorries"
    assert captions_of(facts)[0] == (
        "two buildings are built, a building with damage is seen and an old building is removed"
    )
    assert describe_in_detail(make_facts(0, 0, 3, 0)).startswith("three old buildings are removed in the top-center, ")
    words = wording(Classes((ALIKE.each[0], ALIKE.each[2], ALIKE.each[3])))
    assert words.instructions["count"] == (
        "Please determine how many buildings, old buildings and lorries have changed?"
    )
    assert (
        wording(ALIKE).follow_ups[0].startswith("If changes have occurred, count the buildings, buildings with damage")
    )
    questions = {make_turns("open", facts, np.random.default_rng(seed))[0] for seed in range(200)}
    assert ("How many removed old buildings are there?", "one") in questions
    assert ("Are there more new buildings than buildings with damage?", "yes") in questions


@pytest.mark.parametrize(
    "answer, counts",
    [
        ("no buildings, old buildings or lorries, 2 buildings with damage", (0, 2, 0, 0)),
        ("old buildings: 2, lorries: 1, buildings: three, buildings with damage: 0", (3, 0, 2, 1)),
        ("2 buildings with damage, no new lorries, 1 old building", None),
        ("one lorry", None),
    ],
)
def test_names_within_names(answer, counts):
    assert parse_count(answer, ALIKE) == counts


def test_roads_and_buildings_are_asked_about_as_in_changechat():
    words = wording(ROADS_AND_BUILDINGS)
    assert words.instructions["count"] == "Please determine how many roads and buildings have changed?"
    assert words.instructions["grid"].startswith(
        "Please indicate the locations where changes have occurred in the buildings and roads, using a 3x3 grid"
    )
    assert words.follow_ups[0] == "If changes have occurred, count the number of road and building changes separately."
    assert words.paraphrases["count"] == (
        "How many roads and buildings are new?",
        "Count the new roads and buildings.",
    )


def test_masks_have_the_values_of_classes(tmp_path):
    mask = np.array([[0, 1, 2], [3, 4, 9]], np.uint8)
    palette = Image.fromarray(mask)
    palette.putpalette(bytes(range(256)) * 3)
    classes = Classes(ALIKE.each, (9,))
    for image in (Image.fromarray(mask), palette):
        assert load_mask(image, classes=classes).tolist() == [[0, 1, 2], [3, 4, 0]]
    with pytest.raises(ValueError, match=r"has the values 9, which are no class's: expected 0 \(unchanged\) and 1"):
        load_mask(Image.fromarray(mask), classes=ALIKE)
    with pytest.raises(ValueError, match="Binary masks are taken for buildings"):
        load_mask(Image.fromarray(mask), binary=True, classes=ALIKE)
    single = Classes((ChangeClass("field", "fields", 7, how=REMOVED),))
    facts = read_facts(np.array([[0, 0, 7]] * 3, np.uint8), Thresholds(1, 1), single)
    assert format_count(facts) == "1 removed field"
    found = to_mask(np.array([[[0.9, 0.1]], [[0.2, 0.8]]]), ["lorry", "old building"], ALIKE)
    assert found.tolist() == [[4, 3]]
    assert class_colours(["old building", "road"], ALIKE) == {"old building": (255, 0, 0), "road": (255, 196, 0)}


def test_a_file_is_read_as_it_was_written():
    classes = Classes(ALIKE.each, (7, 9))
    assert Classes.from_dict(classes.to_dict()) == classes
    config = DeltaVLMConfig.from_dict(
        {**DeltaVLMConfig.from_pretrained(deltavlm_hf.tiny()).to_dict(), "change_classes": classes.to_dict()}
    )
    assert classes_of(config) == classes
    assert Classes.from_dict({"classes": [{"name": "mast", "mask": 3}]}).each == (
        ChangeClass("mast", "masts", 3, how=NEW),
    )


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "expected `classes: "),
        ("classes: []", "no classes"),
        ("classes: [building]", "A class is 'building'"),
        ("classes: [{name: building}]", "A class is"),
        ("classes: [{name: Building, mask: 1}]", "'Building' is no name of a class"),
        ("classes: [{name: 'a [b]', mask: 1}]", "no name of a class"),
        ("classes: [{name: b, mask: 300}]", "`mask` of the class b is 300"),
        ("classes: [{name: b, mask: true}]", "`mask` of the class b is True"),
        ("classes: [{name: b, mask: 1, color: red}]", "Unknown of the class 'b': color"),
        ("classes: [{name: b, mask: 1, colour: reddish}]", "`colour` of the class b is 'reddish'"),
        ("classes: [{name: b, mask: 1, removed: true, new: true}]", "not both true"),
        ("classes: [{name: b, mask: 1}, {name: c, mask: 1}]", "stands for several things: 1"),
        ("classes: [{name: b, mask: 1}, {name: b, mask: 2}]", "Two classes have the same name: b, bs"),
        ("classes: [{name: a b, mask: 1}, {name: a-b, mask: 2}]", "the same column of results: a_b_cells, a_bs"),
        ("classes: [{name: b, mask: 1, plural: samples}]", "cannot be called samples"),
        ("classes: [{name: b, mask: 1}]\nunchanged: [1]", "stands for several things: 1"),
        ("classes: [{name: b, mask: 1}]\nunchanged: 3", "`unchanged` is 3"),
        ("classes: [{name: b", "classes.yaml: "),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, said):
    (tmp_path / "classes.yaml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_classes(tmp_path / "classes.yaml")
    assert said in str(error.value) and "classes.yaml: " in str(error.value)
