"""Configuration of DeltaVLM: the facts needed to rebuild its weights."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig, PreTrainedConfig
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import SubConfigSpec

from .bounds import MOST_CLASSES, MOST_METRES, check_file, check_origins, check_sizes, check_sources
from .efficientnet_lite import EfficientNetLiteConfig  # noqa: F401 - which makes it known to AutoConfig
from .lora import check_lora

DIFFERENCE_MODULES = ("csrm", "difference", "concat")


@strict
class DeltaVLMConfig(PreTrainedConfig):
    r"""
    Configuration of a DeltaVLM model: a vision encoder shared by both dates, a difference module, an
    instruction-guided Q-Former and a causal language model. The defaults are the paper's sizes (EVA-CLIP ViT-g at
    224 px, a 12-layer Q-Former with 32 queries, Vicuna-7B).

    Args:
        vision_config (`dict` or [`PreTrainedConfig`], *optional*):
            The vision encoder: InstructBLIP's ViT (the default), or a backbone that `AutoBackbone` knows, by its
            `model_type`, with `out_indices` or `out_features`: the feature maps that tokens are made of.
            InstructBLIP's own `initializer_range` of 1e-10, meant for loading only, is replaced by this
            configuration's, so that a model can also be trained from scratch.
        qformer_config (`dict` or [`InstructBlipQFormerConfig`], *optional*):
            The Q-Former; `encoder_hidden_size` is always the vision encoder's `hidden_size`. Without any, the
            vocabulary has 30,523 tokens: BERT's and `[DEC]`.
        text_config (`dict` or [`PreTrainedConfig`], *optional*):
            Any attention-based language model that `AutoModelForCausalLM` knows. A `dict` names its `model_type`
            (`"llama"` if absent).
        num_query_tokens (`int`, *optional*, defaults to 32):
            How many queries the Q-Former has, hence how many change tokens the language model reads per pair.
        image_token_id (`int`, *optional*, defaults to 32001):
            The placeholder in `input_ids` that change tokens replace. It may lie outside the language model's
            vocabulary: a placeholder is never looked up.
        difference_module (`str`, *optional*, defaults to `"csrm"`):
            `"csrm"`: cross-semantic relation measuring (paper, visual difference perception). `"concat"`: the two
            feature maps as they are, without parameters (the paper's ablation); `"difference"`: what each date has
            that the other has not, likewise.
        difference_dropout (`float`, *optional*, defaults to 0.5):
            Dropout on CSRM's gate and context while training.
        spatial_position_codes (`bool`, *optional*, defaults to `False`):
            Whether fixed 2D sine/cosine codes are added to the pair features. Not in the paper; small models that are
            trained from scratch localise better with them.
        post_layernorm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norm after InstructBLIP's ViT, which the authors' code sets apart from the blocks'.
        neck_hidden_size (`int`, *optional*):
            Of a backbone: the width of the tokens that its feature maps are brought to. Defaults to 256.
        neck_stride (`int`, *optional*):
            Of a backbone: pixels between two tokens; the image's side is a multiple of it. Defaults to the
            `patch_size` of a backbone that keeps it throughout, else to 16.
        mask_classes (`list[str]`, *optional*):
            What the mask decoder tells apart, such as `["road", "building"]`. None: there is no decoder.
        change_classes (`dict`, *optional*):
            What questions and answers are about, where these are no roads and buildings: the content of a data set's
            `classes.yaml`, with names, plurals, values in masks and colours. Training fills it in.
        mask_hidden_size (`int`, *optional*, defaults to 64):
            Channels of the mask decoder at the tokens' grid, half as many at each finer map.
        mask_skip_maps (`int`, *optional*, defaults to 0):
            How many of a backbone's feature maps, the finest first, the mask decoder reads beside the pair features.
        mask_evidence (`bool`, *optional*, defaults to `False`):
            Whether what the mask decoder found, and the centres of objects that it then marks too, is added to the
            pair features, so that words rest on the masks. Not in the paper.
        ground_resolution (`float`, *optional*):
            Metres per pixel of the images that the model was trained on, at the model's own image size: what scenes
            are brought to. None: nobody said.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation for the query tokens and for every new linear layer.
        weight_sources (`list[dict]`, *optional*):
            Of a small checkpoint: where the weights are that it leaves out, see `weight_sources.py`. Its files name
            them; pass it to `from_pretrained` to read them from another place.
        made_from (`list[dict]`, *optional*):
            For the model card: which parts others made. Of each `part` (`"vision_model"`, `"language_model"`, ...;
            `""`: all) its `name` and `revision` on the Hub and its `license`, as far as they are known.
        language_model_lora (`dict`, *optional*):
            Settings of PEFT's `LoraConfig`, where the language model has a LoRA adapter, whose weights are then among
            the model's. `save_pretrained` fills it in, `from_pretrained` makes the adapter of it.

    Raises:
        ValueError: if a file or dict is of another model or asks for what `bounds.py` refuses, `difference_module` is
            unknown, or settings do not go together.
    """

    model_type = "deltavlm"
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "image_hidden_states",
        "image_outputs",
        "vision_outputs",
        "qformer_outputs",
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type=InstructBlipVisionConfig.model_type),
        "qformer_config": InstructBlipQFormerConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    qformer_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    image_token_id: int = 32001
    difference_module: str = "csrm"
    difference_dropout: float = 0.5
    spatial_position_codes: bool = False
    post_layernorm_eps: float = 1e-5
    neck_hidden_size: int | None = None
    neck_stride: int | None = None
    mask_classes: list | None = None
    change_classes: dict | None = None
    mask_hidden_size: int = 64
    mask_skip_maps: int = 0
    mask_evidence: bool = False
    ground_resolution: float | int | None = None
    initializer_range: float = 0.02
    weight_sources: list | None = None
    made_from: list | None = None
    language_model_lora: dict | None = None

    def __post_init__(self, **kwargs):
        given = {**vars(self), **kwargs}
        self._check({name: value for name, value in given.items() if not isinstance(value, PreTrainedConfig)})
        if self.qformer_config is None:
            self.qformer_config = {"vocab_size": 30523}
        super().__post_init__(**kwargs)
        if self.has_backbone:
            if self.neck_hidden_size is None:
                self.neck_hidden_size = 256
            if self.neck_stride is None:
                self.neck_stride = _own_stride(self.vision_config) or 16
        elif self.vision_config.initializer_range == InstructBlipVisionConfig.initializer_range:
            self.vision_config.initializer_range = self.initializer_range
        self.check()
        self.qformer_config.encoder_hidden_size = self.vision_width

    @property
    def has_backbone(self) -> bool:
        """Whether vision is a backbone under a neck, not InstructBLIP's ViT."""
        return not isinstance(self.vision_config, InstructBlipVisionConfig)

    @property
    def vision_width(self) -> int:
        """D, the width of vision tokens."""
        return int(self.neck_hidden_size or 0) if self.has_backbone else self.vision_config.hidden_size

    @property
    def vision_stride(self) -> int:
        """Pixels between two vision tokens."""
        return int(self.neck_stride or 0) if self.has_backbone else self.vision_config.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens stand before those of the grid: 1 (CLS) or 0."""
        return 0 if self.has_backbone else 1

    @property
    def image_size(self) -> int:
        """The side of the images, in pixels; 224 for a backbone that does not say."""
        size = getattr(self.vision_config, "image_size", None) or 224
        return size if isinstance(size, int) else size[0]

    @property
    def num_vision_tokens(self) -> int:
        """N, of one date."""
        return self.num_prefix_tokens + (self.image_size // self.vision_stride) ** 2

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of vision tokens, of images of `height` x `width` pixels."""
        return height // self.vision_stride, width // self.vision_stride

    def check(self) -> None:
        """
        Refuses what cannot be built. Models call this before they make their parts.

        Raises:
            ValueError: naming the setting that cannot be.
        """
        self._check(self.to_dict())
        if self.difference_module not in DIFFERENCE_MODULES:
            raise ValueError(
                f"`difference_module` is {self.difference_module!r}, expected one of {', '.join(DIFFERENCE_MODULES)}."
            )
        if self.spatial_position_codes and self.vision_width % 4:
            width = "`neck_hidden_size`" if self.has_backbone else "a vision `hidden_size`"
            raise ValueError(
                f"`spatial_position_codes` needs {width} that is a multiple of 4, got {self.vision_width}."
            )
        if self.has_backbone:
            self._check_backbone()
        self._check_masks()
        if self.ground_resolution is not None and not 0 < self.ground_resolution <= MOST_METRES:
            raise ValueError(
                f"`ground_resolution` is {self.ground_resolution}, expected metres per pixel, more than 0 and at most "
                f"{MOST_METRES}."
            )

    def _check_backbone(self) -> None:
        kind, size = self.vision_config.model_type, getattr(self.vision_config, "image_size", None)
        if not isinstance(self.vision_config, BackboneConfigMixin):
            raise ValueError(
                f"`vision_config.model_type` is {kind!r}, which is neither {InstructBlipVisionConfig.model_type!r} "
                "nor a backbone of Transformers (see AutoBackbone)."
            )
        if isinstance(size, list | tuple) and (len(size) != 2 or size[0] != size[1]):
            raise ValueError(f"`vision_config.image_size` is {size!r:.60}, expected one number: images are square.")
        if (channels := getattr(self.vision_config, "num_channels", 3)) != 3:
            raise ValueError(f"The vision encoder reads {channels} channels (`num_channels`), expected 3: RGB.")
        for name, value in (("neck_hidden_size", self.vision_width), ("neck_stride", self.vision_stride)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}, expected at least 1.")
        if self.image_size % self.vision_stride:
            raise ValueError(
                f"`neck_stride` is {self.neck_stride}, of which the image size of {self.image_size} is no multiple."
            )

    def _check_masks(self) -> None:
        maps = len(self.vision_config.out_indices) if self.has_backbone else 0
        if not 0 <= self.mask_skip_maps <= maps:
            raise ValueError(
                f"`mask_skip_maps` is {self.mask_skip_maps}; this vision encoder has {maps} feature maps to read."
            )
        names = self.mask_classes
        if names is None:
            if self.mask_skip_maps or self.mask_evidence:
                raise ValueError(
                    "`mask_skip_maps` and `mask_evidence` need `mask_classes`: without, there are no masks."
                )
        elif not 1 <= len(names) <= MOST_CLASSES:
            raise ValueError(f"`mask_classes` has {len(names)} names, expected 1 to {MOST_CLASSES}.")
        elif not all(isinstance(name, str) and 1 <= len(name) <= 100 for name in names) or len({*names}) < len(names):
            raise ValueError(f"`mask_classes` is {names!r:.60}, expected different names of 1 to 100 characters.")
        elif self.mask_hidden_size < 1 or self.mask_hidden_size >> self.mask_skip_maps < 1:
            raise ValueError(
                f"`mask_hidden_size` is {self.mask_hidden_size}, too few to be halved for {self.mask_skip_maps} maps."
            )

    @staticmethod
    def _check(settings: dict[str, Any]) -> None:
        if settings.get("language_model_lora") is not None:
            check_lora(settings["language_model_lora"])
        check_sources(settings.get("weight_sources") or [])
        check_origins(settings.get("made_from") or [])
        check_sizes(settings)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in Transformers, which however takes another model's configuration, with defaults for what it lacks."""
        model_type = config_dict.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise ValueError(f"Expected the configuration of a {cls.model_type!r} model, got a {model_type!r}.")
        check_file(config_dict)
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"The configuration is damaged or of another version: {error}") from error


def _own_stride(vision_config: PreTrainedConfig) -> int | None:
    """The stride of a backbone whose maps all have that of its patches, as a ViT's have."""
    size = getattr(vision_config, "patch_size", None)
    staged = hasattr(vision_config, "depths") or hasattr(vision_config, "num_stages")
    return size if isinstance(size, int) and not staged else None


__all__ = ["DeltaVLMConfig"]
