"""Folders that earlier versions saved, made by `make_saved_folder.py`: they load, and compute what they did."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

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


def test_with_its_own_code(folder, tmp_path):
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
