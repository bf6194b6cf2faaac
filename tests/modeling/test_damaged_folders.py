"""Folders that are damaged, incomplete or of another model, and saving that cannot be finished."""

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the small model that may be damaged."""
    return Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model"))


def change_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class TestLoading:
    @pytest.mark.parametrize("kind", [DeltaVLMForConditionalGeneration, DeltaVLMModel, AutoModelForImageTextToText])
    @pytest.mark.parametrize("size", [0, 7, 1000, 1_000_000])
    def test_truncated_weights(self, size, kind, folder):
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:size])
        with pytest.raises(ValueError, match=f"{folder / WEIGHTS} cannot be read as a file of weights, get it anew"):
            kind.from_pretrained(folder)

    def test_one_truncated_shard(self, folder):
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)
        model.save_pretrained(folder, max_shard_size="5MB")
        shard = sorted(folder.glob("model-0*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:5000])
        with pytest.raises(ValueError, match=f"{shard} cannot be read"):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)
        shard.unlink()
        with pytest.raises(OSError, match=shard.name):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)

    def test_no_weights(self, folder):
        (folder / WEIGHTS).unlink()
        with pytest.raises(OSError, match=f"{WEIGHTS}.* {folder}"):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)

    def test_a_weight_that_is_not_there(self, folder):
        change_weights(folder, lambda weights: weights.pop("query_tokens"))
        with pytest.raises(ValueError, match="1 of the model's weights are not in its files, among them query_tokens"):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)
        DeltaVLMForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_a_weight_of_another_shape(self, folder):
        change_weights(folder, lambda weights: weights.update(query_tokens=torch.ones(1, 3, 128)))
        expected = r"query_tokens has shape \(1, 3, 128\), but the configuration asks for \(1, 32, 128\)"
        with pytest.raises(ValueError, match=expected):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)
        DeltaVLMForConditionalGeneration.from_pretrained(folder, ignore_mismatched_sizes=True)

    def test_without_its_language_model(self, folder, tmp_path):
        DeltaVLMModel.from_pretrained(folder).save_pretrained(tmp_path / "eyes")
        DeltaVLMModel.from_pretrained(tmp_path / "eyes")
        with pytest.raises(ValueError, match="not in its files, among them language_model"):
            DeltaVLMForConditionalGeneration.from_pretrained(tmp_path / "eyes")

    @pytest.mark.parametrize("content", ["", "{", "[]", "null", "3", "{}", '{"model_type": 3}'])
    def test_a_broken_configuration(self, content, folder):
        (folder / "config.json").write_text(content)
        with pytest.raises((ValueError, OSError), match=str(folder)):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_query_tokens": 16},
            {"num_query_tokens": -1},
            {"num_query_tokens": "many"},
            {"vision_config": []},
            {"text_config": {"model_type": "nope"}},
            {"text_config": {"model_type": "t5"}},
            {"weight_sources": [{}]},
            {"dtype": "float31"},
            {"language_model_lora": {"ranks": 3}},
        ],
        ids=str,
    )
    def test_settings_that_cannot_be(self, changes, folder):
        change_config(folder, **changes)
        with pytest.raises(ValueError, match=f"{folder} cannot be loaded as a DeltaVLMForConditionalGeneration"):
            DeltaVLMForConditionalGeneration.from_pretrained(folder)

    def test_a_configuration_of_another_model(self):
        with pytest.raises(ValueError, match="the configuration of a 'deltavlm' model, got a 'llama'"):
            DeltaVLMConfig.from_dict(LlamaConfig().to_dict())

    @pytest.mark.parametrize("kind", [DeltaVLMForConditionalGeneration, DeltaVLMModel])
    @pytest.mark.parametrize("foreign", ["bert", "llama"])
    def test_foreign_checkpoints(self, foreign, kind, tmp_path):
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        if foreign == "bert":
            model = BertModel(BertConfig(**sizes))
        else:
            model = LlamaForCausalLM(LlamaConfig(**sizes))
        model.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"{tmp_path} cannot be loaded as a .* got a '{foreign}'"):
            kind.from_pretrained(tmp_path)

    def test_nan_in_weights_is_told_at_the_first_answer(self, folder, small_inputs):
        change_weights(folder, lambda weights: weights["query_tokens"].fill_(float("nan")))
        model = DeltaVLMForConditionalGeneration.from_pretrained(folder)  # which reads no weight twice
        inputs = {
            "input_ids": torch.tensor([[3] * 32 + [1]]),
            "qformer_input_ids": torch.tensor([[1]]),
            "pixel_values": torch.zeros(1, 2, 3, 96, 96),
        }
        with pytest.raises(ValueError, match="scores are NaN or infinite"):
            model.generate(**inputs)


SAVE = """
import resource, sys
import deltavlm_hf
from deltavlm_hf import DeltaVLMForConditionalGeneration
folder, shard, limit = sys.argv[1:]
model = DeltaVLMForConditionalGeneration.from_pretrained(deltavlm_hf.tiny())
model.query_tokens.data += 1
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
try:
    model.save_pretrained(folder, max_shard_size=shard)
