"""What conversion and composition share: the processor of parts that others made, and the folder to make."""

from pathlib import Path

import torch
from transformers import PreTrainedConfig

from ..modeling import DeltaVLMConfig
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from .sources import Source

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MAX_NEW_TOKENS = 255  # of an answer, as the authors generate: their 256 count one id that is not there


def check_output(output_dir: Source) -> Path:
    """Raises `FileExistsError` unless a folder can be made there."""
    output_dir = Path(output_dir)
    if output_dir.exists() and (
        not output_dir.is_dir() or any(not path.name.startswith(".saving-") for path in output_dir.iterdir())
    ):
        raise FileExistsError(f"{output_dir} exists already: choose another `output_dir` or remove it first.")
    return output_dir


def find_dtype(name: str) -> torch.dtype:
    """The precision of a name; `ValueError` for what is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"--dtype {name}: expected float32, bfloat16 or float16.")
    return dtype


def build_processor(tokenizer, qformer_tokenizer, config: DeltaVLMConfig, pixels=None, **kwargs) -> DeltaVLMProcessor:
    """
    The processor that belongs to a configuration, whose `image_token_id` it sets.

    Args:
        tokenizer, qformer_tokenizer: the language model's and the Q-Former's.
        config ([`DeltaVLMConfig`]): with `num_query_tokens`, the image size, and the language model's settings.
        pixels (`dict`, *optional*): of the image processor, beside its `size`.
        kwargs: of the processor.
    """
    size = {"height": config.image_size, "width": config.image_size}
    image_processor = DeltaVLMImageProcessor(size=size, **(pixels or {}))
    processor = DeltaVLMProcessor(
        image_processor, tokenizer, qformer_tokenizer, num_query_tokens=config.num_query_tokens, **kwargs
    )
    tokenizer.model_max_length = min(tokenizer.model_max_length, _longest_prompt(config.text_config))
    config.image_token_id = processor.image_token_id
    return processor


def _longest_prompt(text_config: PreTrainedConfig) -> int:
    """What leaves room for an answer of the default length, or half of what the language model can read."""
    positions = getattr(text_config, "max_position_embeddings", 2**20)  # some know no end
    return max(positions - MAX_NEW_TOKENS, positions // 2)
