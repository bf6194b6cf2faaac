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
    "stream_answers": "inference",
}

__all__ = [*_MODULES, "small", "tiny"]


def small() -> str:
    """
    The folder of the model for real imagery that ships with the package, for `from_pretrained`: it answers, and makes
    masks, about buildings in aerial images of 0.5 to 1 m per pixel like those of LEVIR-CD, which it learnt from. Its
    weights are for academic use: see README.md and LICENSE.md there, and docs/real.md for how well it does.
    """
    return str(Path(__file__).parent / "small_model")


def tiny() -> str:
    """
    The folder of the model for tests that ships with the package, for `from_pretrained`. It knows only scenes of
    [`deltavlm_hf.data.scenes`]; its purpose is to try the package out.
    """
    return str(Path(__file__).parent / "tiny_model")


__getattr__, __dir__ = lazy_names(__name__, _MODULES)

auto_classes.install(__getattr__)
