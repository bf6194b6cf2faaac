"""Masks against true ones, against the answers that are asked for, and against the model's own words."""

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import concatenate_datasets

from deltavlm_hf import predict_mask
from deltavlm_hf.cli import main
from deltavlm_hf.data import PairCollator, Thresholds, load_generated, read_facts
from deltavlm_hf.data.masks import read_mask
from deltavlm_hf.data.questions import format_count, format_grid
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.evaluation import evaluate_predictions, make_tables
from deltavlm_hf.evaluation.masks import (
    SeenMasks,
    answers_of_masks,
    count_pixels,
    score_agreement,
    score_pixels,
    see_masks,
)
from deltavlm_hf.modeling.efficientnet_lite import EfficientNetLiteConfig

SEED = 4_700_000
CLASSES = ["road", "building"]


@pytest.fixture(scope="module")
def rows():
    return load_generated(8, SEED, masks=True)


@pytest.fixture(scope="module")
def texts(rows):
    return rows.remove_columns(["before", "after", "mask"])


@pytest.fixture(scope="module")
def perfect(texts) -> SeenMasks:
    """What a model sees whose masks are right."""
    masks = [generate_scene(SEED + number).mask for number in range(8)]
    facts = [read_facts(mask, Thresholds.for_size(96)) for mask in masks]
    confusions = np.stack([count_pixels(mask, mask, CLASSES) for mask in masks])
    return SeenMasks(
        CLASSES, {i: facts[i // 6] for i in range(48)}, confusions, rows=list(range(0, 48, 6)), unreadable=0
    )


def test_pixels_by_hand():
    truth = np.array([[0, 0, 0, 255], [128, 128, 255, 255]], np.uint8)
    found = np.array([[0, 128, 0, 255], [128, 0, 128, 255]], np.uint8)
    confusions = np.stack([count_pixels(found, truth, CLASSES), count_pixels(truth, truth, CLASSES)])
    assert confusions.sum(0).tolist() == [[5, 1, 0], [1, 3, 0], [0, 1, 5]]
    figures = score_pixels(confusions, CLASSES)
    road = {"precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "iou": 3 / 6, "pixels": 4}
    building = {"precision": 1.0, "recall": 5 / 6, "f1": 10 / 11, "iou": 5 / 6, "pixels": 6}
    assert figures["classes"] == {"road": pytest.approx(road), "building": pytest.approx(building)}
    assert figures["all"] == pytest.approx(
        {"precision": 8 / 10, "recall": 0.8, "f1": 0.8, "iou": 8 / 12, "pixels": 10}
    )
    assert figures["accuracy"] == pytest.approx(13 / 16)
    assert figures["miou"] == pytest.approx((5 / 7 + 3 / 6 + 5 / 6) / 3)
    assert figures["miou_of_classes"] == pytest.approx((3 / 6 + 5 / 6) / 2)


def test_a_class_that_the_data_never_mark():
    """As roads in LEVIR-CD: false alarms are counted, but means over classes are those of the others."""
    truth, found = np.zeros((2, 4), np.uint8), np.zeros((2, 4), np.uint8)
    truth[0], found[0], found[1, 0] = 255, 255, 128
    figures = score_pixels(count_pixels(found, truth, CLASSES)[None], CLASSES)
    road = {"precision": 0.0, "recall": None, "f1": 0.0, "iou": 0.0, "pixels": 0}
    assert figures["classes"]["road"] == road and figures["classes"]["building"]["f1"] == 1
    assert figures["miou_of_classes"] == 1 and figures["miou"] == pytest.approx((1 + 3 / 4) / 2)
    assert figures["accuracy"] == 7 / 8
    (table,) = (each for each in make_tables({"x": {"masks": figures}}) if each.title == "Masks, pixels of class road")
    assert table.notes == ["The data mark no pixel of this class: all that was found of it is a false alarm."]
    alone = score_pixels(count_pixels(truth, truth, ["road"])[None], ["road"])  # a model that knows no buildings
    assert alone["accuracy"] == 1 and alone["all"]["f1"] is None and alone["miou_of_classes"] is None


def test_intervals_are_over_pairs():
    """Two kinds of pairs: what is drawn lies between all of the one and all of the other."""
    truth = np.full((2, 4), 255, np.uint8)
    half = np.where(np.arange(4) < 2, truth, np.uint8(0))
    right, wrong = (count_pixels(found, truth, CLASSES) for found in (truth, half))
    figures = score_pixels(np.stack([right] * 20 + [wrong] * 20), CLASSES, intervals=True)
    low, high = figures["classes"]["building"]["intervals"]["iou"]
    assert figures["all"]["iou"] == 0.75 and 0.5 < low < 0.74 and 0.76 < high < 1
    assert figures["all"]["intervals"]["iou"] == (low, high) and "intervals" not in figures["classes"]["road"]
    alike = score_pixels(np.stack([wrong] * 40), CLASSES, intervals=True)
    assert alike["all"]["intervals"]["f1"] == pytest.approx((2 / 3, 2 / 3))


def test_right_masks_answer_right(texts, perfect):
    asked, predictions = answers_of_masks(texts, perfect)
    results, _ = evaluate_predictions(asked, predictions)
    assert set(results) == {"binary", "count", "grid"} and results["binary"]["accuracy"] == 1
    for kind in ("roads", "buildings"):
        assert results["count"][kind]["exact"] == results["grid"][kind]["f1"] == 1
    facts = {**perfect.facts, **dict.fromkeys(range(6), "OSError: x")}
    broken = replace(perfect, facts=facts, confusions=perfect.confusions[1:], rows=perfect.rows[1:], unreadable=1)
    results, _ = evaluate_predictions(*answers_of_masks(texts, broken))
    assert results["binary"]["failed"] == 1 and results["count"]["roads"]["exact"] == 7 / 8


def test_agreement_is_of_words_and_masks_not_of_either_and_truth(texts, perfect):
    words = [{"answers": [turn["answer"] for turn in row["turns"]]} for row in texts]
    found = score_agreement(texts, words, perfect)
    assert found["count"] == {"samples": 8, "roads": 1, "buildings": 1, "all": 1}
    assert found["grid"] == found["count"] and found["binary"] == {"samples": 8, "all": 1}
    facts = perfect.facts[0]
    number = {row["task"]: index for index, row in enumerate(texts.select(range(6)))}
    other = replace(facts, counts=(facts.roads, facts.buildings + 1), cells=(~facts.road_cells, facts.building_cells))
    words[number["count"]] = {"answers": [format_count(other)]}
    words[number["grid"]] = {"answers": [format_grid(other)]}
    words[number["binary"]] = {"error": "out of memory"}
    found = score_agreement(texts, words, perfect)
    assert found["count"] == {"samples": 8, "roads": 1, "buildings": 7 / 8, "all": 7 / 8}
    assert found["grid"] == {"samples": 8, "roads": 7 / 8, "buildings": 1, "all": 7 / 8}
    assert found["binary"]["all"] == 7 / 8
    perfect_facts = {**perfect.facts, **dict.fromkeys(number.values(), other)}  # wrong masks that agree
    found = score_agreement(texts, words, replace(perfect, facts=perfect_facts))
    assert found["count"]["all"] == found["grid"]["all"] == 1
    only = replace(perfect, classes=["road"])
    assert score_agreement(texts, words, only)["count"] == {"samples": 8, "roads": 1, "all": 1}
    captions = texts.filter(lambda task: task == "caption", input_columns="task")
    assert score_agreement(captions, words[:8], perfect) == {}


@pytest.mark.parametrize("backbone", [True, False])
def test_masks_are_seen_at_their_own_size(make_mask_model, rows, backbone):
    model, processor = make_mask_model(backbone)
    seen = see_masks(model, processor, rows)
    predicted = {i: predict_mask(model, processor, rows[i]["before"], rows[i]["after"]) for i in range(0, 48, 6)}
    expected = sum(count_pixels(mask, read_mask(rows[i]), CLASSES) for i, mask in predicted.items())
    assert (seen.confusions.sum(0) == expected).all() and (len(seen.confusions), seen.unreadable) == (8, 0)
    assert (seen.confusions.sum((1, 2)) == 96 * 96).all()
    for index, facts in seen.facts.items():
        read = read_facts(predicted[index - index % 6], Thresholds.for_size(96))
        assert format_count(facts) == format_count(read) and format_grid(facts) == format_grid(read)


def test_pairs_without_a_mask_and_broken_ones(make_mask_model, rows, caplog):
    model, processor = make_mask_model()
    broken = {"bytes": b"nothing", "path": None}

    def without(row: dict, index: int) -> dict:
        name = {0: "mask", 1: "mask", 2: "after"}.get(index // 6)
        return row if name is None else {**row, name: None if index < 6 else broken}

    changed = rows.map(without, with_indices=True)
    with caplog.at_level(logging.WARNING):
        seen = see_masks(model, processor, changed)
    assert (len(seen.confusions), seen.unreadable) == (5, 2)
    assert "its mask cannot be used" in caplog.text
    assert [isinstance(seen.facts[6 * pair], str) for pair in range(4)] == [False, False, True, False]


def test_models_without_masks_or_of_other_classes(make_mask_model, rows, tiny_model, tiny_processor):
    assert see_masks(tiny_model, tiny_processor, rows) is None
    assert see_masks(*make_mask_model(mask_classes=["trees"]), rows) is None


def test_masks_that_are_learnt_score(make_mask_model):
    """Four pairs, by heart."""
    seeds = [seed for seed in range(SEED, SEED + 40) if len(np.unique(generate_scene(seed).mask)) == 3][:4]
    rows = concatenate_datasets([load_generated(1, seed, tasks=["count"], masks=True) for seed in seeds])
    vision_config = EfficientNetLiteConfig(depth=1, image_size=64, out_indices=[0, 1], batch_norm_momentum=0.5)
    smaller = {"mask_hidden_size": 32, "mask_skip_maps": 1, "mask_evidence": False}
    model, processor = make_mask_model(vision_config=vision_config, **smaller)
    batch = PairCollator(processor, mask_classes=CLASSES)(list(rows))
    inputs = {name: batch[name] for name in ("pixel_values", "mask_labels")}
    optimizer = torch.optim.AdamW(model.parameters(), 2e-2)
    found = []
    for steps in (1, 79):
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        figures = score_pixels(see_masks(model.eval(), processor, rows).confusions, CLASSES)
        found.append(figures["classes"]["building"]["f1"])
    assert found[0] < 0.2 and found[1] > 0.5


@pytest.fixture(scope="module")
def report(mask_model_folder, tmp_path_factory) -> tuple[dict, str, str]:
    """As `deltavlm evaluate` writes it: JSON, Markdown, HTML."""
    folder = tmp_path_factory.mktemp("report")
    options = ["--pairs", "4", "--tasks", "binary", "count", "grid", "--max-new-tokens", "3"]
    for _ in range(2):  # the second takes its answers from the first
        assert main(["evaluate", str(mask_model_folder), *options, "--output", str(folder)]) == 0
    texts = [(folder / f"report.{ending}").read_text() for ending in ("json", "md", "html")]
    return json.loads(texts[0]), *texts[1:]


def test_the_report_has_words_and_masks_side_by_side(report, mask_model_folder):
    saved, markdown, page = report
    name = str(mask_model_folder)
    assert list(saved["systems"]) == [name, f"{name}, read off its masks"]
    own, read = saved["systems"].values()
    assert set(own) == {"binary", "count", "grid", "agreement", "masks"} and set(read) == {"binary", "count", "grid"}
    low, high = own["masks"]["all"]["intervals"]["f1"]
    assert 0 <= low <= own["masks"]["all"]["f1"] <= high <= 1 and "masks all f1" in markdown
    assert own["masks"]["samples"] == 4 and own["agreement"]["count"]["samples"] == 4
    for text in (markdown, page):
        for title in (
            "Masks, pixels of class road",
            "Masks, pixels of class building",
            "Masks, all classes",
            "Words and masks of one model agree",
        ):
            assert title in text
        assert "masks: 4 samples" in text and "do not compare with them" in text
    lines = markdown.splitlines()
    assert "| TinyCD | – | – | 91.05 | – | published, LEVIR-CD (arXiv 2207.13159) |" in lines
    counting = lines.index("### Counting")
    assert f"| {name}, read off its masks |" in "\n".join(lines[counting : counting + 8])


@pytest.mark.slow
def test_two_processes_see_what_one_does(report, mask_model_folder, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = [
        "--pairs",
        "4",
        "--tasks",
        "binary",
        "count",
        "grid",
        "--max-new-tokens",
        "3",
        "--output",
        str(tmp_path),
    ]
    command = [*launch, "-m", "deltavlm_hf", "evaluate", str(mask_model_folder), *options]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["systems"] == report[0]["systems"]


def test_without_masks_nothing_is_said_of_them(tmp_path, capsys):
    options = ["--pairs", "1", "--tasks", "binary", "--output", str(tmp_path), "--max-new-tokens", "2"]
    assert main(["evaluate", "tiny", *options]) == 0
    assert "mask" not in capsys.readouterr().out.lower() and "LEVIR-CD" not in (tmp_path / "report.html").read_text()
