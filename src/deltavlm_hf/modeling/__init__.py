from ..auto_classes import register
from .configuration_deltavlm import DeltaVLMConfig
from .modeling_deltavlm import DeltaVLMForConditionalGeneration, DeltaVLMModel

# Saved folders carry their code, so that they also load where this package is not installed.
DeltaVLMConfig.register_for_auto_class()
DeltaVLMModel.register_for_auto_class("AutoModel")
DeltaVLMForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

register()

__all__ = ["DeltaVLMConfig", "DeltaVLMForConditionalGeneration", "DeltaVLMModel"]
