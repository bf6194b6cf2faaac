"""
Change masks from pair features: which pixels changed, for each class.

Shapes: B pairs, N vision tokens of one date, D vision width, K classes, h x w a grid, H x W pixels.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_deltavlm import DeltaVLMConfig
from .vision_backbone import resize


class MaskConvolution(nn.Conv2d):
    """Weights that spread as PyTorch has them: those of InstructBLIP's linear layers are too small to learn from."""

    def init_weights(self) -> None:
        init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            init.zeros_(self.bias)


class MaskDecoder(nn.Module):
    """
    A light decoder: both dates' pair features on their grid, then, from coarse to fine, the backbone's finest maps.

    Args:
        config ([`DeltaVLMConfig`]): with `mask_classes`.
        channels (`Sequence[int]`): of the feature maps that it reads, finest first.
    """

    def __init__(self, config: DeltaVLMConfig, channels: Sequence[int]):
        super().__init__()
        width = config.mask_hidden_size
        self.num_prefix_tokens = config.num_prefix_tokens
        self.project = MaskConvolution(2 * config.vision_width, width, kernel_size=1)
        self.blocks = nn.ModuleList([_block(width)])
        self.enlarge, self.skips = nn.ModuleList(), nn.ModuleList()
        for number in reversed(channels):
            self.enlarge.append(MaskConvolution(width, width // 2, kernel_size=1))
            width //= 2
            self.skips.append(MaskConvolution(2 * number, width, kernel_size=1))
            self.blocks.append(_block(width))
        outputs = len(config.mask_classes) * (2 if config.mask_evidence else 1)
        self.classify = MaskConvolution(width, outputs, kernel_size=1)
        if config.mask_evidence:
            self.embed = nn.Linear(4 * self.classify.out_channels, config.vision_width)

    def forward(
        self, pair_features: torch.Tensor, grid: tuple[int, int], feature_maps: Sequence[torch.Tensor] = ()
    ) -> torch.Tensor:
        """
        Args:
            pair_features (`torch.Tensor` of shape `(B, 2N, D)`): without evidence.
            grid (`tuple[int, int]`): rows and columns of tokens.
            feature_maps (`Sequence[torch.Tensor]` of shape `(2B, C, h, w)` each): before, after, before, ...; finest
                first.

        Returns:
            `torch.Tensor` of shape `(B, K, h, w)`: logits, as fine as the finest map; with `mask_evidence` twice as
            many, of the classes' pixels, then of their objects' centres.
        """
        dates = pair_features.unflatten(1, (2, -1))[:, :, self.num_prefix_tokens :]  # (B, 2, h * w, D)
        states = self.project(dates.transpose(2, 3).flatten(1, 2).unflatten(2, grid))  # (B, 2D, h, w) -> (B, C, h, w)
        states = self.blocks[0](states)
        steps = zip(self.enlarge, self.skips, self.blocks[1:], reversed(feature_maps), strict=True)
        for enlarge, skip, block, feature_map in steps:
            both = feature_map.unflatten(0, (-1, 2)).flatten(1, 2)  # (2B, C, h, w) -> (B, 2C, h, w)
            states = block(resize(enlarge(states), both.shape[-2:]) + skip(both))
        return self.classify(states)

    def evidence(self, logits: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """
        What the masks say at each token, in four quarters of it, for the pair features of both dates.

        Args:
            logits (`torch.Tensor` of shape `(B, 2K, h, w)`): see [`~MaskDecoder.forward`].
            grid (`tuple[int, int]`): rows and columns of tokens.

        Returns:
            `torch.Tensor` of shape `(B, 2N, D)`.
        """
        found = nn.functional.adaptive_avg_pool2d(logits.sigmoid(), [2 * side for side in grid])
        found = nn.functional.pixel_unshuffle(found, 2).flatten(2).transpose(1, 2)  # (B, h * w, 8K)
        return nn.functional.pad(self.embed(found), (0, 0, self.num_prefix_tokens, 0)).repeat(1, 2, 1)


def _block(width: int) -> nn.Sequential:
    convolution = MaskConvolution(width, width, kernel_size=3, padding=1, bias=False)
    return nn.Sequential(nn.GroupNorm(1, width), nn.ReLU(), convolution, nn.GroupNorm(1, width), nn.ReLU())


@torch.no_grad()
def segment(
    model: Any,
    pixel_values: torch.Tensor | None = None,
    pair_features: torch.Tensor | None = None,
    interpolate_pos_encoding: bool = False,
    **others,
) -> torch.Tensor:
    """
    Which pixels changed. `segment(**inputs)` takes what the processor returned.

    Args:
        pixel_values (`torch.Tensor` of shape `(B, 2, 3, H, W)`, *optional*): before and after.
        pair_features (`torch.Tensor` of shape `(B, 2N, D)`, *optional*): in their place, for models whose decoder
            reads nothing else (`mask_skip_maps=0`, no `mask_evidence`). Masks then have the model's own image size.
        interpolate_pos_encoding (`bool`, *optional*): for images of another size than the model's.
        others: what the language model reads; not used.

    Returns:
        `torch.Tensor` of shape `(B, K, H, W)`: for each of `config.mask_classes` the probability that it changed,
        float32.

    Raises:
        ValueError: if the model has no masks, or not exactly one of both inputs is given in a form that it takes.
    """
    config = model.config
    if not config.mask_classes:
        raise ValueError(
            "This model makes no masks: `config.mask_classes` names no class. Choose one that was made and trained "
            "with masks."
        )
    if (pixel_values is None) == (pair_features is None):
        raise ValueError("Give the images as `pixel_values` or as `pair_features`: one of them.")
    if pixel_values is not None:
        size = tuple(pixel_values.shape[-2:])
        logits = model._encode_pair(pixel_values, interpolate_pos_encoding, masks=True)[2]
    else:
        if config.mask_skip_maps or config.mask_evidence:
            raise ValueError(
                "This model's masks are made of more than pair features: give the images, as `pixel_values`."
            )
        size = (config.image_size,) * 2
        logits = model.mask_decoder(pair_features, config.grid(*size))
    return resize(logits[:, : len(config.mask_classes)].float(), size).sigmoid()
