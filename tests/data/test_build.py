import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from broken_images import REFUSED
from paths import SHARED
from PIL import Image

from deltavlm_hf.data import Thresholds, build_dataset, find_pairs, load_changechat, read_records
from deltavlm_hf.data.questions import INSTRUCTIONS, NO_CHANGE, PARAPHRASES


@pytest.fixture
def levir(tmp_path) -> Path:
    """Two pairs as LEVIR-MCI has them, and their captions: a.png gained a building and a road, b.png nothing."""
    root = tmp_path / "levir"
    for part in ("A", "B", "label"):
        (root / "train" / part).mkdir(parents=True)
        for name in ("a.png", "b.png"):
            Image.new("L" if part == "label" else "RGB", (60, 60)).save(root / "train" / part / name)
    mask = np.zeros((60, 60), np.uint8)
    mask[2:12, 2:12] = 255
    mask[50:54] = 128
    Image.fromarray(mask).save(root / "train" / "label" / "a.png")
    captions = {"b.png": list(NO_CHANGE), "a.png": ["a house and a road are built", "a house appears"]}
    (root / "captions.json").write_text(json.dumps(captions))
    return root


def built(folder: Path, name: str = "changechat_train.json"):
    return list(read_records(folder / name))


@pytest.mark.parametrize("split, pairs, unchanged", [("train", 6815, 3408), ("val", 1333, 666)])
@pytest.mark.skipif(not SHARED.is_dir(), reason="the real captions are not beside the repository")
def test_real_captions(tmp_path, split, pairs, unchanged):
    found = find_pairs(tmp_path, SHARED / "captions" / f"{split}.json", split=split)
    summary = build_dataset(found, tmp_path, split=split)
    assert summary.pairs == summary.without_mask == pairs
    assert (summary.unchanged, summary.changed) == (unchanged, pairs - unchanged)
    if split == "train":
        records = built(tmp_path)
        assert summary.records == {"caption": 34_075, "binary": 6_815}  # as the paper's table has them
    else:
        captions, binary = built(tmp_path, "changechat_val.json"), built(tmp_path, "changechat_val_binary.json")
        assert all(len(record.captions) == 5 for record in captions)
        records = captions + binary
    assert Counter(record.task for record in records) == summary.records
    assert len({record.id for record in records}) == len(records)
    answers = Counter(record.turns[0][1] for record in records if record.task == "binary")
    assert answers == {"yes": pairs - unchanged, "no": unchanged}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real imagery is not beside the repository")
def test_real_masks_become_answers(tmp_path):
    images = SHARED / "real" / "levir_mci"
    build_dataset(find_pairs(images, images / "captions.json"), tmp_path)
    answers = {(row["id"]): row["turns"][-1]["answer"] for row in load_changechat(tmp_path, images, split="train")}
    assert answers["train_005650-count"] == "1 new road, 13 new buildings"
    assert answers["train_005218-grid"] == (
        "roads: [center-right, bottom-left, bottom-center, bottom-right] buildings: []"
    )
    assert answers["train_000518-count"] == "no new roads, no new buildings"
    assert answers["train_000518-binary"] == "yes"  # a lake: captions know more than masks
    assert answers["train_000518-dialogue"].startswith("a lake has formed")


def test_every_task(levir, tmp_path):
    pairs = find_pairs(levir, levir / "captions.json")
    assert [(pair.name, pair.before, pair.after) for pair in pairs] == [
        ("a", "train/A/a.png", "train/B/a.png"),
        ("b", "train/A/b.png", "train/B/b.png"),
    ]
    summary = build_dataset(pairs, tmp_path, name="mine", thresholds=Thresholds(20, 20))
    assert summary.records == {"caption": 7, "binary": 2, "count": 2, "grid": 2, "dialogue": 2}
    assert summary.contradictions == [] and summary.without_mask == 0
    answers = {record.id: [answer for _, answer in record.turns] for record in built(tmp_path, "mine_train.json")}
    assert answers["a-caption-1"] == ["a house appears"]
    assert answers["a-count"] == ["1 new road, 1 new building"]
    assert answers["a-grid"] == ["roads: [bottom-left, bottom-center, bottom-right] buildings: [top-left]"]
    assert answers["a-dialogue"] == ["yes", "1 new road, 1 new building", "a house and a road are built"]
    assert answers["b-dialogue"][:2] == ["no", "no new roads, no new buildings"]


def test_what_is_built_is_loaded(levir, tmp_path):
    build_dataset(find_pairs(levir, levir / "captions.json"), tmp_path / "annotations")
    rows = load_changechat(tmp_path, levir, split="train", masks=True)
    records = built(tmp_path / "annotations")
    assert [(row["id"], row["task"], row["changed"]) for row in rows] == [
        (record.id, record.task, record.changed) for record in records
    ]
    assert [[tuple(turn.values()) for turn in row["turns"]] for row in rows] == [list(r.turns) for r in records]
    assert rows[0]["mask"].getextrema() == (0, 255)


