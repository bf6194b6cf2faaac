"""
The vision encoder: InstructBLIP's ViT, or any backbone of Transformers under a neck that makes tokens of its maps.

Shapes: B images, C channels of a feature map, N tokens, D their width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, InstructBlipVisionModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING
from transformers.utils import ModelOutput

from .configuration_deltavlm import DeltaVLMConfig


@dataclass
class VisionBackboneOutput(ModelOutput):
    """
    Output of [`VisionBackbone`].

    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(B, N, D)`): tokens, row by row from the top left; no CLS.
        feature_maps (`tuple[torch.FloatTensor]` of shape `(B, C, h, w)` each): the backbone's, finest first.
        hidden_states, attentions (*optional*): the backbone's, on request.
    """

    last_hidden_state: torch.FloatTensor | None = None
    feature_maps: tuple[torch.FloatTensor, ...] | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class VisionNeck(nn.Module):
    """
    Brings feature maps to one grid and one width, adds them up and makes tokens of the sum.

    Args:
        channels (`Sequence[int]`): of each map.
        width (`int`): D.
        stride (`int`): pixels of the image between two tokens.
    """

    def __init__(self, channels: Sequence[int], width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.projections = nn.ModuleList(nn.Conv2d(number, width, kernel_size=1) for number in channels)
        self.norm = nn.LayerNorm(width)

    def forward(self, feature_maps: Sequence[torch.Tensor], height: int, width: int) -> torch.Tensor:
        """From maps `(B, C, h, w)` of images of `height` x `width` pixels to tokens `(B, N, D)`."""
        grid = (height // self.stride, width // self.stride)
        states = []
        for projection, feature_map in zip(self.projections, feature_maps, strict=True):
            feature_map = feature_map.to(projection.weight.dtype)  # what trains is kept in full precision
            if feature_map.shape[-2] > grid[0]:
                states.append(projection(nn.functional.adaptive_avg_pool2d(feature_map, grid)))
            else:  # projected while it is small
                states.append(resize(projection(feature_map), grid))
        return self.norm(torch.stack(states).sum(0).flatten(2).transpose(1, 2))


class VisionBackbone(PreTrainedModel):
    """
    A backbone of Transformers and its neck, in the place of InstructBLIP's vision model.

    Args:
        config ([`DeltaVLMConfig`]): whose `vision_config` is a backbone's.
    """

    main_input_name = "pixel_values"
    base_model_prefix = ""
    supports_gradient_checkpointing = True
    # As far as the backbone does.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: DeltaVLMConfig):
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config.vision_config)]
        if not (kind._supports_sdpa or kind._supports_attention_backend):
            config.vision_config._attn_implementation = "eager"  # whatever the other parts are asked for
        super().__init__(config.vision_config)
        self.backbone = AutoBackbone.from_config(config.vision_config)
        self.neck = VisionNeck(self.backbone.channels, config.vision_width, config.vision_stride)
        self._takes_any_size = "interpolate_pos_encoding" in inspect.signature(self.backbone.forward).parameters
        self.post_init()

    def forward(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        return_dict: bool = True,
        **kwargs,
    ) -> VisionBackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`).
            interpolate_pos_encoding (`bool`, *optional*): passed to backbones that have it; the others take images of
                any size, or say that they do not.
            kwargs: `output_hidden_states`, `output_attentions`.
        """
        if self._takes_any_size:
            kwargs["interpolate_pos_encoding"] = interpolate_pos_encoding
        pixels = pixel_values.to(self.backbone.dtype)
        outputs = self.backbone.forward_with_filtered_kwargs(pixels, return_dict=True, **kwargs)
        return VisionBackboneOutput(
            last_hidden_state=self.neck(outputs.feature_maps, *pixel_values.shape[-2:]),
            feature_maps=outputs.feature_maps,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def make_vision_model(config: DeltaVLMConfig) -> Any:
    """The vision encoder that a configuration asks for."""
    if config.has_backbone:
        return VisionBackbone(config)
    vision_model = InstructBlipVisionModel._from_config(config.vision_config)
    vision_model.post_layernorm.eps = config.post_layernorm_eps
    return vision_model


def feature_map_shapes(vision_config: PreTrainedConfig, size: int) -> list[torch.Size]:
    """Of each feature map of one image of `size` x `size` pixels, by a run that computes shapes alone."""
    with torch.device("meta"):
        maps = AutoBackbone.from_config(vision_config).eval()(torch.zeros(1, 3, size, size)).feature_maps
    return [feature_map.shape[1:] for feature_map in maps]


def resize(states: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A map `(B, C, h, w)` at another size, bilinear; as it is where that is its own."""
    if tuple(states.shape[-2:]) == tuple(size):
        return states
    return nn.functional.interpolate(states, size, mode="bilinear")