except OSError as error:
    print(error)
"""


def save_elsewhere(*arguments) -> str:
    command = [sys.executable, "-c", SAVE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


class TestSaving:
    @pytest.mark.parametrize("shard", ["50GB", "5MB"])
    def test_a_disk_that_lets_no_more_in(self, shard, tmp_path):
        """The system refuses to write more: the old model is there as it was."""
        model = DeltaVLMForConditionalGeneration.from_pretrained(deltavlm_hf.tiny())
        model.save_pretrained(tmp_path, max_shard_size=shard)
        before = contents(tmp_path)
        assert f"cannot be written to '{tmp_path}'" in save_elsewhere(tmp_path, shard, 100_000)
        assert contents(tmp_path) == before and len(list(tmp_path.iterdir())) == len(before)
        assert save_elsewhere(tmp_path, shard, resource.RLIM_INFINITY) == ""
        assert contents(tmp_path) != before

    def test_a_full_disk(self, tmp_path):
        """A file system of its own, with room for one model and a half."""
        mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(tmp_path)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a file system needs root")
        try:
            model = DeltaVLMForConditionalGeneration.from_pretrained(deltavlm_hf.tiny())
            model.save_pretrained(tmp_path)
            before = contents(tmp_path)
            assert "No space left on device" in save_elsewhere(tmp_path, "50GB", resource.RLIM_INFINITY)
            assert contents(tmp_path) == before
        finally:
            subprocess.run(["umount", str(tmp_path)], check=True)

    def test_no_permission(self, small_model):
        with tempfile.TemporaryDirectory() as folder, as_nobody():
            with pytest.raises(PermissionError, match=folder):
                small_model.save_pretrained(Path(folder) / "model")

    def test_below_a_file(self, small_model, tmp_path):
        (tmp_path / "file").write_text("mine")
        for place in ("file", "file/model"):
            with pytest.raises(OSError, match=f"{tmp_path}/file"):
                small_model.save_pretrained(tmp_path / place)
        assert (tmp_path / "file").read_text() == "mine"

    def test_shards_take_the_place_of_one_file_and_the_other_way_round(self, small_model, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        for size in ("50GB", "100KB", "50KB", "50GB"):
            small_model.query_tokens.data += 1
            small_model.save_pretrained(tmp_path, max_shard_size=size)
            loaded = DeltaVLMForConditionalGeneration.from_pretrained(tmp_path)
            assert loaded.query_tokens.equal(small_model.query_tokens)
        assert [path.name for path in tmp_path.glob("*.safetensors*")] == [WEIGHTS]
        assert (tmp_path / "mine.txt").read_text() == "mine"


@contextmanager
def as_nobody():
    """Without root's right to write anywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
