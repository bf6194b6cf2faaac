"""
DeltaVLM for Transformers: ask what changed between two images of the same place.

Importing the package makes the Auto classes of transformers know DeltaVLM. Nothing heavy is imported until it is used.
"""

from pathlib import Path

from . import auto_classes
from .lazy import lazy_names

__version__ = "0.1.0"

_MODULES = {
    "ChangeSession": "inference",
    "DeltaVLMConfig": "modeling",
    "DeltaVLMForConditionalGeneration": "modeling",
    "DeltaVLMImageProcessor": "processing",
    "DeltaVLMModel": "modeling",
    "DeltaVLMProcessor": "processing",
    "ask_pairs": "inference",
    "compose": "hub.compose",
    "convert_instructblip": "hub.conversion",
    "convert_original_checkpoint": "hub.conversion",
    "predict_mask": "inference",
    "replacing": "files",
}

__all__ = [*_MODULES, "tiny"]


def tiny() -> str:
    """
    The folder of the small model that ships with the package, for `from_pretrained`. It knows only scenes of
    [`deltavlm_hf.data.scenes`]; its purpose is to try the package out.
    """
    return str(Path(__file__).parent / "tiny_model")


__getattr__, __dir__ = lazy_names(__name__, _MODULES)

auto_classes.install(__getattr__)
