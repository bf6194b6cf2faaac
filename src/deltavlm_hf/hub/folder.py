"""The folder that a conversion makes: every weight checked against the configuration, then written shard by shard."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..data.words import shorten
from ..files import making
from ..modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from ..modeling.weight_sources import first_values, shape
from ..processing import DeltaVLMProcessor
from .sources import Origin, Weights


def embedding_names(text_config: PreTrainedConfig) -> list[str]:
    """The names of the language model's embeddings: of what it reads, and of what it writes."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config)
    names = {module: name for name, module in llm.named_modules()}
    return [
        f"language_model.{names[table]}.weight" for table in (llm.get_input_embeddings(), llm.get_output_embeddings())
    ]


def _check_against(model: DeltaVLMForConditionalGeneration, weights: Weights) -> None:
    expected = model.state_dict()
    for name, weight in weights.items():
        if name in expected and shape(weight) != tuple(expected[name].shape):
            raise ValueError(
                f"{name} has shape {shape(weight)}, but the configuration asks for {tuple(expected[name].shape)}: "
                "pass the `config` that belongs to the checkpoint."
            )
    missing = [name for name in expected if name not in weights and name not in model.all_tied_weights_keys]
    if missing:
        raise ValueError(
            f"Weights of the model are in none of the sources: {shorten(missing)}. Is `vision` the encoder that the "
            "checkpoint was trained from, and do the sizes of `config` agree with it?"
        )
    unexpected = [name for name in weights if name not in expected]
    if unexpected:
        raise ValueError(f"The configuration has no place for these weights: {shorten(unexpected)}.")


def write_folder(
    weights: Weights,
    config: DeltaVLMConfig,
    processor: DeltaVLMProcessor,
    generation: GenerationConfig,
    output_dir: Path,
    pointed_at: list[Origin],
    max_shard_size: int | str,
) -> None:
    """
    Writes apart and renames, so that an interrupted run leaves no half-made model. Each weight keeps the precision of
    its source; `dtype`, the language model's, is what all of them are loaded in unless asked otherwise.
    """
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    _check_against(model, weights)
    config.dtype = _dtype(weights[embedding_names(config.text_config)[0]])
    config.architectures = [type(model).__name__]
    sources = []
    for origin in pointed_at:
        left_out = {name for name, weight in weights.items() if weight is origin.weights.get(name)}
        sources.append(origin.pointer(left_out))
        weights = {name: weight for name, weight in weights.items() if name not in left_out}
    config.weight_sources = sources or None
    with making(output_dir) as new:
        save_without_weights(config, processor, Path(new))
        generation.save_pretrained(new)
        _write_shards(weights, Path(new), max_shard_size)


def save_without_weights(config: DeltaVLMConfig, processor: DeltaVLMProcessor, folder: Path) -> None:
    """Writes configuration, processor and the code that both name, so that the folder loads without this package."""
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    custom_object_save(model, folder)
    config.auto_map = dict(model.auto_map)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_shards(weights: Weights, folder: Path, max_shard_size: int | str) -> None:
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: math.prod(shape(weight)) * _dtype(weight).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name][...].contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _dtype(weight: Any) -> torch.dtype:
    return first_values(weight).dtype