def test_files_of_a_test_split(levir, tmp_path):
    (levir / "train").rename(levir / "test")
    summary = build_dataset(find_pairs(levir, levir / "captions.json", split="test"), tmp_path, split="test")
    assert sorted(Path(file).name for file in summary.files) == [
        "changechat_test.json",
        "changechat_test_binary.json",
        "changechat_test_count.json",
        "changechat_test_dialog.json",
        "changechat_test_loc.json",
    ]
    rows = load_changechat(tmp_path, levir, split="test")
    assert Counter(rows["task"]) == {"caption": 2, "binary": 2, "count": 2, "grid": 2, "dialogue": 2}


def test_same_seed_same_bytes(levir, tmp_path):
    pairs = find_pairs(levir, levir / "captions.json")
    contents = []
    for folder, seed in (("one", 1), ("same", 1), ("other", 2)):
        build_dataset(pairs, tmp_path / folder, seed=seed, paraphrase=0.5)
        contents.append((tmp_path / folder / "changechat_train.json").read_bytes())
    assert contents[0] == contents[1] != contents[2]
    build_dataset(pairs[1:], tmp_path / "fewer", seed=1, paraphrase=0.5)
    alone = built(tmp_path / "fewer")
    assert alone == [record for record in built(tmp_path / "one") if record.id.startswith("b-")]


def test_paraphrases(levir, tmp_path):
    build_dataset(find_pairs(levir, levir / "captions.json"), tmp_path, paraphrase=1.0)
    for record in built(tmp_path):
        if record.task in INSTRUCTIONS:
            assert record.turns[0][0] in PARAPHRASES[record.task]


def test_binary_masks_without_captions_right_in_the_folder(tmp_path):
    for part, ending in (("A", "tif"), ("B", "tif"), ("label", "png")):
        (tmp_path / part).mkdir()
        Image.fromarray(np.pad(np.full((9, 9), 130, np.uint8), 30)).save(tmp_path / part / f"x.{ending}")
    pairs = find_pairs(tmp_path)
    assert [(pair.before, pair.after) for pair in pairs] == [("A/x.tif", "B/x.tif")]
    summary = build_dataset(pairs, tmp_path / "out", binary_masks=True)
    assert summary.records == {"binary": 1, "count": 1, "grid": 1, "dialogue": 1}
    answers = {record.task: record.turns[-1][1] for record in built(tmp_path / "out")}
    assert answers == {
        "binary": "yes",
        "count": "no new roads, 1 new building",
        "grid": "roads: [] buildings: [center-center]",
        "dialogue": "a building is built in the center-center",
    }


def test_contradictions_are_told(levir, tmp_path):
    captions = {name: list(NO_CHANGE) for name in ("a.png", "b.png")}
    (levir / "captions.json").write_text(json.dumps(captions))
    summary = build_dataset(find_pairs(levir, levir / "captions.json"), tmp_path)
    assert summary.contradictions == ["a"] and summary.unchanged == 2


def test_files_of_an_earlier_build_do_not_stay(levir, tmp_path):
    (levir / "train").rename(levir / "val")
    build_dataset(find_pairs(levir, levir / "captions.json", split="val"), tmp_path, split="val")
    assert len(list(tmp_path.glob("*_val*.json"))) == 5
    shutil.rmtree(levir / "val" / "label")
    pairs = find_pairs(levir, levir / "captions.json", split="val")
    build_dataset(pairs, tmp_path, split="val", overwrite=True)
    assert sorted(path.name for path in tmp_path.glob("*_val*.json")) == [
        "changechat_val.json",
        "changechat_val_binary.json",
    ]
    with pytest.raises(ValueError, match="There is nothing to make records of count from"):
        build_dataset(pairs, tmp_path / "none", split="val", tasks=["count"])


def test_a_task_named_twice_is_built_once(levir, tmp_path):
    summary = build_dataset(find_pairs(levir), tmp_path, tasks=["binary", "binary"])
    assert summary.records == {"binary": 2}


def test_odd_files(levir):
    labels = levir / "train" / "label"
    (labels / ".DS_Store").write_text("x")
    (labels / "Thumbs.db").write_text("x")
    assert [pair.name for pair in find_pairs(levir)] == ["a", "b"]
    Image.new("L", (30, 60)).save(labels / "a.png")
    (labels / "b.png").write_text("no image")
    with pytest.raises(ValueError, match=r"a.png has 30x60, its image 60x60 pixels; .*b.png cannot be opened"):
        find_pairs(levir)
    Image.new("L", (60, 60)).save(labels / "a.tif")
    with pytest.raises(ValueError, match="has both a.png and a.tif"):
        find_pairs(levir)


