import json

import pytest
from broken_images import write_refused
from PIL import Image

from deltavlm_hf.data import build_dataset, check_data, find_pairs
from deltavlm_hf.data.check import PUBLISHED


def found(report, kind: str) -> list[tuple[str, str, str]]:
    return [(item.where, item.record, item.detail) for item in report.problems if item.kind == kind]


@pytest.fixture
def mine(changechat):
    """The same data under another name, which is not compared with the paper."""
    for path in (changechat / "annotations").iterdir():
        path.rename(path.with_name(path.name.replace("changechat_105k", "mine")))
    return changechat


def change(folder, name, function) -> None:
    path = folder / "annotations" / f"mine_{name}.json"
    items = json.loads(path.read_text())
    function(items)
    path.write_text(json.dumps(items))


def test_sound_data(mine):
    report = check_data(mine)
    assert report.problems == [] and report.notes == []
    each = {"caption": 20, "binary": 4, "count": 4, "grid": 4, "open": 4, "dialogue": 4}
    assert report.records == {"train": each, "train_loc": each, "test": dict.fromkeys(each, 3)}
    assert report.pairs["train"] == {"all": 4, "changed": 2, "unchanged": 2, "unknown": 0}
    assert report.table().endswith("No problems.")
    assert len(report.files) == 8


def test_the_papers_table_stands_beside(changechat):
    report = check_data(changechat)
    assert sum(PUBLISHED["train"].values()) == 87_935 and sum(PUBLISHED["test"].values()) == 17_172
    assert len(found(report, "count differs")) == 18  # six tasks, three splits
    assert ("train", "", "20 caption records, the paper has 34,075") in found(report, "count differs")
    table = report.table()
    assert "train      caption         20   34,075" in table
    assert "... and 15 more" in table
    assert "7,590 / val 1,438 / test 2,135" in table  # where the authors' README contradicts itself


def test_images(mine):
    images = mine / "images" / "train"
    (images / "A" / "train_000000.png").unlink()
    (images / "B" / "train_000001.png").write_bytes(b"no image")
    whole = (images / "B" / "train_000002.png").read_bytes()
    (images / "B" / "train_000002.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (31, 32)).save(images / "B" / "train_000003.png")
    report = check_data(mine)
    assert found(report, "missing image") == [("train/A/train_000000.png", "", "no such file")]
    assert [where for where, *_ in found(report, "unreadable image")] == [
        "train/B/train_000001.png",
        "train/B/train_000002.png",
    ]
    ((where, _, detail),) = found(report, "sizes differ")
    assert (where, detail) == ("train/A/train_000003.png", "32x32, and train/B/train_000003.png has 31x32")
    assert len(report.problems) == 4
    assert check_data(mine, look_at_images=False).problems == []


@pytest.mark.filterwarnings("ignore")
def test_images_of_every_fault_are_told(mine):
    names = write_refused(mine / "images" / "train" / "A")

    def add(items):
        for name in names:
            items.append({**items[0], "id": name, "image": [f"train/A/{name}", items[0]["image"][1]]})

    change(mine, "train", add)
    report = check_data(mine)
    assert found(report, "missing image") == [("train/A/refused_pipe.png", "", "no such file")]
    told = {where: detail for where, _, detail in found(report, "unreadable image")}
    assert sorted(told) == [f"train/A/{name}" for name in names[:-1]]
    assert all(detail.startswith("cannot read 'refused_") or "pipe" in detail for detail in told.values())


def answers(items: list, index: int, turn: int, text: str) -> None:
    items[index]["conversations"][2 * turn + 1]["value"] = text


def test_answers_that_do_not_parse(mine):
    change(mine, "test_binary", lambda items: answers(items, 0, 0, "maybe"))
    change(mine, "test_count", lambda items: answers(items, 1, 0, "a few"))
    change(mine, "test_loc", lambda items: answers(items, 2, 0, "in the middle"))
    change(mine, "test_open", lambda items: answers(items, 0, 0, " "))
    change(mine, "test_dialog", lambda items: answers(items, 1, 1, "several"))
    assert {(where, record, detail) for where, record, detail in found(check_data(mine), "unparsed answer")} == {
        ("mine_test_binary.json", "0", "binary: 'maybe'"),
        ("mine_test_count.json", "1", "count: 'a few'"),
        ("mine_test_loc.json", "2", "grid: 'in the middle'"),
        ("mine_test_open.json", "0", "open: ' '"),
        ("mine_test_dialog.json", "1", "count: 'several'"),
    }


def test_contradictions(mine):
    change(mine, "test_binary", lambda items: answers(items, 0, 0, "yes"))
    change(mine, "test_loc", lambda items: answers(items, 2, 0, "roads: [top-left] buildings: []"))
    change(mine, "test", lambda items: items[1].update(captions=["there is no difference"]))
    change(mine, "train", lambda items: items[0].update(changeflag=1))
    assert set(found(check_data(mine), "contradiction")) == {
        ("mine_test_binary.json", "0", "changeflag is 0, the answer is 'yes'"),
        ("mine_test_loc.json", "2", "changeflag is 0, the answer is 'roads: [top-left] buildings: []'"),
        ("mine_test.json", "test_000001", "changeflag is 1, the captions tell of none"),
        ("mine_train.json", "0", "records of its pair differ in changeflag"),
    }


def test_records(mine):
    change(mine, "train", lambda items: (items[3].pop("image"), items[5].update(id=4)))
    (mine / "annotations" / "mine_test_open.json").write_text('[{"id": 0')
    report = check_data(mine)
    ((where, record, detail),) = found(report, "malformed record")
    assert (where, record) == ("mine_train.json", "item 3") and "'image' must list" in detail
    assert found(report, "duplicate id") == [("mine_train.json", "4", "item 5 has an id that was used")]
    assert [where for where, *_ in found(report, "unreadable file")] == ["mine_test_open.json"]
    (mine / "annotations" / "mine_test_open.json").write_text("[]")
    assert found(check_data(mine), "unreadable file") == [("mine_test_open.json", "", "it holds no records")]


def test_the_report_is_json(mine):
    (mine / "images" / "train" / "A" / "train_000000.png").unlink()
    report = json.loads(json.dumps(check_data(mine).to_dict()))
    assert report["problems_by_kind"]["missing image"] == 1 == len(report["problems"])
    assert report["records"]["test"]["grid"] == 3


def test_what_rules_build_is_sound(changechat, tmp_path):
    pairs = find_pairs(changechat / "images", split="test")
    build_dataset(pairs, tmp_path / "built", split="test", paraphrase=0.5)
    assert check_data(tmp_path / "built", changechat / "images").problems == []
