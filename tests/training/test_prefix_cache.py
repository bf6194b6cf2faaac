"""States of the frozen vision blocks: kept by content and weights, whole or not at all."""

import multiprocessing
import pickle
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor

import deltavlm_hf
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.data.rows import undecoded
from deltavlm_hf.training import FreezePolicy, PrefixCache, freeze

SEED = 4_900_000


@pytest.fixture
def frozen(tiny_model):
    freeze(tiny_model)
    return tiny_model


@pytest.fixture(scope="module")
def pairs():
    return load_generated(5, SEED)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)]
)
def test_cached_states_give_the_same_features_and_gradients(frozen, tiny_processor, pairs, tmp_path, dtype, tolerance):
    cache = PrefixCache(tmp_path, frozen, tiny_processor, dtype)
    assert cache.first_block == 3
    assert cache.fill(pairs) == 10 == len(cache)
    rows = [undecoded(pairs)[index] for index in (0, 7, 14)]
    cached = PairCollator(tiny_processor, cache)(rows)
    plain = PairCollator(tiny_processor)([pairs[index] for index in (0, 7, 14)])
    assert "pixel_values" not in cached
    assert cached["vision_states"].shape == (3, 2, 145, 128) and cached["vision_states"].dtype == dtype
    losses = [frozen(**batch).loss for batch in (cached, plain)]
    torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
    gradients = []
    for loss in losses:
        frozen.zero_grad()
        loss.backward()
        gradients.append(frozen.vision_model.encoder.layers[3].mlp.fc1.weight.grad.clone())
    scale = gradients[1].abs().max()
    torch.testing.assert_close(gradients[0] / scale, gradients[1] / scale, rtol=tolerance, atol=5 * tolerance)


def test_each_image_is_computed_once(frozen, tiny_processor, pairs, tmp_path):
    assert PrefixCache(tmp_path, frozen, tiny_processor).fill(pairs.select(range(12))) == 4
    again = PrefixCache(tmp_path, frozen, tiny_processor)
    assert len(again) == 4
    assert again.fill(pairs) == 6  # a pair has six rows
    assert again.fill(pairs) == 0
    state = (tmp_path / again.folder / "states.bin").stat().st_size
    assert state == 10 * 145 * 128 * 2


def test_a_processor_that_was_saved_finds_the_same_states(frozen, tiny_processor, pairs, tmp_path):
    cache = PrefixCache(tmp_path, frozen, AutoProcessor.from_pretrained(deltavlm_hf.tiny()))
    tiny_processor.save_pretrained(tmp_path / "saved")
    for processor in (tiny_processor, AutoProcessor.from_pretrained(tmp_path / "saved")):
        assert PrefixCache(tmp_path, frozen, processor).folder == cache.folder
    tiny = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    tiny.image_processor.image_mean = [0.0, 0.0, 0.0]
    assert PrefixCache(tmp_path, frozen, tiny).folder != cache.folder


def test_other_weights_precision_or_preprocessing_are_kept_apart(frozen, tiny_processor, pairs, tmp_path):
    cache = PrefixCache(tmp_path, frozen, tiny_processor)
    cache.fill(pairs)
    folders = {cache.folder}
    folders.add(PrefixCache(tmp_path, frozen, tiny_processor, torch.float16).folder)
    with torch.no_grad():
        frozen.vision_model.encoder.layers[4].mlp.fc1.weight.add_(1)  # trains: no matter
    assert PrefixCache(tmp_path, frozen, tiny_processor).folder == cache.folder
    with torch.no_grad():
        frozen.vision_model.encoder.layers[1].mlp.fc1.weight[0, 0] += 1
    folders.add(PrefixCache(tmp_path, frozen, tiny_processor).folder)
    freeze(frozen, FreezePolicy(vision_blocks=1))
    folders.add(PrefixCache(tmp_path, frozen, tiny_processor).folder)
    assert len(folders) == 4
    assert len(PrefixCache(tmp_path, frozen, tiny_processor)) == 0


def test_what_goes_to_worker_processes_is_small(frozen, tiny_processor, pairs, tmp_path):
    """Neither the model nor the states: these are read where they are needed."""
    cache = PrefixCache(tmp_path, frozen, tiny_processor, torch.float32)
    cache.fill(pairs)
    pickled = pickle.dumps(PairCollator(tiny_processor, cache))
    assert len(pickled) < len(pickle.dumps(PairCollator(tiny_processor))) + 2000
    rows = [undecoded(pairs)[index] for index in (0, 7)]
    copy = pickle.loads(pickled)
    assert torch.equal(copy(rows)["vision_states"], cache(rows))
    with pytest.raises(ValueError, match="only reads: fill it where its model is"):
        copy.vision_cache.fill(pairs)


@pytest.mark.slow
def test_worker_processes_that_start_anew(frozen, tiny_processor, pairs, tmp_path, monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.chdir(tmp_path)
    cache = PrefixCache("states", frozen, tiny_processor, torch.float32)
    cache.fill(pairs)
    rows = undecoded(pairs).select(range(4))
    loader = DataLoader(
        rows,
        batch_size=2,
        collate_fn=PairCollator(tiny_processor, cache),
        num_workers=1,
        multiprocessing_context="spawn",
    )
    found = torch.cat([batch["vision_states"] for batch in loader])
    assert torch.equal(found, cache(list(rows)))


def test_several_ranks_open_it_at_once(frozen, tiny_processor, tmp_path):
    """In 16 of 100 runs of four, they once left a journal that nobody could open again."""
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(4)

    def open_all():
        for number in range(25):
            barrier.wait()
            PrefixCache(tmp_path / str(number), frozen, tiny_processor)

    ranks = [fork.Process(target=open_all) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    for number in range(25):
        cache = PrefixCache(tmp_path / str(number), frozen, tiny_processor)
        assert (cache.folder / "images.jsonl").read_text().count("\n") == 1


def test_where_nothing_stays_the_same_it_is_refused(tiny_model, tiny_processor, tmp_path):
    freeze(tiny_model, FreezePolicy(vision_blocks=-1))
    with pytest.raises(ValueError, match="no vision states to cache: the first vision block or the embeddings train"):
        PrefixCache(tmp_path, tiny_model, tiny_processor)
    freeze(tiny_model)
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16, not torch.int8"):
        PrefixCache(tmp_path, tiny_model, tiny_processor, torch.int8)


KILLED = """
import os, signal, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
import deltavlm_hf
from deltavlm_hf.data import load_generated
from deltavlm_hf.training import PrefixCache, freeze

model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
freeze(model)
cache = PrefixCache(sys.argv[1], model, AutoProcessor.from_pretrained(deltavlm_hf.tiny()))
seen = []
def kill(module, inputs, output):
    seen.append(1)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
model.vision_model.encoder.layers[2].register_forward_hook(kill)
cache.fill(load_generated(5, int(sys.argv[2])), batch_size=2)
"""


def test_killed_while_filling(frozen, tiny_processor, pairs, tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(SEED)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    cache = PrefixCache(tmp_path, frozen, tiny_processor)
    assert len(cache) == 4
    with (cache.folder / "states.bin").open("ab") as file:
        file.write(b"half of a state")  # as if the kill had come within a write
    assert cache.fill(pairs) == 6
    whole = PrefixCache(tmp_path / "other", frozen, tiny_processor)
    whole.fill(pairs)
    rows = list(undecoded(pairs))
    torch.testing.assert_close(cache(rows).float(), whole(rows).float(), rtol=2e-2, atol=1e-2)
