from .image_processing_deltavlm import DeltaVLMImageProcessor
from .processing_deltavlm import DeltaVLMProcessor

# Saved folders carry their code, so that they also load where this package is not installed.
DeltaVLMImageProcessor.register_for_auto_class()
DeltaVLMProcessor.register_for_auto_class()

__all__ = ["DeltaVLMImageProcessor", "DeltaVLMProcessor"]
