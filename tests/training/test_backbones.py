"""Training around a backbone of Transformers: what is frozen, what is cached, how much memory it takes."""

import pytest
import torch
from backbones import FAMILIES, backbone

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.training import FreezePolicy, freeze
from deltavlm_hf.training.memory import estimate_memory
from deltavlm_hf.training.prefix_cache import encode_vision_prefix, take_vision_states


@pytest.fixture
def make_model(small_config):
    def make(family: str, **kwargs) -> DeltaVLMForConditionalGeneration:
        torch.manual_seed(0)
        config = small_config(vision_config=backbone(family), neck_hidden_size=24, **kwargs)
        return DeltaVLMForConditionalGeneration(config)

    return make


def trained(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_frozen_and_its_neck_is_not(family, make_model):
    model = make_model(family)
    freeze(model)
    of_vision = {name for name in trained(model) if name.startswith("vision_model.")}
    assert of_vision == {f"vision_model.neck.{name}" for name, _ in model.vision_model.neck.named_parameters()}
    assert {"difference.output.weight", "query_tokens"} < trained(model)
    model.train()
    assert not any(module.training for module in model.vision_model.backbone.modules())  # nor do its statistics


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("dinov2", "encoder.layer.3."),
        ("beit", "beit.layers.3."),
        ("convnext", "encoder.stages.2."),  # of the fourth stage no feature map is used
        ("swin", "swin.encoder.layers.2."),
        ("efficientnet_lite", "stages.4."),
    ],
)
def test_its_last_stage_on_request(family, prefix, make_model):
    model = make_model(family)
    freeze(model, FreezePolicy(vision_blocks=1))
    found = {name for name in trained(model) if name.startswith("vision_model.backbone.")}
    assert found and all(name.startswith(f"vision_model.backbone.{prefix}") for name in found)
    freeze(model, FreezePolicy(vision_blocks=-1))
    assert all(weight.requires_grad for weight in model.vision_model.parameters())


def test_stages_that_are_not_there(make_model):
    with pytest.raises(ValueError, match="`vision_blocks` is 4; the vision encoder has 3 blocks"):
        freeze(make_model("convnext"), FreezePolicy(vision_blocks=4))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("evidence", [False, True])
def test_cached_feature_maps_give_the_same_loss_and_gradients(family, evidence, make_model, small_inputs):
    masks = {"mask_classes": ["building"], "mask_evidence": True} if evidence else {}
    if evidence and family not in ("dinov2", "beit"):
        masks["mask_skip_maps"] = 1
    model = make_model(family, difference_dropout=0.0, **masks)
    model.qformer.config.hidden_dropout_prob = 0.0
    freeze(model)
    model.eval()
    size = model.config.image_size
    torch.manual_seed(1)
    inputs = {**small_inputs, "pixel_values": torch.randn(2, 2, 3, size, size)}
    labels = inputs["input_ids"].clamp(max=60)
    expected = model(**inputs, labels=labels).loss
    expected.backward()
    gradient = model.vision_model.neck.projections[0].weight.grad.clone()
    model.zero_grad()
    take_vision_states(model)
    states = encode_vision_prefix(model, inputs.pop("pixel_values").flatten(0, 1), 0).unflatten(0, (2, 2))
    loss = model(**inputs, labels=labels, vision_states=states, vision_states_block=0).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.vision_model.neck.projections[0].weight.grad, gradient)


def test_memory_of_a_step(small_config):
    plain = estimate_memory(small_config(vision_config=backbone("convnext")), batch_size=2)
    tuned = estimate_memory(
        small_config(vision_config=backbone("convnext")), FreezePolicy(vision_blocks=-1), batch_size=2
    )
    assert plain.frozen_vision_weights > 0 and tuned.frozen_vision_weights == 0
    assert tuned.activations > plain.activations
    config: DeltaVLMConfig = small_config(vision_config=backbone("convnext"))
    model = DeltaVLMForConditionalGeneration(config)
    assert plain.frozen_vision_weights == 2 * sum(
        weight.numel() for weight in model.vision_model.backbone.parameters()
    )
