"""Backbones of Transformers in the place of InstructBLIP's ViT."""

import pytest
import torch
from backbones import FAMILIES, STAGED, backbone
from torch.nn import functional as F
from transformers import (
    AutoBackbone,
    AutoModelForImageTextToText,
    BertConfig,
    ConvNextConfig,
    Dinov2Config,
    SwinConfig,
)

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.training.quantization import four_bit_config


@pytest.fixture
def make_model(small_config):
    def make(family: str, **kwargs) -> DeltaVLMForConditionalGeneration:
        torch.manual_seed(0)
        config = small_config(vision_config=backbone(family), neck_hidden_size=24, **kwargs)
        model = DeltaVLMForConditionalGeneration(config).eval()
        with torch.no_grad():  # spread out, so that answers depend on the images
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return make


@pytest.fixture
def inputs(small_inputs):
    def of(model) -> dict[str, torch.Tensor]:
        size = model.config.image_size
        torch.manual_seed(1)
        return {**small_inputs, "pixel_values": torch.randn(2, 2, 3, size, size)}

    return of


@pytest.mark.parametrize("family", FAMILIES)
class TestFamilies:
    @torch.no_grad()
    def test_tokens_are_the_backbones_feature_maps_under_the_neck(self, family, make_model, inputs):
        model = make_model(family)
        images = inputs(model)["pixel_values"].flatten(0, 1)
        alone = AutoBackbone.from_config(backbone(family)).eval()
        alone.load_state_dict(model.vision_model.backbone.state_dict())
        maps = alone(images).feature_maps
        grid = [model.config.image_size // model.config.vision_stride] * 2
        expected = 0
        for projection, each in zip(model.vision_model.neck.projections, maps, strict=True):
            if each.shape[-1] > grid[0]:
                each = F.avg_pool2d(each, each.shape[-1] // grid[0])
            each = torch.einsum("oc,bchw->bohw", projection.weight[..., 0, 0], each)
            expected = expected + F.interpolate(each + projection.bias[:, None, None], grid, mode="bilinear")
        expected = model.vision_model.neck.norm(expected.flatten(2).transpose(1, 2))
        outputs = model.vision_model(images)
        for found, each in zip(outputs.feature_maps, maps, strict=True):
            torch.testing.assert_close(found, each, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        before, after = outputs.last_hidden_state.unflatten(0, (2, 2)).unbind(1)
        pair_features = model.encode_pair(inputs(model)["pixel_values"])
        assert pair_features.shape == (2, 2 * model.config.num_vision_tokens, 24)
        assert torch.equal(pair_features, model.difference(before, after))

    def test_answers_are_those_of_the_saved_model(self, family, make_model, inputs, tmp_path):
        model = make_model(family)
        answers = model.generate(**inputs(model), max_new_tokens=6)
        shifted = {**inputs(model), "pixel_values": inputs(model)["pixel_values"].flip(1)}
        assert not torch.equal(model(**inputs(model)).logits, model(**shifted).logits)  # of what is seen
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
        assert isinstance(loaded.config.vision_config, type(backbone(family)))
        assert torch.equal(loaded.generate(**inputs(model), max_new_tokens=6), answers)

    @torch.no_grad()
    def test_encoded_once_and_explained(self, family, make_model, inputs):
        model = make_model(family)
        given = inputs(model)
        pair_features = model.encode_pair(given["pixel_values"])
        rest = {name: value for name, value in given.items() if name != "pixel_values"}
        torch.testing.assert_close(model(**rest, pair_features=pair_features).logits, model(**given).logits)
        for explained in (model.explain(**given), model.explain(**rest, pair_features=pair_features)):
            size = model.config.image_size
            assert explained.attention.shape == (2, 2, size, size) and explained.change.shape == (2, size, size)
            torch.testing.assert_close(explained.attention.sum((1, 2, 3)), torch.ones(2))
        before, after = pair_features.chunk(2, 1)
        grid = model.config.grid(size, size)
        peak = (after - before).norm(dim=-1)[0].argmax()  # of the grid's tokens: there is no CLS before them
        row, column = divmod(int(model.explain(**given).change[0].argmax()), size)
        assert (row * grid[0] // size, column * grid[1] // size) == divmod(int(peak), grid[1])

    @torch.no_grad()
    def test_images_of_another_size(self, family, make_model):
        model = make_model(family)
        larger = torch.randn(1, 2, 3, 2 * model.config.image_size, 2 * model.config.image_size)
        with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
            model.encode_pair(larger)
        if family == "beit":
            pytest.skip("BEiT's relative positions are of one size")
        found = model.encode_pair(larger, interpolate_pos_encoding=True)
        assert found.shape == (1, 8 * model.config.num_vision_tokens, 24)


def test_position_codes_without_cls(make_model, inputs):
    plain, coded = (make_model("convnext", spatial_position_codes=codes) for codes in (False, True))
    with torch.no_grad():
        added = [model.encode_pair(inputs(model)["pixel_values"]) for model in (coded, plain)]
    assert ((added[0] - added[1]).abs().amax(-1) > 0).all()


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_tokens_at_any_stride(small_config, stride):
    config = small_config(vision_config=backbone("convnext"), neck_hidden_size=24, neck_stride=stride)
    model = DeltaVLMForConditionalGeneration(config)
    assert model.encode_pair(torch.zeros(1, 2, 3, 32, 32)).shape == (1, 2 * (32 // stride) ** 2, 24)


def test_strides_by_default():
    """A ViT keeps its patches; where there are stages, 16 pixels."""
    assert DeltaVLMConfig(vision_config=Dinov2Config(image_size=224)).neck_stride == 14
    assert DeltaVLMConfig(vision_config=ConvNextConfig()).neck_stride == 16
    assert DeltaVLMConfig(vision_config=SwinConfig()).neck_stride == 16
    assert DeltaVLMConfig(vision_config=SwinConfig()).qformer_config.encoder_hidden_size == 256
    assert DeltaVLMConfig().neck_stride is None


def test_a_dict_says_which():
    config = DeltaVLMConfig(vision_config={"model_type": "swin", "out_indices": [2, 3], "image_size": 64})
    assert config.vision_config.out_indices == [2, 3] and config.num_vision_tokens == 16
    assert DeltaVLMConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()
    assert DeltaVLMConfig(vision_config={"image_size": 28}).vision_config.model_type == "instructblip_vision_model"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_config": BertConfig()}, "`vision_config.model_type` is 'bert', which is neither"),
        ({"vision_config": {"model_type": "vit"}}, "nor a backbone of Transformers"),
        ({"vision_config": ConvNextConfig(image_size=60)}, "`neck_stride` is 16, of which the image size of 60"),
        ({"vision_config": ConvNextConfig(), "neck_stride": 0}, "`neck_stride` is 0, expected at least 1"),
        ({"vision_config": ConvNextConfig(), "neck_hidden_size": -1}, "`neck_hidden_size` is -1"),
        (
            {"vision_config": ConvNextConfig(), "neck_hidden_size": 30, "spatial_position_codes": True},
            "`neck_hidden_size` that is a multiple of 4, got 30",
        ),
        ({"vision_config": SwinConfig(image_size=[64, 32])}, "images are square"),
        ({"vision_config": {"model_type": "efficientnet_lite", "depth": 8}}, "`depth` is 8, expected 1 to 7"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        DeltaVLMConfig(**settings)


def test_blocks_stay_whole_on_several_devices(make_model):
    assert {"Dinov2Layer", "LlamaDecoderLayer"} <= set(make_model("dinov2")._no_split_modules)


def test_only_the_language_model_is_quantised(make_model, inputs, tmp_path):
    model = make_model("efficientnet_lite")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, quantization_config=four_bit_config(torch.float32))
    assert loaded.language_model.model.layers[0].mlp.up_proj.weight.dtype == torch.uint8
    pixels = inputs(model)["pixel_values"]
    torch.testing.assert_close(loaded.encode_pair(pixels).float(), model.encode_pair(pixels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", STAGED)
def test_gradients_reach_all_that_is_used(family, make_model, inputs):
    model = make_model(family)
    model(**inputs(model), labels=inputs(model)["input_ids"].clamp(max=60)).loss.backward()
    unused = {name for name, weight in model.named_parameters() if weight.grad is None}
    last = {"convnext": "encoder.stages.3.", "swin": "swin.encoder.layers.3."}.get(family, "none of them")
    beyond = ("swin.encoder.layers.2.downsample.", "swin.layernorm.", f"{last}")
    assert all(name.removeprefix("vision_model.backbone.").startswith(beyond) for name in unused)
    assert bool(unused) == (family != "efficientnet_lite")


class TestEfficientNetLite:
    def test_strides_and_channels(self):
        config = backbone("efficientnet_lite")
        config.out_indices = [0, 1, 2, 3, 4, 5]
        maps = AutoBackbone.from_config(config)(torch.zeros(1, 3, 32, 32)).feature_maps
        sizes = [(32, 16, 16), (16, 16, 16), (24, 8, 8), (40, 4, 4), (80, 2, 2), (112, 2, 2)]
        assert [tuple(each.shape[1:]) for each in maps] == sizes

    def test_size_of_lite0(self):
        """The published network, 4.65 million weights, without its classifier and the last convolution."""
        config = type(backbone("efficientnet_lite"))(depth=7)
        weights = sum(weight.numel() for weight in AutoBackbone.from_config(config).parameters())
        assert weights == 4_652_008 - (1280 * 1000 + 1000) - (320 * 1280 + 2 * 1280)
