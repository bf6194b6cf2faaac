"""Turns and flips of pairs against the scene's own truth: what is said of the turned pair must hold there."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from deltavlm_hf.data import load_generated
from deltavlm_hf.data.questions import INSTRUCTIONS, describe_in_detail, format_grid, parse_grid
from deltavlm_hf.data.rules import CELLS, Facts, Thresholds, read_facts
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.training import PairAugmentation
from deltavlm_hf.training.augmentation import names_direction, turn_image, turn_text

CELL_FLAGS = st.lists(st.booleans(), min_size=9, max_size=9).map(np.array)


@pytest.mark.parametrize("turn", range(8))
def test_turned_answers_are_those_of_the_turned_mask(turn):
    for seed in range(60):
        mask = generate_scene(seed).mask
        turned = np.asarray(turn_image(Image.fromarray(mask), turn))
        facts, expected = (read_facts(each, Thresholds.for_size(96)) for each in (mask, turned))
        assert turn_text(format_grid(facts), turn) == format_grid(expected)
        assert turn_text(describe_in_detail(facts), turn) == describe_in_detail(expected)


@given(CELL_FLAGS, CELL_FLAGS, st.integers(0, 7))
def test_turned_lists_stay_lists_in_order(roads, buildings, turn):
    facts = Facts((1, 1), (roads, buildings), (np.zeros(9, int),) * 2)
    found = parse_grid(turn_text(format_grid(facts), turn))
    assert format_grid(replace(facts, cells=found)) == turn_text(format_grid(facts), turn)
    assert [part.sum() for part in found] == [roads.sum(), buildings.sum()]


@given(st.text())
def test_other_texts_are_left_alone(text):
    if not any(cell in text for cell in CELLS):
        assert turn_text(text, 3) == text


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a road is built on the left", True),
        ("Some villas appear at the top of the scene.", True),
        ("buildings in the north-west", True),
        ("a road is built in the top-left, center-center", False),
        ("two buildings are built", False),
        (INSTRUCTIONS["grid"], False),
    ],
)
def test_directions(text, names):
    assert names_direction(text) is names


def test_both_dates_turn_alike_and_rows_with_directions_do_not():
    row = load_generated(1, 18, tasks=["grid"])[0]
    kept = {**row, "turns": [{"question": "What changed?", "answer": "a road on the left"}]}
    augmentation = PairAugmentation()
    turns = set()
    for seed in range(40):
        turned = augmentation(row, np.random.default_rng(seed))
        (turn,) = [
            turn
            for turn in range(8)
            if all(np.array_equal(turn_image(row[date], turn), turned[date]) for date in ("before", "after"))
        ]
        assert turned["turns"][0]["answer"] == turn_text(row["turns"][0]["answer"], turn)
        assert turned["turns"][0]["question"] == row["turns"][0]["question"]
        turns.add(turn)
        again = augmentation(kept, np.random.default_rng(seed))
        assert again["turns"] == kept["turns"] and np.array_equal(again["after"], row["after"])
    assert turns == set(range(8))


def test_crops_are_the_same_for_both_dates_and_for_no_task_that_counts_or_places():
    row = {**load_generated(1, 18, tasks=["binary"])[0]}
    row["after"] = row["before"]
    crop = PairAugmentation(turns=False, crop=0.2)
    for seed in range(5):
        cropped = crop(row, np.random.default_rng(seed))
        assert cropped["before"].size == row["before"].size
        assert np.array_equal(cropped["before"], cropped["after"])
        assert not np.array_equal(cropped["before"], row["before"])
        for task in ("count", "grid", "open", "dialogue"):
            assert np.array_equal(crop({**row, "task": task}, np.random.default_rng(seed))["before"], row["before"])
    with pytest.raises(ValueError, match="`crop` must be at least 0 and less than 0.5, got 0.5"):
        PairAugmentation(crop=0.5)


def test_masks_are_turned_and_cut_with_their_images():
    mask = next(mask for mask in (generate_scene(seed).mask for seed in range(99)) if len(np.unique(mask)) == 3)
    image = Image.fromarray(np.stack([mask] * 3, -1))
    row = {"task": "binary", "before": image, "after": image, "mask": Image.fromarray(mask), "turns": []}
    for crop in (0.0, 0.3):
        for seed in range(8):
            turned = PairAugmentation(crop=crop)(row, np.random.default_rng(seed))
            after, found = np.asarray(turned["after"])[..., 0], np.asarray(turned["mask"])
            assert set(np.unique(found)) <= {0, 128, 255}
            assert (after == found).mean() == 1 if crop == 0 else (abs(after.astype(int) - found) < 64).mean() > 0.97
            assert not (crop and (found == mask).all())
    assert PairAugmentation(crop=0.3)({**row, "mask": None}, np.random.default_rng(0))["mask"] is None
