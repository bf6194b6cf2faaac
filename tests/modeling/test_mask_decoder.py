"""Masks: `segment`, their losses, and what they tell the language model."""

import pytest
import torch
from backbones import backbone
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel

CLASSES = ["road", "building", "water"]
VIT = {"mask_classes": CLASSES, "mask_hidden_size": 32, "difference_dropout": 0.0}
STAGES = {
    "mask_classes": CLASSES,
    "mask_hidden_size": 32,
    "mask_skip_maps": 2,
    "neck_hidden_size": 24,
    "difference_dropout": 0.0,
}


@pytest.fixture
def make_model(small_config):
    def make(**kwargs) -> DeltaVLMForConditionalGeneration:
        torch.manual_seed(0)
        return DeltaVLMForConditionalGeneration(small_config(**kwargs)).eval()

    return make


@pytest.fixture(params=["vit", "stages", "evidence"])
def model(request, make_model) -> DeltaVLMForConditionalGeneration:
    if request.param == "vit":
        return make_model(**VIT)
    evidence = request.param == "evidence"
    return make_model(**STAGES, vision_config=backbone("efficientnet_lite"), mask_evidence=evidence)


@pytest.fixture
def squares():
    """Pairs in which a square is new, and where it is: its colour is its class."""
    pixels = torch.zeros(6, 2, 3, 32, 32)
    labels = torch.zeros(6, 3, 32, 32)
    for number in range(6):
        row, kind = divmod(number, 3)
        place = (slice(16 * row, 16 * row + 16), slice(8 * kind, 8 * kind + 16))
        pixels[number, 1, kind, *place] = 2.0
        labels[number, kind, *place] = 1.0
    return pixels, labels


def test_probabilities_of_every_class_at_the_images_size(model, small_inputs):
    probabilities = model.segment(**small_inputs)
    assert probabilities.shape == (2, 3, 32, 32) and probabilities.dtype == torch.float32
    assert (probabilities > 0).all() and (probabilities < 1).all() and probabilities.std() > 0
    torch.testing.assert_close(probabilities[1:], model.segment(pixel_values=small_inputs["pixel_values"][1:]))


def test_finer_where_the_decoder_reads_finer_maps(make_model, small_inputs):
    """What the last convolution gives, before it is enlarged: 4x4 tokens, or the 16x16 of the backbone's first map."""
    coarse = make_model(**{**STAGES, "mask_skip_maps": 0}, neck_stride=8, vision_config=backbone("efficientnet_lite"))
    fine = make_model(**STAGES, neck_stride=8, vision_config=backbone("efficientnet_lite"))
    labels = torch.zeros(2, 3, 32, 32)
    sizes = [
        model(pixel_values=small_inputs["pixel_values"], mask_labels=labels).mask_logits.shape[-2:]
        for model in (coarse, fine)
    ]
    assert sizes == [(4, 4), (16, 16)]


