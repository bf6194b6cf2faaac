"""
Registration with the Auto classes of transformers, put off until one of them meets a DeltaVLM model.

The public `register` calls need the classes themselves, hence torch: seconds that `import deltavlm_hf` should not
cost. So names alone are announced, in the tables where transformers lists its own models. Whoever looks such a name
up is led to `deltavlm_hf.modeling`, which calls [`register`] when it is imported.
"""

import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPE = "deltavlm"
ANNOUNCED_MODULE = f"transformers.models.{MODEL_TYPE}"
# The modules of transformers that hold the tables: the first makes them, the second copies one.
TABLES: dict[str, dict[str, str | dict[str, str]]] = {
    "transformers.models.auto.auto_mappings": {
        "CONFIG_MAPPING_NAMES": "DeltaVLMConfig",
        "PROCESSOR_MAPPING_NAMES": "DeltaVLMProcessor",
        "IMAGE_PROCESSOR_MAPPING_NAMES": {"pil": "DeltaVLMImageProcessor"},
    },
    "transformers.models.auto.configuration_auto": {"CONFIG_MAPPING_NAMES": "DeltaVLMConfig"},
}


def register() -> None:
    """Registers DeltaVLM's classes with every Auto class that can load them."""
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel
    from .processing import DeltaVLMImageProcessor, DeltaVLMProcessor

    AutoConfig.register(MODEL_TYPE, DeltaVLMConfig, exist_ok=True)
    AutoModel.register(DeltaVLMConfig, DeltaVLMModel, exist_ok=True)
    AutoModelForImageTextToText.register(DeltaVLMConfig, DeltaVLMForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(DeltaVLMConfig, DeltaVLMForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(DeltaVLMConfig, image_processor_classes={"pil": DeltaVLMImageProcessor}, exist_ok=True)
    AutoProcessor.register(DeltaVLMConfig, DeltaVLMProcessor, exist_ok=True)


def _announce(module: ModuleType) -> None:
    for table, class_name in TABLES[module.__name__].items():
        if table in vars(module):  # the tables are transformers' own affair: without one, `register` has to do
            vars(module)[table][MODEL_TYPE] = class_name


class _AnnouncingLoader(Loader):
    """Loads a module of tables as ever, then adds to it."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _announce(module)


class _AnnouncedLoader(Loader):
    """Makes `transformers.models.deltavlm`: the classes of this package, imported when asked for."""

    def __init__(self, get_class: Callable[[str], type]):
        self.get_class = get_class

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = self.get_class


class _Finder(MetaPathFinder):
    def __init__(self, get_class: Callable[[str], type]):
        self.get_class = get_class

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        if name == ANNOUNCED_MODULE:
            return ModuleSpec(name, _AnnouncedLoader(self.get_class))
        if name in TABLES:
            spec = PathFinder.find_spec(name, path)
            if spec is not None and spec.loader is not None:
                spec.loader = _AnnouncingLoader(spec.loader)
            return spec
        return None


def install(get_class: Callable[[str], type]) -> None:
    """
    Announces DeltaVLM in the tables that are loaded already, and in the others as soon as they are.

    Args:
        get_class (`Callable[[str], type]`): imports a class of this package by its name.
    """
    sys.meta_path.insert(0, _Finder(get_class))
    for name in TABLES:
        if name in sys.modules:
            _announce(sys.modules[name])
