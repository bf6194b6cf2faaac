"""A vision encoder of others, from its own folder: its sizes, the layers to read, its weights, what its images are."""

import copy
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    InstructBlipConfig,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.backbone_utils import BackboneMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IMAGENET_STANDARD_MEAN
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, cached_file, find_adapter_config_file

from ..modeling import DeltaVLMConfig
from ..modeling.bounds import check_file, check_sizes
from ..modeling.efficientnet_lite import EfficientNetLiteConfig
from ..modeling.vision_backbone import feature_map_shapes
from .sources import Origin, Source, named

_PIXELS = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "resample")
_POSITIONS = "embeddings.position_embeddings"


@dataclass
class Encoder:
    """
    Args:
        config (`PreTrainedConfig`): for `vision_config`.
        model (`PreTrainedModel`, *optional*): None where there are no weights yet.
        new (`set[str]`): names of its weights that were not in its files.
        pixels (`dict`): what the image processor is to do, beside resizing.
        source (`dict`, *optional*): of `weight_sources`: where its weights are.
    """

    config: PreTrainedConfig
    model: PreTrainedModel | None = None
    new: set[str] = field(default_factory=set)
    pixels: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] | None = None


def read_config(source: Source, **gguf: str) -> PreTrainedConfig:
    """
    The configuration in a folder or at a Hub id, as a stranger's: looked at before anything is built of it. With
    `gguf_file=` that in a GGUF file there.

    Raises:
        OSError: if there is none.
        ValueError: if it asks for what `bounds.py` refuses, for code of its own, or has an adapter beside it.
    """
    settings = PreTrainedConfig.get_config_dict(source, **gguf)[0]
    check_sizes(settings)
    check_file({name: value for name, value in settings.items() if name != "text_config"})
    if settings.get("quantization_config") and not gguf:
        raise ValueError(f"The weights of {source} are quantised: a model is composed of parts in full precision.")
    if not gguf and find_adapter_config_file(str(source)) is not None:
        raise ValueError(f"{source} holds an adapter beside its weights, or in their place: merge it first.")
    return AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)


def read_encoder(
    vision: Source | PreTrainedConfig | PreTrainedModel,
    image_size: int | None,
    out_indices: Sequence[int] | None,
    dtype: torch.dtype,
) -> Encoder:
    """See [`~hub.compose.compose`] for the arguments and errors."""
    if isinstance(vision, PreTrainedModel):
        if not isinstance(vision, BackboneMixin | InstructBlipVisionModel):
            raise ValueError(
                f"`vision` is a {type(vision).__name__}, expected a backbone, whose feature maps can be read: give "
                "its folder or Hub id, or load it with AutoBackbone.from_pretrained(...)."
            )
        encoder = Encoder(vision.config, vision.to(dtype))
    elif isinstance(vision, PreTrainedConfig):
        encoder = Encoder(copy.deepcopy(vision))
    else:
        encoder = Encoder(read_config(vision))
    if isinstance(encoder.config, InstructBlipConfig):
        encoder.config = encoder.config.vision_config
    DeltaVLMConfig(vision_config=encoder.config)  # or an error that says what is wrong with it
    is_place = not isinstance(vision, PreTrainedConfig | PreTrainedModel)
    asked = _preprocessing(vision) if is_place else {}
    if isinstance(encoder.config, InstructBlipVisionConfig):
        _read_vit(encoder, vision if is_place else None, image_size, out_indices, dtype)
    else:
        _read_backbone(encoder, vision if is_place else None, image_size, _side(asked), out_indices, dtype)
        half = isinstance(encoder.config, EfficientNetLiteConfig)
        encoder.pixels = {
            "image_mean": list(IMAGENET_STANDARD_MEAN if half else IMAGENET_DEFAULT_MEAN),
            "image_std": list(IMAGENET_STANDARD_MEAN if half else IMAGENET_DEFAULT_STD),
        }
    encoder.pixels |= {name: asked[name] for name in _PIXELS if asked.get(name) is not None}
    for name in ("image_mean", "image_std"):
        value = encoder.pixels.get(name, [0.5] * 3)
        if not isinstance(value, list) or len(value) != 3:
            raise ValueError(f"`{name}` of {vision} is {value!r:.60}, expected three numbers: red, green, blue.")
    return encoder


def count_finer_maps(config: DeltaVLMConfig) -> int:
    """How many of a backbone's feature maps are finer than the grid of tokens."""
    if not config.has_backbone:
        return 0
    side = config.grid(config.image_size, config.image_size)[0]
    return sum(map_side > side for map_side in _map_sides(config.vision_config, config.image_size))


