import json
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import run_python
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

import deltavlm_hf
from deltavlm_hf.data import PairCollator, Record, load_changechat, load_generated
from deltavlm_hf.data.questions import TASKS
from deltavlm_hf.data.records import RecordError, read_records

TRAIN, TEST = 4, 3  # pairs in the fixture


def paths_only(dataset: datasets.Dataset) -> datasets.Dataset:
    for column in ("before", "after"):
        dataset = dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def to_record(row: dict, images: Path) -> Record:
    before, after = (Path(row[date]["path"]).relative_to(images).as_posix() for date in ("before", "after"))
    turns = tuple((turn["question"], turn["answer"]) for turn in row["turns"])
    return Record(row["id"], row["task"], before, after, turns, row["changed"], tuple(row["captions"]))


def test_all_eight_files(changechat):
    dataset = load_changechat(changechat)
    assert {split: len(rows) for split, rows in dataset.items()} == {
        "train": TRAIN * 10,
        "train_loc": TRAIN * 10,
        "test": TEST * 6,
    }
    for rows in dataset.values():
        assert set(rows["task"]) == set(TASKS)
    grids = [[row["turns"][0]["answer"] for row in dataset[split] if row["task"] == "grid"] for split in dataset]
    assert "roads: ['top-left'] buildings: []" in grids[0]
    assert "roads: [top-left] buildings: []" in grids[1]


def test_rows_hold_what_the_files_hold(changechat):
    rows = paths_only(load_changechat(changechat, split="train"))
    loaded = [to_record(row, changechat / "images") for row in rows]
    assert loaded == list(read_records(changechat / "annotations" / "changechat_105k_train.json"))
    references = load_changechat(changechat, split="test", tasks=["caption"])
    assert [len(row["captions"]) for row in references] == [5] * TEST


def test_images_are_decoded(changechat):
    row = load_changechat(changechat, split="test", tasks=["binary"], masks=True)[1]
    for column, part in (("before", "A"), ("after", "B"), ("mask", "label")):
        expected = Image.open(changechat / f"images/test/{part}/test_000001.png")
        assert np.array_equal(np.asarray(row[column]), np.asarray(expected))


def test_tasks_are_chosen(changechat):
    rows = load_changechat(changechat, tasks=["dialogue", "grid"])
    assert {split: len(part) for split, part in rows.items()} == {"train": 8, "train_loc": 8, "test": 6}
    assert set(rows["test"]["task"]) == {"grid", "dialogue"}


def test_dialogues_are_unrolled(changechat):
    whole = load_changechat(changechat, split="test", tasks=["dialogue"])
    parts = load_changechat(changechat, split="test", tasks=["dialogue"], unroll=True)
    assert len(parts) == 3 * len(whole)
    assert [len(row["turns"]) for row in parts] == [1, 2, 3] * TEST
    assert [row["turns"] for row in parts][2::3] == [row["turns"] for row in whole]
    assert len(set(parts["id"])) == len(parts)


def test_streaming_gives_the_same_rows_and_caches_nothing(changechat, tmp_path):
    streamed = load_changechat(changechat, streaming=True, cache_dir=tmp_path / "none")
    assert not list((tmp_path / "none").rglob("*.arrow"))
    cached = load_changechat(changechat)
    for split in cached:
        assert list(paths_only(streamed[split])) == list(paths_only(cached[split]))
    assert next(iter(streamed["train"]))["before"].size == (32, 32)


def test_a_file_that_changes_is_read_again(changechat, edit):
    assert len(load_changechat(changechat, split="train")) == TRAIN * 10
    edit("train", lambda items: items.pop())
    assert len(load_changechat(changechat, split="train")) == TRAIN * 10 - 1


def test_images_elsewhere_and_one_file(changechat, tmp_path):
    (changechat / "images").rename(tmp_path / "levir")
    file = changechat / "annotations" / "changechat_105k_test_count.json"
    assert load_changechat(file, tmp_path / "levir", split="test")["task"] == ["count"] * TEST
    with pytest.raises(FileNotFoundError, match="No images in or beside .*give as `images` the folder with A and B"):
        load_changechat(file)


def test_images_around_the_annotations(changechat):
    for path in (changechat / "images").iterdir():
        path.rename(changechat / path.name)
    (changechat / "images").rmdir()
    assert len(load_changechat(changechat, split="train")) == TRAIN * 10
    assert len(load_changechat(changechat / "annotations", split="train[:25%]")) == TRAIN * 10 // 4


def test_masks_are_found_by_name_and_when_they_come_later(changechat):
    labels = changechat / "images" / "test" / "label"
    labels.rename(changechat / "aside")
    assert load_changechat(changechat, split="test", masks=True)[0]["mask"] is None
    (changechat / "aside").rename(labels)
    mask = labels / "test_000000.png"
    Image.open(mask).save(mask.with_suffix(".tif"))
    mask.unlink()
    assert load_changechat(changechat, split="test", tasks=["grid"], masks=True)[0]["mask"].format == "TIFF"
    Image.new("L", (32, 32)).save(mask)
    with pytest.raises(ValueError, match="has both test_000000.png and test_000000.tif"):
        load_changechat(changechat, split="test", masks=True)


def test_no_records_of_a_task(changechat, edit):
    (changechat / "annotations" / "changechat_105k_test_open.json").unlink()
    assert set(load_changechat(changechat, tasks=["open"])) == {"train", "train_loc"}
    with pytest.raises(ValueError, match="No records of the tasks open in test"):
        load_changechat(changechat, split="test", tasks=["open"])


