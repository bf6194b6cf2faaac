"""The shipped model and generated rows: what the training tests start from."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText

import deltavlm_hf
from deltavlm_hf.data import PairCollator, load_generated

SEED = 4_700_000


@pytest.fixture
def base(tmp_path) -> Path:
    """A folder of its own with the shipped model."""
    return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "base"))


@pytest.fixture
def tiny_model():
    """A fresh one, for training changes it."""
    return AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())


@pytest.fixture(scope="session")
def rows():
    return load_generated(4, SEED, unroll=True)


@pytest.fixture(scope="session")
def batch(rows, tiny_processor):
    """Six rows, of two pairs."""
    return PairCollator(tiny_processor)([rows[index] for index in range(6)])
