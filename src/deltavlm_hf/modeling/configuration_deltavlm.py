"""Configuration of DeltaVLM: the facts needed to rebuild its weights."""

from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, InstructBlipQFormerConfig, InstructBlipVisionConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from .bounds import check_file, check_sizes, check_sources
from .lora import check_lora

DIFFERENCE_MODULES = ("csrm", "concat")


@strict
class DeltaVLMConfig(PreTrainedConfig):
    r"""
    Configuration of a DeltaVLM model: a vision encoder shared by both dates, a difference module, an
    instruction-guided Q-Former and a causal language model. The defaults are the paper's sizes (EVA-CLIP ViT-g at
    224 px, a 12-layer Q-Former with 32 queries, Vicuna-7B).

    Args:
        vision_config (`dict` or [`InstructBlipVisionConfig`], *optional*):
            The vision encoder. InstructBLIP's own `initializer_range` of 1e-10, meant for loading only, is replaced
            by this configuration's, so that a model can also be trained from scratch.
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
            feature maps as they are, without parameters (the paper's ablation).
        difference_dropout (`float`, *optional*, defaults to 0.5):
            Dropout on CSRM's gate and context while training.
        spatial_position_codes (`bool`, *optional*, defaults to `False`):
            Whether fixed 2D sine/cosine codes are added to the pair features. Not in the paper; small models that are
            trained from scratch localise better with them.
        post_layernorm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the layer norm after the vision encoder, which the authors' code sets apart from the blocks'.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation for the query tokens and for every new linear layer.
        weight_sources (`list[dict]`, *optional*):
            Of a small checkpoint: where the weights are that it leaves out, see `weight_sources.py`. Its files name
            them; pass it to `from_pretrained` to read them from another place.
        language_model_lora (`dict`, *optional*):
            Settings of PEFT's `LoraConfig`, where the language model has a LoRA adapter, whose weights are then among
            the model's. `save_pretrained` fills it in, `from_pretrained` makes the adapter of it.

    Raises:
        ValueError: if a file or dict is of another model or asks for what `bounds.py` refuses, `difference_module` is
            unknown, or the vision width does not suit `spatial_position_codes`.
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
        "vision_config": InstructBlipVisionConfig,
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
    initializer_range: float = 0.02
    weight_sources: list | None = None
    language_model_lora: dict | None = None

    def __post_init__(self, **kwargs):
        given = {**vars(self), **kwargs}
        self._check({name: value for name, value in given.items() if not isinstance(value, PreTrainedConfig)})
        if self.qformer_config is None:
            self.qformer_config = {"vocab_size": 30523}
        super().__post_init__(**kwargs)
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        if self.vision_config.initializer_range == InstructBlipVisionConfig.initializer_range:
            self.vision_config.initializer_range = self.initializer_range
        if self.spatial_position_codes and self.vision_config.hidden_size % 4:
            raise ValueError(
                "`spatial_position_codes` needs a vision `hidden_size` that is a multiple of 4, got "
                f"{self.vision_config.hidden_size}."
            )
        if self.difference_module not in DIFFERENCE_MODULES:
            raise ValueError(
                f"`difference_module` is {self.difference_module!r}, expected one of {', '.join(DIFFERENCE_MODULES)}."
            )

        self.check()

    def check(self) -> None:
        """
        Refuses what cannot be built. Models call this before they make their parts.

        Raises:
            ValueError: naming the setting that cannot be.
        """
        self._check(self.to_dict())

    @staticmethod
    def _check(settings: dict[str, Any]) -> None:
        if settings.get("language_model_lora") is not None:
            check_lora(settings["language_model_lora"])
        check_sources(settings.get("weight_sources") or [])
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


__all__ = ["DeltaVLMConfig"]
