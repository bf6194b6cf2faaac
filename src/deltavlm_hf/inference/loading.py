"""A model with its processor, from a folder or the Hub: what the commands load. Errors name their options."""

import os
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils.hub import resolve_revision

from .. import small, tiny
from ..auto_classes import MODEL_TYPE
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .remote import move_language_model

# The models inside the package, and what is to be known where they answer.
SHIPPED = {"small": small, "tiny": tiny}
NOTES = {
    "small": "the small model inside the package learnt buildings from aerial images of one region (LEVIR-CD: Texas, "
    "0.5 to 1 m per pixel; academic use only) and roads from drawings alone: elsewhere its answers can be far off.",
    "tiny": "the tiny model inside the package knows only drawings: about real imagery its answers mean nothing.",
}


def find_source(name: str) -> str:
    """What `from_pretrained` takes for a model's name: for `small` and `tiny` the folders inside the package."""
    return SHIPPED[name]() if name in SHIPPED else str(name)


def name_model(source: str) -> str:
    """What a model is called, without where it lies: the name of one inside the package, a folder's, a Hub id."""
    short = {folder(): name for name, folder in SHIPPED.items()}
    return short.get(source) or (os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else source)


def load_model(
    name: str = "small",
    device: str = "auto",
    dtype: str = "auto",
    quantization_config: Any = None,
    llm_url: str | None = None,
) -> tuple[DeltaVLMForConditionalGeneration, DeltaVLMProcessor]:
    """
    Loads a model and its processor, both of one commit.

    Args:
        name (`str`, *optional*, defaults to `"small"`): a folder or Hub id, or one of [`SHIPPED`].
        device (`str`, *optional*, defaults to `"auto"`): `cpu`, `cuda`, `cuda:1`, ...
        dtype (`str`, *optional*, defaults to `"auto"`): the precision, by default as saved.
        quantization_config (*optional*): such as [`four_bit_config`]'s.
        llm_url (`str`, *optional*): of vLLM's API, where the language model is, see [`move_language_model`]: of the
            weights of the one in the model's own files only the embeddings stay, and the others never reach a GPU.

    Raises:
        ConnectionError: if nothing answers at `llm_url`.
        ValueError: if there is no such device, or no such model: whatever transformers raises then, the message names
            the model.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: no CUDA device is available; use --device cpu")
    source = find_source(name)
    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    try:
        revision = resolve_revision(source)  # of a Hub id: one commit for all
        model_type = AutoConfig.from_pretrained(source, revision=revision).model_type
        if model_type != MODEL_TYPE:
            raise ValueError(f"expected a {MODEL_TYPE} model, got {model_type}")
        processor = AutoProcessor.from_pretrained(source, revision=revision)
        model = AutoModelForImageTextToText.from_pretrained(
            source, device_map=device if llm_url is None else "cpu", dtype=dtype, revision=revision, **options
        )
    except Exception as error:  # transformers raises all kinds, and does not always name what it looked for
        reason = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"--model {source}: {reason}") from error
    if llm_url is not None:
        move_language_model(model, llm_url)
        model.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    return model, processor
