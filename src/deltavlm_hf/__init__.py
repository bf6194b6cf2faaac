"""
DeltaVLM for Transformers: ask what changed between two images of the same place.

Importing the package makes the Auto classes of transformers know DeltaVLM. Nothing heavy is imported until it is used.
"""

from importlib import import_module
from pathlib import Path

from . import auto_classes

__version__ = "0.1.0"

_MODULES = {
    "ChangeSession": "inference",
    "DeltaVLMConfig": "modeling",
    "DeltaVLMForConditionalGeneration": "modeling",
    "DeltaVLMImageProcessor": "processing",
    "DeltaVLMModel": "modeling",
    "DeltaVLMProcessor": "processing",
    "convert_original_checkpoint": "conversion",
}

__all__ = [*_MODULES, "tiny"]


def tiny() -> str:
    """
    The folder of the small model that ships with the package, for `from_pretrained`. It knows only scenes of
    [`deltavlm_hf.data.scenes`]; its purpose is to try the package out.
    """
    return str(Path(__file__).parent / "tiny_model")


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])


auto_classes.install()
