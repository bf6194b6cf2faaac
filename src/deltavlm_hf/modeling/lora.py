"""LoRA adapters of the language model (PEFT), as a part of the model's own checkpoint."""

import difflib
from dataclasses import fields
from typing import Any

IN_NAMES = ".lora_"  # of a LoRA adapter's weights


def without_adapter(name: str) -> str:
    """The name of a weight or module as it is where no adapter stands around it."""
    return name.replace(".base_layer", "")


def make_lora_config(settings: dict[str, Any]):
    """
    PEFT's `LoraConfig`.

    Raises:
        ImportError: without PEFT.
        ValueError: if it does not know a setting.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("A LoRA adapter needs PEFT: pip install peft") from error
    known = [field.name for field in fields(LoraConfig)]
    for name in settings.keys() - set(known):
        close = "".join(f" Did you mean {like!r}?" for like in difflib.get_close_matches(name, known, 1))
        raise ValueError(f"LoRA settings are the fields of PEFT's `LoraConfig`, and {name!r} is none of them.{close}")
    return LoraConfig(**settings)


def lora_settings(adapters: dict[str, Any]) -> dict[str, Any]:
    """
    What differs from the defaults of `LoraConfig`, for `config.json`.

    Args:
        adapters (`dict`): the language model's, by name.

    Raises:
        ValueError: unless it is a single LoRA.
    """
    defaults = make_lora_config({}).to_dict()
    if list(adapters) != ["default"] or adapters["default"].to_dict().keys() != defaults.keys():
        raise ValueError(
            "A language model is saved with a single LoRA adapter, named 'default'; this one has "
            f"{', '.join(f'{name!r} ({type(each).__name__})' for name, each in adapters.items())}."
        )
    settings = {name: value for name, value in adapters["default"].to_dict().items() if value != defaults[name]}
    for circumstance in ("inference_mode", "base_model_name_or_path"):
        settings.pop(circumstance, None)
    return {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
