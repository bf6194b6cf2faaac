"""Masks beside answers in a training batch."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from deltavlm_hf.data import PairCollator, load_changechat, load_generated, undecoded
from deltavlm_hf.data.masks import read_mask

SEED = 4_700_000
CLASSES = ["road", "building"]


@pytest.fixture(scope="module")
def rows():
    return load_generated(6, SEED, tasks=["count"], masks=True)


@pytest.mark.parametrize("backbone", [True, False])
def test_masks_at_the_models_size_teach(make_mask_model, rows, backbone):
    model, processor = make_mask_model(backbone)
    collate = PairCollator(processor, mask_classes=model.config.mask_classes, centres=model.config.mask_evidence)
    batch = collate([rows[index] for index in range(6)])
    size = model.config.image_size
    assert batch["mask_labels"].shape == (6, 2, size, size) and batch["mask_labels"].dtype == torch.float32
    for row, maps in zip(rows, batch["mask_labels"], strict=True):
        mask = read_mask(row)
        small = mask[np.ix_(*2 * [((np.arange(size) + 0.5) * 96 / size).astype(int)])]  # nearest
        assert (maps.numpy() == np.stack([small == 128, small == 255])).all()
    assert ("centre_labels" in batch) == backbone
    if backbone:  # one at the centre of each object, so at least one where there are any
        found = (batch["centre_labels"] == 1).sum((2, 3))
        assert ((found > 0) == (batch["mask_labels"] == 1).any(-1).any(-1)).all()
    with_masks = model(**batch).loss
    alone = model(**{name: value for name, value in batch.items() if name not in ("mask_labels", "centre_labels")})
    assert with_masks > alone.loss
    with_masks.backward()
    assert model.mask_decoder.classify.weight.grad.any()


def test_rows_decoded_or_not_are_the_same_and_rows_without_a_mask_are_unknown(make_mask_model, rows):
    _, processor = make_mask_model()
    collate = PairCollator(processor, mask_classes=CLASSES, centres=True)
    batch = collate([rows[0], {**rows[1], "mask": None}])
    raw = undecoded(rows)
    other = collate([raw[0], raw[1]])
    for name in ("mask_labels", "centre_labels"):
        assert torch.equal(batch[name][0], other[name][0])
        assert (batch[name][1] == -100).all() and not (other[name][1] == -100).any()


def test_masks_beside_the_images_of_levir(changechat, make_mask_model, tmp_path):
    folder = changechat / "images" / "train" / "label"
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    for path in folder.iterdir():
        path.unlink()
    mask.save(folder / "train_000001.png")
    rows = load_changechat(changechat, split="train", tasks=["binary"], masks=True, cache_dir=tmp_path / "cache")
    batch = PairCollator(make_mask_model()[1], mask_classes=CLASSES)(list(rows))
    for row, maps in zip(rows, batch["mask_labels"], strict=True):
        if row["mask"] is None:
            assert (maps == -100).all()
        else:
            assert maps[1, :, :32].all() and not maps[1, :, 32:].any() and not maps[0].any()
    assert sum(row["mask"] is not None for row in rows) == 1


def test_without_classes_there_are_no_masks(make_mask_model, rows):
    assert "mask_labels" not in PairCollator(make_mask_model()[1])([rows[0]])


def test_what_cannot_be_learnt_is_refused(make_mask_model, rows, tmp_path):
    _, processor = make_mask_model()
    collate = PairCollator(processor, mask_classes=CLASSES)
    with pytest.raises(ValueError, match="'scene_4700000-count' has no column `mask`"):
        collate([{name: value for name, value in rows[0].items() if name != "mask"}])
    with pytest.raises(ValueError, match="its mask has 48x48 pixels, its images 96x96"):
        collate([{**rows[0], "mask": Image.new("L", (48, 48))}])
    with pytest.raises(
        ValueError, match=re.escape("Masks have the classes road, building, but the model's are trees")
    ):
        PairCollator(processor, mask_classes=["trees"])
    with pytest.raises(ValueError, match="Masks are learnt from pixels, in whose place `vision_cache` gives states"):
        PairCollator(processor, vision_cache=lambda rows: torch.zeros(1), mask_classes=CLASSES)