def test_masks_are_learnt_and_kept(model, squares, tmp_path):
    pixels, labels = squares
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(40):
        loss = model(pixel_values=pixels, mask_labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    found, truth = model.segment(pixel_values=pixels) > 0.5, labels > 0.5
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.5
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.config.mask_classes == CLASSES
    assert torch.equal(loaded.segment(pixel_values=pixels), model.segment(pixel_values=pixels))
    without_words = DeltaVLMModel.from_pretrained(tmp_path)
    assert torch.equal(without_words.segment(pixel_values=pixels), model.segment(pixel_values=pixels))


def test_loss_by_hand(model, squares):
    """Cross-entropy of known pixels, and Dice by class over the batch."""
    pixels, labels = squares
    labels[0] = -100  # nothing is known of the first pair
    outputs = model(pixel_values=pixels, mask_labels=labels)
    probabilities = model.segment(pixel_values=pixels)[1:]
    entropy = F.binary_cross_entropy(probabilities, labels[1:])
    common = (probabilities * labels[1:]).sum((0, 2, 3))
    dice = (2 * common + 1) / (probabilities.sum((0, 2, 3)) + labels[1:].sum((0, 2, 3)) + 1)
    torch.testing.assert_close(outputs.loss, entropy + (1 - dice).mean(), rtol=1e-4, atol=1e-5)


def test_beside_text_losses_add_up(model, small_inputs):
    labels = torch.where(small_inputs["input_ids"] < 60, small_inputs["input_ids"], -100)
    masks = (torch.rand(2, 3, 32, 32) > 0.8).float()
    both = model(**small_inputs, labels=labels, mask_labels=masks)
    text = model(**small_inputs, labels=labels)
    alone = model(pixel_values=small_inputs["pixel_values"], mask_labels=masks)
    torch.testing.assert_close(both.loss, text.loss + alone.loss)
    torch.testing.assert_close(both.logits, text.logits)
    assert text.mask_logits is None and alone.logits is None


def test_centres_are_for_evidence(model, squares):
    pixels, labels = squares
    centres = torch.zeros_like(labels)
    centres[:, :, 8, 8] = 1.0
    if not model.config.mask_evidence:
        with pytest.raises(ValueError, match="`centre_labels` are for models with `mask_evidence`"):
            model(pixel_values=pixels, mask_labels=labels, centre_labels=centres)
        return
    with_centres = model(pixel_values=pixels, mask_labels=labels, centre_labels=centres)
    assert with_centres.loss > model(pixel_values=pixels, mask_labels=labels).loss
    assert with_centres.mask_logits.shape[1] == 2 * len(CLASSES)


def test_evidence_is_in_the_pair_features(make_model, small_inputs):
    model = make_model(**STAGES, vision_config=backbone("efficientnet_lite"), mask_evidence=True)
    pixels = small_inputs["pixel_values"]
    pair_features = model.encode_pair(pixels)
    with torch.no_grad():
        model.mask_decoder.classify.bias[0] += 9.0  # now there are roads everywhere
    assert ((model.encode_pair(pixels) - pair_features).abs().amax(-1) > 0).all()
    with torch.no_grad():
        model.mask_decoder.embed.weight.zero_()
    none = model.encode_pair(pixels)
    with torch.no_grad():
        model.mask_decoder.classify.bias[0] -= 9.0
    assert torch.equal(model.encode_pair(pixels), none)


def test_images_of_another_size(model):
    pixels = torch.randn(1, 2, 3, 64, 32)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        model.segment(pixel_values=pixels)
    if model.config.has_backbone:
        assert model.segment(pixel_values=pixels, interpolate_pos_encoding=True).shape == (1, 3, 64, 32)


def test_from_pair_features_alone(make_model, small_inputs):
    pixels = small_inputs["pixel_values"]
    model = make_model(**VIT)
    pair_features = model.encode_pair(pixels)
    assert torch.equal(model.segment(pair_features=pair_features), model.segment(pixel_values=pixels))
    model = make_model(**STAGES, vision_config=backbone("efficientnet_lite"))
    with pytest.raises(ValueError, match="more than pair features: give the images"):
        model.segment(pair_features=model.encode_pair(pixels))


def test_errors(make_model, small_inputs):
    pixels, plain = small_inputs["pixel_values"], make_model()
    with pytest.raises(ValueError, match="makes no masks: `config.mask_classes` names no class"):
        plain.segment(pixel_values=pixels)
    with pytest.raises(ValueError, match="this model makes no masks"):
        plain(pixel_values=pixels, mask_labels=torch.zeros(2, 1, 32, 32))
    model = make_model(**VIT)
    with pytest.raises(ValueError, match="one of them"):
        model.segment()
    with pytest.raises(ValueError, match="need the images"):
        model(mask_labels=torch.zeros(2, 3, 32, 32))
    for shape in ((2, 32, 32), (2, 2, 32, 32), (1, 3, 32, 32)):
        with pytest.raises(ValueError, match=r"expected \(2, 3, height, width\)"):
            model(pixel_values=pixels, mask_labels=torch.zeros(shape))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_classes": []}, "expected 1 to 1000"),
        ({"mask_classes": ["a", "a"]}, "expected different names"),
        ({"mask_classes": [3]}, "expected different names"),
        ({"mask_evidence": True}, "need `mask_classes`: without"),
        ({"mask_classes": ["a"], "mask_skip_maps": 1}, "this vision encoder has 0 feature maps"),
        ({"mask_classes": ["a"], "mask_hidden_size": 0}, "`mask_hidden_size` is 0"),
        (
            {"mask_classes": ["a"], "mask_hidden_size": 4, "mask_skip_maps": 3, "vision_config": "stages"},
            "too few to be halved for 3 maps",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    if settings.get("vision_config"):
        settings = {**settings, "vision_config": backbone("efficientnet_lite")}
    with pytest.raises(ValueError, match=message):
        DeltaVLMConfig(**settings)


def test_plain_trainer_takes_masks_beside_text(model, small_inputs, squares, tmp_path):
    """Of some rows only: `Trainer` asks for no label that is not there."""
    pixels, masks = squares
    ids = small_inputs["input_ids"][1]
    row = {name: small_inputs[name][1] for name in ("input_ids", "attention_mask", "qformer_input_ids")}
    rows = [
        {**row, "labels": ids.clamp(max=60), "pixel_values": pixels[number], "mask_labels": masks[number]}
        for number in range(4)
    ]
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to="none", remove_unused_columns=False, save_strategy="no"
    )
    before = model.mask_decoder.classify.weight.clone()
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert not torch.equal(model.mask_decoder.classify.weight, before)
    with_masks = trainer.evaluate()["eval_loss"]
    trainer.eval_dataset = [{name: value for name, value in row.items() if name != "mask_labels"} for row in rows]
    assert 0 < trainer.evaluate()["eval_loss"] < with_masks
