"""Four pairs to write about, and the endpoint that is asked."""

import json

import numpy as np
import pytest
from local_endpoint import KEY, Endpoint
from PIL import Image

from deltavlm_hf.data import find_pairs
from deltavlm_hf.data.writing import Settings, write_dataset


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def pairs(tmp_path):
    """Four pairs with captions and masks; the last has no mask."""
    root = tmp_path / "levir"
    (root / "train" / "label").mkdir(parents=True)
    names = ["a", "b", "c", "d"]
    mask = np.zeros((60, 60), np.uint8)
    mask[2:12, 2:12] = 255
    for name in names[:3]:
        Image.fromarray(mask).save(root / "train" / "label" / f"{name}.png")
    captions = {f"{name}.png": [f"a house is built in scene {name}"] for name in names}
    (root / "captions.json").write_text(json.dumps(captions))
    return find_pairs(root, root / "captions.json")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def write(endpoint, pairs, tmp_path):
    def write(folder: str = "out", *, max_tokens=None, tasks=("open", "dialogue"), again=False, **settings):
        return write_dataset(
            pairs,
            tmp_path / folder,
            Settings(**{"model": "m", "retries": 1, "timeout": 5, **settings}),
            base_url=endpoint.url,
            tasks=tasks,
            max_tokens=max_tokens,
            retry_set_aside=again,
        )

    return write