def _read_vit(encoder: Encoder, place: Source | None, image_size: int | None, out_indices, dtype: torch.dtype) -> None:
    if out_indices is not None or image_size not in (None, encoder.config.image_size):
        raise ValueError(
            f"InstructBLIP's ViT reads images of {encoder.config.image_size} pixels and gives its last layer: leave "
            "`image_size` and `out_indices` out."
        )
    if place is None:
        return
    with ExitStack() as stack:
        found = Origin(place, stack, only=lambda name: not name.startswith(("qformer.", "language_"))).weights
        prefix = "vision_model." if any(name.startswith("vision_model.") for name in found) else ""
        weights = {name.removeprefix(prefix): weight[...] for name, weight in found.items() if name.startswith(prefix)}
    encoder.model = InstructBlipVisionModel._from_config(encoder.config, dtype=dtype)
    missing, unexpected = encoder.model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{place} does not hold the weights of its vision encoder, such as {(missing + unexpected)[0]}."
        )
    encoder.source = {"name_or_path": named(place), "prefix": "" if prefix else "vision_model."}


def _read_backbone(
    encoder: Encoder,
    place: Source | None,
    image_size: int | None,
    asked_size: int | None,
    out_indices: Sequence[int] | None,
    dtype: torch.dtype,
) -> None:
    config = encoder.config
    own_size = DeltaVLMConfig(vision_config=config).image_size
    if out_indices is not None:
        config.out_indices = list(out_indices)
    elif place is not None:
        config.out_indices = _choose_layers(config, own_size)
    if encoder.model is not None and out_indices is not None:
        raise ValueError("A backbone that is loaded has its `out_indices`: name them when you load it.")
    if place is not None:
        with torch.device("meta"):
            kind = type(AutoBackbone.from_config(config))
        encoder.model, loaded = kind.from_pretrained(
            place, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        config = encoder.config = encoder.model.config
        encoder.new = set(loaded["missing_keys"])
        if encoder.new >= {name for name, _ in encoder.model.named_parameters()}:
            raise ValueError(
                f"{place} holds no weights of a {config.model_type!r} backbone under the names of Transformers."
            )
        encoder.source = {"name_or_path": named(place), "prefix": "vision_model.backbone."}
    size = image_size or asked_size or own_size
    if size == own_size:
        return
    encoder.config = copy.deepcopy(config)
    encoder.config.image_size = size
    if encoder.model is None:
        return
    bound = {name for name, shape in _shapes(config).items() if _shapes(encoder.config)[name] != shape}
    if bound == {_POSITIONS} and hasattr(encoder.model.embeddings, "interpolate_pos_encoding"):
        encoder.model = _with_positions_for(encoder.model, encoder.config)
        encoder.config = encoder.model.config
    elif not bound:
        encoder.model.config.image_size = size
        encoder.config = encoder.model.config
    elif image_size is None:
        encoder.config = config
    else:
        raise ValueError(
            f"`image_size` is {image_size}, but the weights of {place or 'this encoder'} are bound to images of "
            f"{own_size} pixels ({sorted(bound)[0]}): leave it out."
        )


def _with_positions_for(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The same with position embeddings for another image size, resampled as the model itself does at each call."""
    resized = type(model)._from_config(config, dtype=model.dtype)
    table = resized.embeddings.position_embeddings
    with torch.no_grad():
        positions = model.embeddings.interpolate_pos_encoding(table, config.image_size, config.image_size)
    resized.load_state_dict({**model.state_dict(), _POSITIONS: positions})
    return resized.eval()


def _choose_layers(config: PreTrainedConfig, size: int) -> list[int]:
    """Where the stride is the same throughout, four layers, evenly up to the last; else each stage after the stem."""
    last = len(config.stage_names) - 1
    every = copy.deepcopy(config)
    every.out_indices = list(range(1, last + 1))
    if len(set(_map_sides(every, size))) > 1:
        return every.out_indices
    return sorted({-(-last * quarter // 4) for quarter in (1, 2, 3, 4)})


def _map_sides(config: PreTrainedConfig, size: int) -> list[int]:
    """Of each feature map its rows."""
    shapes = feature_map_shapes(config, size)
    if any(len(shape) != 3 for shape in shapes):
        raise ValueError(
            f"The {config.model_type!r} backbone gives tokens, not feature maps: set `reshape_hidden_states` in its "
            "configuration."
        )
    return [shape[-2] for shape in shapes]


def _shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(each.shape) for name, each in AutoBackbone.from_config(config).state_dict().items()}


def _preprocessing(place: Source) -> dict[str, Any]:
    """What a folder or Hub id says of its images; nothing where it says nothing."""
    for name in (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME):
        file = cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        if file is not None:
            try:
                settings = json.loads(Path(file).read_text())
            except ValueError as error:
                raise ValueError(f"{file} is damaged: {error}") from error
            settings = settings if name == IMAGE_PROCESSOR_NAME else settings.get("image_processor", {})
            if settings:
                return settings
    return {}


def _side(settings: Mapping[str, Any]) -> int | None:
    """The side of the images that an encoder was given, if one number says it."""
    size = settings.get("crop_size") if settings.get("do_center_crop") else None
    size = size or settings.get("size")
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    side = sides.pop() if len(sides) == 1 else None
    if side is not None and not (isinstance(side, int) and 0 < side <= 2**14):
        raise ValueError(f"The encoder's images are to have a side of {side!r:.60}, expected pixels.")
    return side
