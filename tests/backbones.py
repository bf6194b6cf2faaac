"""Small backbones of four families, two of them ViTs, and one of our own."""

from transformers import BeitConfig, ConvNextConfig, Dinov2Config, PreTrainedConfig, SwinConfig

from deltavlm_hf.modeling.efficientnet_lite import EfficientNetLiteConfig

_VIT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}


def backbone(family: str) -> PreTrainedConfig:
    """A fresh configuration: 32 px, but DINOv2's patches of 14 px make it 28."""
    stages = {"depths": [1, 1, 2, 1], "image_size": 32, "out_indices": [1, 2, 3]}
    return {
        "dinov2": lambda: Dinov2Config(**_VIT, image_size=28, patch_size=14, out_indices=[2, 4]),
        "beit": lambda: BeitConfig(**_VIT, image_size=32, patch_size=8, out_indices=[1, 2, 3, 4]),
        "convnext": lambda: ConvNextConfig(hidden_sizes=[8, 16, 32, 64], **stages),
        "swin": lambda: SwinConfig(embed_dim=16, num_heads=[1, 2, 2, 4], window_size=4, **stages),
        "efficientnet_lite": lambda: EfficientNetLiteConfig(
            depth=5, image_size=32, out_indices=[1, 2, 3, 4, 5], batch_norm_momentum=0.1
        ),
    }[family]()


FAMILIES = ("dinov2", "beit", "convnext", "swin", "efficientnet_lite")
STAGED = FAMILIES[2:]
