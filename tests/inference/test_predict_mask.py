"""Masks of whole images, whatever their size."""

import numpy as np
import pytest
import torch
from PIL import Image

from deltavlm_hf import predict_mask
from deltavlm_hf.data.rules import load_mask
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference.masks import write_mask


def decided(model, probabilities: dict[int, float]) -> None:
    """The model then says of each class, of every pixel, no more than this probability."""
    for weight in model.mask_decoder.classify.parameters():
        torch.nn.init.zeros_(weight)
    for number, probability in probabilities.items():
        model.mask_decoder.classify.bias.data[number] = torch.tensor(probability).logit()


@pytest.mark.parametrize("backbone", [True, False])
def test_masks_have_the_size_of_the_second_date(make_mask_model, backbone, tmp_path):
    model, processor = make_mask_model(backbone)
    scene = generate_scene(7)
    before, after = Image.fromarray(scene.before), Image.fromarray(scene.after).resize((120, 80))
    before.save(tmp_path / "before.png")
    mask = predict_mask(model, processor, before, after)
    assert mask.shape == (80, 120) and mask.dtype == np.uint8
    assert (predict_mask(model, processor, str(tmp_path / "before.png"), np.asarray(after)) == mask).all()
    assert predict_mask(model, processor, before, after, size=(33, 50)).shape == (33, 50)
    # what `segment` says, pixel by pixel, where images have the model's own size
    small = [image.resize(2 * (model.config.image_size,)) for image in (before, after)]
    road, building = model.segment(**processor(images=[small], return_tensors="pt"))[0].numpy()
    expected = np.where(np.maximum(road, building) <= 0.5, 0, np.where(road >= building, 128, 255))
    assert (predict_mask(model, processor, *small) == expected).all() and len(np.unique(expected)) > 1


def test_the_likeliest_class_counts_if_it_is_above_one_half(make_mask_model):
    model, processor = make_mask_model(mask_skip_maps=0, mask_evidence=False)
    pair = [np.zeros((40, 40, 3), np.uint8)] * 2
    for probabilities, value in (({0: 0.6, 1: 0.7}, 255), ({0: 0.6, 1: 0.4}, 128), ({0: 0.5, 1: 0.4}, 0)):
        decided(model, probabilities)
        assert (predict_mask(model, processor, *pair) == value).all()
    model, processor = make_mask_model(mask_classes=["water", "trees"], mask_evidence=False)
    decided(model, {1: 0.9})
    assert (predict_mask(model, processor, *pair) == 2).all()


def test_written_masks_are_read_as_masks(tmp_path):
    mask = generate_scene(7).mask
    write_mask(tmp_path / "new" / "mask.png", mask)
    with Image.open(tmp_path / "new" / "mask.png") as image:
        assert image.mode == "L" and image.format == "PNG"
    assert (load_mask(tmp_path / "new" / "mask.png") == mask).all()


def test_a_model_without_masks(tiny_model, tiny_processor):
    scene = generate_scene(7)
    with pytest.raises(ValueError, match="This model makes no masks: .* Choose one that was made and trained with"):
        predict_mask(tiny_model, tiny_processor, scene.before, scene.after)
