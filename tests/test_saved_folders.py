"""Folders that earlier versions saved, made by `make_saved_folder.py`: they load, and compute what they did."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from deltavlm_hf import DeltaVLMForConditionalGeneration

CODE = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
folder = Path(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert "deltavlm_hf" not in sys.modules and "transformers_modules" in type(model).__module__
expected = load_file(folder / "expected.safetensors")
question = json.loads((folder / "expected.json").read_text())["question"]
inputs = processor(text=[question], return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs, pixel_values=expected["pixel_values"]).logits
torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
"""


@pytest.fixture(params=sorted(FIXTURES.glob("saved_*.zip")), ids=lambda path: path.stem)
def folder(request, tmp_path) -> Path:
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path / "saved")
    return tmp_path / "saved"


def test_with_the_code_of_today(folder):
    model, information = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    expected = load_file(folder / "expected.safetensors")
    recorded = json.loads((folder / "expected.json").read_text())
    inputs = AutoProcessor.from_pretrained(folder)(text=[recorded["question"]], return_tensors="pt")
    for name in ("input_ids", "qformer_input_ids"):
        assert inputs[name].tolist() == recorded[name]
    with torch.no_grad():
        logits = model(**inputs, pixel_values=expected["pixel_values"]).logits
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)


first_version = pytest.mark.parametrize("folder", [FIXTURES / "saved_0.1.0.zip"], ids=["saved_0.1.0"], indirect=True)


@first_version
def test_its_parts_and_copies_with_the_code_of_today(folder, tmp_path):
    """Weights have other names by now: they come under these, are saved under these, and go on under these."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    part, information = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not information["missing_keys"]
    weights = load_file(folder / "model.safetensors")
    stored = weights["difference.context_difference.weight"]
    assert torch.equal(model.difference.context_delta.weight, stored)
    assert torch.equal(part.difference.context_delta.weight, stored)
    model.save_pretrained(tmp_path / "new")
    saved = load_file(tmp_path / "new" / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    resumed = DeltaVLMForConditionalGeneration(model.config)  # as `Trainer` goes on from a checkpoint
    resumed.load_state_dict(weights)
    given = DeltaVLMForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=weights)
    for copy in (resumed, given):
        assert all(torch.equal(tensor, saved[name]) for name, tensor in copy.state_dict().items())


@first_version
def test_small_checkpoints_of_the_first_version(folder, tmp_path, caplog):
    """Their digests know the beginnings of weights only."""
    base = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    small = shutil.copytree(folder, tmp_path / "small")
    trained = {"query_tokens": base["query_tokens"] + 1}
    save_file(trained, small / "model.safetensors", metadata={"format": "pt"})
    digest = "b47eca3ace48a1681f1478acb7d9c705f47fe4ccb9528fc1bfd69d620d2ae7ea"  # what the first version wrote
    source = {"name_or_path": str(folder), "prefix": "", "digests": {"model.safetensors": digest}}
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "weight_sources": [source]}))
    logging.enable_propagation()
    loaded = AutoModelForImageTextToText.from_pretrained(small).state_dict()
    logging.disable_propagation()
    assert "is of an early version" in caplog.text
    assert all(torch.equal(loaded[name], {**base, **trained}[name]) for name in base)
    weights = load_file(folder / "model.safetensors")
    weights["difference.gate_difference.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those that this checkpoint was made with"):
        AutoModelForImageTextToText.from_pretrained(small)


def test_with_its_own_code(folder, tmp_path):
    run_python(CODE, folder, HF_HOME=str(tmp_path / "home"))