@pytest.mark.parametrize("fault", ["bomb", "PostScript", "four bands of which 0 is white", "empty"])
def test_headers_are_looked_at_before_anything_is_built(levir, fault):
    data = REFUSED[fault]
    label = levir / "train" / "label" / "b.png"
    whole = label.read_bytes()
    label.write_bytes(data)
    with pytest.raises(
        ValueError, match=r"Masks do not fit: .*b.png cannot be opened: cannot read .*b.png' as an image"
    ):
        find_pairs(levir)
    label.write_bytes(whole)
    (levir / "train" / "A" / "b.png").write_bytes(data)  # which nothing is built from
    assert [pair.name for pair in find_pairs(levir)] == ["a", "b"]


@pytest.mark.parametrize("name", ["a/b.png", "../a.png", "a::b.png", "a\\b.png"])
def test_names_that_cannot_be_used(tmp_path, name):
    (tmp_path / "captions.json").write_text(json.dumps({name: ["a road is built"]}))
    with pytest.raises(ValueError, match="The file name .* cannot be used: "):
        find_pairs(tmp_path, tmp_path / "captions.json")


def test_names_without_ending_or_with_dots(levir, tmp_path):
    for part in ("A", "B"):
        (levir / "train" / part / "a.png").rename(levir / "train" / part / "tile_1.5.png")
    captions = {"tile_1.5": ["a road is built"], "tile_1.7.png": ["a road is built"]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    pairs = find_pairs(levir, tmp_path / "captions.json", masks=tmp_path)
    assert [pair.before for pair in pairs] == ["train/A/tile_1.5.png", "train/A/tile_1.7.png"]


def test_captions_in_levir_ccs_own_form(levir, tmp_path):
    images = [
        {"filename": f"{name}.png", "filepath": split, "sentences": [{"raw": f" {name} is built ."}], "changeflag": 1}
        for name, split in (("a", "train"), ("z", "test"))
    ]
    (tmp_path / "LevirCCcaptions.json").write_text(json.dumps({"images": images}))
    pairs = find_pairs(levir, tmp_path / "LevirCCcaptions.json", split="train")
    assert [(pair.name, pair.captions) for pair in pairs] == [("a", ("a is built .",)), ("b", ())]  # b has a mask
    with pytest.raises(ValueError, match="LEVIR-CC's captions with split 'val'"):
        find_pairs(levir, tmp_path / "LevirCCcaptions.json", split="val")


def test_nothing_is_lost(levir, tmp_path):
    pairs = find_pairs(levir, levir / "captions.json")
    build_dataset(pairs, tmp_path)
    content = (tmp_path / "changechat_train.json").read_bytes()
    with pytest.raises(FileExistsError, match="changechat_train.json exists; choose another name"):
        build_dataset(pairs, tmp_path, seed=1, paraphrase=1.0)
    (levir / "train" / "label" / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="Cannot read the mask .*b.png"):
        build_dataset(pairs, tmp_path, overwrite=True)
    assert (tmp_path / "changechat_train.json").read_bytes() == content
    assert [path.name for path in tmp_path.glob("*.json")] == ["changechat_train.json"]


def test_wrong_input(levir, tmp_path):
    pairs = find_pairs(levir, levir / "captions.json")
    with pytest.raises(ValueError, match="Unknown split 'dev', expected one of train, val, test"):
        build_dataset(pairs, tmp_path, split="dev")
    with pytest.raises(ValueError, match="Tasks that rules can build are caption, .*; got open"):
        build_dataset(pairs, tmp_path, tasks=["binary", "open"])
    with pytest.raises(ValueError, match="`paraphrase` must be between 0 and 1, got 2"):
        build_dataset(pairs, tmp_path, paraphrase=2)
    with pytest.raises(FileNotFoundError, match="The folder .*none does not exist"):
        find_pairs(levir / "none")
    with pytest.raises(ValueError, match="Nothing to build from: no captions were given, and there are no masks in"):
        find_pairs(tmp_path)
    with pytest.raises(ValueError, match="`seed` must be at least 0, got -1"):
        build_dataset(pairs, tmp_path, seed=-1)
    for content in ("[]", '{"a.png": []}', '{"a.png": [" "]}', '{"images": [{"filename": "a.png"}]}'):
        (tmp_path / "captions.json").write_text(content)
        with pytest.raises(ValueError, match=r"captions.json: expected \{.* or LEVIR-CC's captions"):
            find_pairs(levir, tmp_path / "captions.json")
    (tmp_path / "captions.json").write_text('{"a.png": ["x"], "a.tif": ["x"]}')
    with pytest.raises(ValueError, match="Two files are named a"):
        find_pairs(levir, tmp_path / "captions.json")