def test_from_the_hub(changechat, tmp_path, monkeypatch):
    """The Hub's cache as `huggingface_hub` lays it out; offline, this is where it looks."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "datasets--hlwu--changechat-105k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    (changechat / "annotations").rename(repository / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    rows = load_changechat("hlwu/changechat-105k", changechat / "images", split="test")
    assert len(rows) == TEST * 6
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a data set that can be fetched"):
        load_changechat("hlwu/no-such-data", changechat / "images")


def test_missing_images_are_said_at_once(changechat):
    (changechat / "images" / "train" / "B" / "train_000000.png").unlink()
    with pytest.raises(FileNotFoundError, match="train_000000.png, which changechat_105k_train.json starts with"):
        load_changechat(changechat, split="train")


def test_a_malformed_record_is_named(changechat, edit):
    edit("train", lambda items: items[7].pop("image"))
    with pytest.raises(RecordError, match=r"changechat_105k_train.json, item 7 \(id 7\): 'image' must list"):
        load_changechat(changechat, split="train")


def test_wrong_choices(changechat, tmp_path):
    with pytest.raises(ValueError, match=r"`tasks` must list some of caption, .*; got \['counting'\]"):
        load_changechat(changechat, tasks=["counting"])
    with pytest.raises(ValueError, match="got 'grid'"):
        load_changechat(changechat, tasks="grid")
    with pytest.raises(ValueError, match="No split 'val' in .*, which has train, train_loc, test"):
        load_changechat(changechat, split="val")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "captions.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="expected JSON files named like .*, found captions.json"):
        load_changechat(tmp_path / "empty", tmp_path)


def test_generated_scenes():
    rows = load_generated(5, seed=4_000_000, masks=True, size=64)
    assert rows["task"] == list(TASKS) * 5
    assert rows[0]["before"].size == rows[0]["mask"].size == (64, 64)
    streamed = list(load_generated(5, seed=4_000_000, masks=True, size=64, streaming=True))
    assert [row["turns"] for row in streamed] == [row["turns"] for row in rows]
    shifted = load_generated(4, seed=4_000_001, size=64)
    assert [row["turns"] for row in shifted] == [row["turns"] for row in rows][len(TASKS) :]
    assert set(rows.features) - {"mask"} == set(shifted.features)


def test_generated_answers_follow_from_the_mask():
    from deltavlm_hf.data.questions import parse_count, parse_yes_no
    from deltavlm_hf.data.rules import Thresholds, load_mask, read_facts

    for row in load_generated(20, seed=4_000_100, tasks=["binary", "count"], masks=True):
        facts = read_facts(load_mask(row["mask"]), Thresholds.for_size(96))
        answer = row["turns"][0]["answer"]
        if row["task"] == "binary":
            assert parse_yes_no(answer) == facts.changed == row["changed"]
        else:
            assert parse_count(answer) == (facts.roads, facts.buildings)


@pytest.mark.parametrize("wrong", [{"pairs": 0}, {"seed": -1}, {"size": 8}, {"paraphrase": 2}, {"tasks": []}])
def test_generated_scenes_with_wrong_arguments(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must"):
        load_generated(**wrong)


def test_collator(changechat):
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    rows = load_changechat(changechat, split="test", tasks=["dialogue"], unroll=True)
    batch = PairCollator(processor)([rows[2], rows[0]])
    expected = processor(
        images=[(rows[2]["before"], rows[2]["after"]), (rows[0]["before"], rows[0]["after"])],
        text=[rows[2]["turns"][2]["question"], rows[0]["turns"][0]["question"]],
        history=[[tuple(turn.values()) for turn in rows[2]["turns"][:2]], []],
        answers=[rows[2]["turns"][2]["answer"], rows[0]["turns"][0]["answer"]],
        padding=True,
        return_tensors="pt",
    )
    assert set(batch) == set(expected) and "labels" in batch
    for name, tensor in expected.items():
        assert torch.equal(batch[name], tensor), name


def test_trainer_eats_it(changechat, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    model.language_model.requires_grad_(False)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    dataset = load_changechat(changechat, unroll=True)
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=1,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        data_collator=PairCollator(processor),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(name.startswith("difference.") for name in moved)
    assert not any(name.startswith("language_model.") for name in moved)


MEASURE = """
import re, sys
from deltavlm_hf.data import load_changechat
rows = load_changechat(sys.argv[1], sys.argv[2], split="train", cache_dir=sys.argv[3])
# not ru_maxrss: that begins at what the parent had
print(len(rows), int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) // 1024)
"""


def test_memory_does_not_grow_with_records(changechat, tmp_path):
    items = json.loads((changechat / "annotations" / "changechat_105k_train.json").read_text())
    megabytes = []
    for number in (2_000, 20_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        many = [{**items[index % len(items)], "id": index} for index in range(number)]
        (folder / "many_train.json").write_text(json.dumps(many))
        places = folder, changechat / "images", tmp_path / "cache"
        count, peak = map(int, run_python(MEASURE, *places, HF_DATASETS_DISABLE_PROGRESS_BARS="1").split())
        assert count == number
        megabytes.append(peak)
    assert megabytes[1] < megabytes[0] + 25  # the file itself grows by 6 MB, as Python objects by far more


def test_columns_are_named_as_records_are(changechat):
    assert set(load_changechat(changechat, split="train").features) == {field.name for field in fields(Record)}
