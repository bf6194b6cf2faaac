"""LoRA adapters of the language model (PEFT), as a part of the model's own checkpoint."""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .bounds import check_name

LORA_MARK = ".lora_"  # in the names of a LoRA adapter's weights
_CIRCUMSTANCES = ("inference_mode", "base_model_name_or_path")
_MOST_NAMES = 2**14


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_integer(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and _is_number(value, least, most)


_BOOLEAN = ("true or false", lambda value: isinstance(value, bool))
# PEFT's other settings import modules by name, read files, or make weights that a checkpoint does not hold.
_NAMES = ("target_modules", "exclude_modules", "layers_pattern")
_PATTERNS = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
_VALUES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("an integer from 1 to 4096", lambda value: _is_integer(value, 1, 4096)),
    "lora_alpha": ("a number from 0 to 1000000", lambda value: _is_number(value, 0, 1e6)),
    "lora_dropout": ("a number from 0 to 1", lambda value: _is_number(value, 0, 1)),
    "bias": ("'none', 'all' or 'lora_only'", lambda value: value in ("none", "all", "lora_only")),
    "fan_in_fan_out": _BOOLEAN,
    "use_rslora": _BOOLEAN,
    "use_dora": _BOOLEAN,
    "lora_bias": _BOOLEAN,
    "init_lora_weights": (
        "true, false, 'gaussian', 'orthogonal', 'olora', 'pissa' or 'pissa_niter_N'",
        lambda value: (
            isinstance(value, bool) or bool(re.fullmatch(r"gaussian|orthogonal|olora|pissa(_niter_\d{1,3})?", value))
        ),
    ),
    "layers_to_transform": (
        "numbers of layers",
        lambda value: all(_is_integer(each, 0, 4096) for each in ([value] if isinstance(value, int) else value)),
    ),
    "task_type": ("a name", lambda value: bool(re.fullmatch(r"[A-Z_]{1,40}", value))),
    "peft_type": ("'LORA'", lambda value: value == "LORA"),
}
_FIELDS = (*_VALUES, *_NAMES, *_PATTERNS)


def without_adapter(name: str) -> str:
    """The name of a weight or module as it is where no adapter stands around it."""
    return name.replace(".base_layer", "")


def check_lora(settings: Mapping[str, Any]) -> None:
    """
    Whether LoRA settings are plain ones, of which nothing but an adapter is made.

    Raises:
        ValueError: naming the setting that is not.
    """
    for name, value in settings.items():
        if name not in _FIELDS:
            close = "".join(f" Did you mean {like!r}?" for like in difflib.get_close_matches(name, _FIELDS, 1))
            raise ValueError(
                f"The LoRA setting {name!r} is none of those of PEFT's `LoraConfig` that DeltaVLM saves and loads: "
                f"{', '.join(_FIELDS)}.{close}"
            )
        if value is None:
            continue
        if name in _NAMES:
            if name == "target_modules" and value == "all-linear":
                continue
            if not isinstance(value, list | tuple | set) or len(value) > _MOST_NAMES:
                raise ValueError(f"The LoRA setting {name!r} is {value!r:.60}, expected a list of names of modules.")
            for each in value:
                check_name(f"A name in the LoRA setting {name!r}", each)
        elif name in _PATTERNS:
            if not isinstance(value, Mapping) or len(value) > _MOST_NAMES:
                raise ValueError(f"The LoRA setting {name!r} is {value!r:.60}, expected numbers by names of modules.")
            for each, number in value.items():
                check_name(f"A name in the LoRA setting {name!r}", each)
                _check_value(name, number, *_VALUES[_PATTERNS[name]])
        else:
            _check_value(name, value, *_VALUES[name])


def _check_value(name: str, value: Any, expected: str, fits: Callable[[Any], bool]) -> None:
    try:
        fitting = fits(value)
    except TypeError:  # of another type altogether
        fitting = False
    if not fitting:
        raise ValueError(f"The LoRA setting {name!r} is {value!r:.60}, expected {expected}.")


def make_lora_config(settings: Mapping[str, Any]):
    """
    PEFT's `LoraConfig`.

    Raises:
        ImportError: without PEFT.
        ValueError: if a setting is none that can be saved and loaded again.
    """
    check_lora(settings)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ImportError("A LoRA adapter needs PEFT: pip install peft") from error
    return LoraConfig(**settings)


def check_adapter(settings: Mapping[str, Any]) -> None:
    """
    Whether an adapter's own file, `adapter_config.json` as PEFT writes it, is of a LoRA with plain settings.

    Raises:
        ValueError: naming the setting that is not.
    """
    defaults = make_lora_config({}).to_dict()
    plain = {name: value for name, value in settings.items() if value is not None and value != defaults.get(name)}
    for circumstance in (*_CIRCUMSTANCES, "auto_mapping", "peft_version", "revision", "task_type"):
        plain.pop(circumstance, None)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"It is of the kind {settings.get('peft_type')!r:.60}, expected 'LORA'.")
    check_lora(plain)


def lora_settings(adapters: dict[str, Any]) -> dict[str, Any]:
    """
    What differs from the defaults of `LoraConfig`, for `config.json`.

    Args:
        adapters (`dict`): the language model's, by name.

    Raises:
        ValueError: unless it is a single LoRA, with settings that can be loaded again.
    """
    defaults = make_lora_config({}).to_dict()
    if list(adapters) != ["default"] or adapters["default"].to_dict().keys() != defaults.keys():
        raise ValueError(
            "A language model is saved with a single LoRA adapter, named 'default'; this one has "
            f"{', '.join(f'{name!r} ({type(each).__name__})' for name, each in adapters.items())}."
        )
    settings = {name: value for name, value in adapters["default"].to_dict().items() if value != defaults[name]}
    for circumstance in (*_CIRCUMSTANCES, "init_lora_weights"):  # the weights are what they are by now
        settings.pop(circumstance, None)
    settings = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    check_lora(settings)
    return settings


def restore_lora(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """
    Puts the adapter of a checkpoint around the language model.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): loaded without it.
        weights (`dict[str, torch.Tensor]`): of the adapter, by their names in the model.

    Raises:
        ValueError: if they are not those of an adapter with the settings in the model's configuration.
    """
    # From here PEFT knows which kind of layer to put around a quantised one.
    model.language_model.is_loaded_in_4bit = getattr(model, "is_loaded_in_4bit", False)
    settings = dict(model.config.language_model_lora or {}, init_lora_weights=True)  # others change the base too
    with torch.device("meta"):  # nothing is made that the files do not hold
        model.language_model.add_adapter(make_lora_config(settings))
    expected = {name: tuple(weight.shape) for name, weight in model.state_dict().items() if LORA_MARK in name}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    if found != expected:
        differing = sorted(name for name in found.keys() | expected if found.get(name) != expected.get(name))
        raise ValueError(
            "The weights of the language model's LoRA adapter do not fit `language_model_lora` of its "
            f"configuration: {len(expected)} expected, {len(found)} found; {differing[0]} has shape "
            f"{found.get(differing[0])}, expected {expected.get(differing[0])}."
        )
    for name, weight in weights.items():
        base = model.get_submodule(name.partition(LORA_MARK)[0]).get_base_layer().weight
        weights[name] = weight.to(base.device, base.dtype if base.is_floating_point() else None)
    model.load_state_dict(weights, strict=False, assign=True)
    model.language_model.requires_grad_(False).eval()  # what is added is in training mode
