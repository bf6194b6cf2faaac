"""Masks of rows, and one mask of what a model says of each class."""

import re

import numpy as np
import pytest
from PIL import Image

from deltavlm_hf.data import load_generated, undecoded
from deltavlm_hf.data.masks import class_maps, read_mask, to_mask
from deltavlm_hf.data.scenes import generate_scene

CLASSES = ["road", "building"]


@pytest.fixture(scope="module")
def rows():
    return load_generated(3, 4_700_000, tasks=["binary"], masks=True)


def test_masks_of_rows_are_the_scenes_own(rows):
    for number, (row, raw) in enumerate(zip(rows, undecoded(rows), strict=True)):
        truth = generate_scene(4_700_000 + number).mask
        assert (read_mask(row) == truth).all() and (read_mask(raw) == truth).all()
    assert read_mask({**rows[0], "mask": None}) is None


@pytest.mark.parametrize("decoded", [True, False])
def test_a_mask_of_another_size_than_its_images(rows, decoded):
    row = (rows if decoded else undecoded(rows))[0]
    row["mask"] = Image.new("L", (96, 48))
    with pytest.raises(ValueError, match="scene_4700000-binary.*its mask has 96x48 pixels, its images 96x96"):
        read_mask(row)


def test_masks_that_are_not_there_or_none(rows):
    with pytest.raises(ValueError, match=re.escape("has no column `mask`: load the data with `masks=True`")):
        read_mask({"id": "x", "before": rows[0]["before"], "after": rows[0]["after"]})
    for mask in ({"bytes": b"nothing", "path": None}, Image.new("RGB", (96, 96), "red")):
        with pytest.raises(ValueError, match="Row 'scene_4700000-binary': its mask cannot be used: "):
            read_mask({**rows[0], "mask": mask})


@pytest.mark.parametrize("classes", [["road", "building"], ["building", "road"], ["building"]])
def test_class_maps_and_back(rows, classes):
    mask = next(mask for mask in (generate_scene(seed).mask for seed in range(99)) if len(np.unique(mask)) == 3)
    expected = mask if "road" in classes else np.where(mask == 255, mask, 0)
    assert (to_mask(class_maps(mask, classes), classes) == expected).all()


def test_one_class_for_a_pixel_the_likeliest_if_likely_at_all():
    probabilities = np.array([[[0.6, 0.4, 0.9]], [[0.7, 0.5, 0.2]]], np.float32)
    assert to_mask(probabilities, CLASSES).tolist() == [[255, 0, 128]]
    assert to_mask(probabilities, ["water", "trees"]).tolist() == [[2, 0, 1]]
    assert to_mask(probabilities, CLASSES).dtype == np.uint8
    with pytest.raises(ValueError, match="A mask of 8 bits tells 255 classes apart, but the model has 256"):
        to_mask(np.zeros((256, 1, 1)), [str(number) for number in range(256)])
