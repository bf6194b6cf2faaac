"""The converter: sources in every form, accounting for every weight, nothing half-made. Numbers are in test_parity."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import OFFICIAL
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    LlamaConfig,
)

from deltavlm_hf import DeltaVLMConfig, convert_instructblip, convert_original_checkpoint
from deltavlm_hf.cli import main


@pytest.fixture(scope="module")
def checkpoint() -> dict:
    return torch.load(OFFICIAL / "checkpoint_best.pth", weights_only=True)


@pytest.fixture
def write_checkpoint(tmp_path, checkpoint):
    """Writes the authors' checkpoint with some keys added, changed or (None) left out."""

    def write(**changes):
        state_dict = {**checkpoint["model"], **changes}
        path = tmp_path / "checkpoint.pth"
        torch.save({"model": {name: tensor for name, tensor in state_dict.items() if tensor is not None}}, path)
        return path

    return write


def test_folder_is_complete(converted):
    names = {path.name for path in converted.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= names
    assert not list(converted.parent.glob(".*"))  # the temporary folder is gone
    assert not list(converted.glob("*.bin")) and not list(converted.glob("*.pt*"))


def test_defaults_of_the_authors(model, processor):
    generation = model.generation_config
    assert (generation.num_beams, generation.repetition_penalty, generation.max_new_tokens) == (5, 1.5, 255)
    assert (generation.eos_token_id, generation.pad_token_id) == (2, 1000)
    assert (processor.normalize_text, processor.qformer_prompt) == (True, "dialogue")


def test_language_model_is_untouched(model):
    expected = AutoModelForCausalLM.from_pretrained(OFFICIAL / "llm").state_dict()
    actual = model.language_model.state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert actual[name][: len(tensor)].equal(tensor)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # but for a row for [PAD], the mean of the others
        assert len(actual[name]) == 1001
        torch.testing.assert_close(actual[name][1000], expected[name].mean(0))


def test_the_checkpoint_wins_over_the_base(model, checkpoint):
    base = torch.load(OFFICIAL / "eva_vit_base.pth", weights_only=True)
    name = "blocks.38.mlp.fc1.weight"
    assert not base[name].equal(checkpoint["model"][f"visual_encoder.{name}"])
    assert model.vision_model.encoder.layers[38].mlp.fc1.weight.equal(checkpoint["model"][f"visual_encoder.{name}"])
    assert model.vision_model.encoder.layers[36].mlp.fc1.weight.equal(base["blocks.36.mlp.fc1.weight"])


def test_base_vision_from_an_instructblip_folder(tmp_path, model, sources, official_config):
    """InstructBLIP's shards, with its Q-Former and language model beside the vision weights."""
    folder = tmp_path / "instructblip"
    folder.mkdir()
    tensors = {f"vision_model.{name}": tensor for name, tensor in model.vision_model.state_dict().items()}
    names = sorted(tensors)
    shards = {
        "model-00001-of-00003.safetensors": {name: tensors[name] for name in names[::2]},
        "model-00002-of-00003.safetensors": {
            **{name: tensors[name] for name in names[1::2]},
            "query_tokens": torch.zeros(1),
        },
        "model-00003-of-00003.safetensors": {"qformer.layernorm.weight": torch.zeros(1)},  # is not even opened
    }
    for file, content in shards.items():
        save_file(content, folder / file)
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"broken")
    index = {"weight_map": {name: file for file, content in shards.items() for name in content}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    InstructBlipConfig().save_pretrained(folder)
    output = convert_original_checkpoint(
        **{**sources, "vision": folder}, output_dir=tmp_path / "out", config=official_config
    )
    loaded = AutoModelForImageTextToText.from_pretrained(output)
    for (name, actual), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert actual.equal(expected), name


def test_a_half_precision_language_model_loads_in_half_precision(tmp_path, sources, official_config):
    llm = AutoModelForCausalLM.from_pretrained(sources["language_model"], dtype=torch.float16)
    llm.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(sources["language_model"]).save_pretrained(tmp_path / "llm")
    changed = {**sources, "language_model": tmp_path / "llm"}
    output = convert_original_checkpoint(**changed, output_dir=tmp_path / "out", config=official_config)
    assert {parameter.dtype for parameter in AutoModelForImageTextToText.from_pretrained(output).parameters()} == {
        torch.float16
    }
    full = AutoModelForImageTextToText.from_pretrained(output, dtype=torch.float32)
    trained = torch.load(sources["checkpoint"], weights_only=True)["model"]["query_tokens"]
    assert full.query_tokens.equal(trained)  # nothing was rounded on the way


def test_blocks_behind_the_last_one_used_are_dropped(tmp_path, sources, official_config):
    base = torch.load(sources["vision"], weights_only=True)
    extra = {name.replace("blocks.0.", "blocks.39."): tensor for name, tensor in base.items() if "blocks.0." in name}
    torch.save({**base, **extra, "norm.weight": torch.ones(32)}, tmp_path / "eva.pth")
    vision = tmp_path / "eva.pth"
    output = convert_original_checkpoint(
        **{**sources, "vision": vision}, output_dir=tmp_path / "out", config=official_config
    )
    assert output.is_dir()


def test_tokenizer_as_the_llm_repository_has_it(tmp_path, sources, official_config, official, processor):
    """`tokenizer.model` alone, without `tokenizer.json`."""
    assert not (sources["language_model"] / "tokenizer.json").exists()
    tokenizer = AutoTokenizer.from_pretrained(sources["language_model"])
    for prompt in official["prompts"]:
        ids = processor.tokenizer(prompt)["input_ids"]
        assert ids[0] == 2 and ids[1:] == tokenizer(prompt)["input_ids"][1:]


class TestErrors:
    def convert(self, sources, config, output_dir, **changes):
        return convert_original_checkpoint(**{**sources, **changes}, output_dir=output_dir, config=config)

    def test_unknown_key(self, tmp_path, sources, official_config, write_checkpoint):
        path = write_checkpoint(segmentation_head=torch.zeros(1))
        with pytest.raises(ValueError, match="keys that are not of DeltaVLM: segmentation_head"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=path)
        assert not (tmp_path / "out").exists()

    def test_missing_weight(self, tmp_path, sources, official_config, write_checkpoint):
        path = write_checkpoint(**{"context3.weight": None})
        with pytest.raises(ValueError, match="in none of the sources: difference.output.weight"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=path)

    def test_base_without_a_block(self, tmp_path, sources, official_config):
        base = torch.load(sources["vision"], weights_only=True)
        torch.save({name: tensor for name, tensor in base.items() if "blocks.7." not in name}, tmp_path / "eva.pth")
        with pytest.raises(ValueError, match=r"vision_model.encoder.layers.7.* and \d more"):
            self.convert(sources, official_config, tmp_path / "out", vision=tmp_path / "eva.pth")

    def test_other_sizes(self, tmp_path, sources, official_config):
        config = DeltaVLMConfig.from_dict({**official_config.to_dict(), "num_query_tokens": 16})
        with pytest.raises(ValueError, match=r"query_tokens has shape \(1, 8, 24\).* asks for \(1, 16, 24\)"):
            self.convert(sources, config, tmp_path / "out")

    def test_papers_sizes_by_default(self, tmp_path, sources):
        with pytest.raises(ValueError, match="pass the `config` that belongs to the checkpoint"):
            self.convert(sources, None, tmp_path / "out")

    @pytest.mark.parametrize("name", ["checkpoint", "vision"])
    def test_missing_source(self, name, tmp_path, sources, official_config):
        with pytest.raises(FileNotFoundError, match="nowhere.pth does not exist"):
            self.convert(sources, official_config, tmp_path / "out", **{name: tmp_path / "nowhere.pth"})

    def test_output_that_exists(self, tmp_path, sources, official_config):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep me")
        with pytest.raises(FileExistsError, match="exists already"):
            self.convert(sources, official_config, tmp_path / "out")
        assert (tmp_path / "out" / "mine.txt").read_text() == "keep me"

    def test_nothing_is_unpickled(self, tmp_path, sources, official_config):
        class Harm:
            def __reduce__(self):
                return (os.mkdir, (str(tmp_path / "harm"),))

        torch.save({"model": {"query_tokens": Harm()}}, tmp_path / "evil.pth")
        with pytest.raises(
            ValueError, match="evil.pth cannot be read as a file of weights, and nothing else is loaded"
        ):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=tmp_path / "evil.pth")
        assert not (tmp_path / "harm").exists()

    def test_truncated_checkpoint(self, tmp_path, sources, official_config):
        (tmp_path / "cut.pth").write_bytes(sources["checkpoint"].read_bytes()[:5000])
        with pytest.raises(ValueError, match="cut.pth cannot be read as a file of weights"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=tmp_path / "cut.pth")

    def test_truncated_safetensors(self, tmp_path, sources, official_config):
        (tmp_path / "vision").mkdir()
        (tmp_path / "vision" / "model.safetensors").write_bytes(b"cut short")
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            self.convert(sources, official_config, tmp_path / "out", vision=tmp_path / "vision")

    def test_half_of_a_bias(self, tmp_path, sources, official_config, write_checkpoint):
        path = write_checkpoint(**{"visual_encoder.blocks.38.attn.v_bias": None})
        with pytest.raises(ValueError, match="38.self_attn.q_bias, but not the v_bias"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=path)

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"], ids=str)
    def test_files_that_are_no_checkpoint(self, content, tmp_path, sources, official_config):
        (tmp_path / "broken.pth").write_bytes(content)
        with pytest.raises(ValueError, match="broken.pth cannot be read as a file of weights"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=tmp_path / "broken.pth")

    def test_weights_of_something_else(self, tmp_path, sources, official_config):
        torch.save({"model": {"epoch": 3}}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match="other.pth holds no weights"):
            self.convert(sources, official_config, tmp_path / "out", checkpoint=tmp_path / "other.pth")


def test_untrained_csrm_is_noticed(tmp_path, sources, official_config, write_checkpoint, caplog):
    from transformers.utils import logging

    logging.enable_propagation()
    convert_original_checkpoint(**sources, output_dir=tmp_path / "trained", config=official_config)
    assert "never been trained" not in caplog.text
    path = write_checkpoint(**{"context1.weight": torch.rand(32, 32) / 32**0.5})
    convert_original_checkpoint(**{**sources, "checkpoint": path}, output_dir=tmp_path / "out", config=official_config)
    logging.disable_propagation()
    assert "probably never been trained" in caplog.text.replace("\n", " ")


def test_a_kill_leaves_no_half_made_model(tmp_path, sources, official_config):
    """Killed while it writes: `output_dir` is absent, and a second run succeeds."""
    official_config.save_pretrained(tmp_path)
    command = [sys.executable, "-m", "deltavlm_hf", "convert", str(tmp_path / "out")]
    command += ["--config", str(tmp_path / "config.json")]
    for name, path in sources.items():
        command += [f"--{name.replace('_', '-')}", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while process.poll() is None and not list(tmp_path.glob(".out-*")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    if (tmp_path / "out").exists():  # it was quicker: then it must be whole
        AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
        shutil.rmtree(tmp_path / "out")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["image_token_id"] == 1001


class TestShardsAndPointers:
    def test_shards_hold_what_one_file_would(self, tmp_path, sources, official_config, model):
        output = convert_original_checkpoint(
            **sources, output_dir=tmp_path / "out", config=official_config, max_shard_size="400KB"
        )
        shards = list(output.glob("model-*-of-*.safetensors"))
        assert len(shards) > 2 and not (output / "model.safetensors").exists()
        for shard in shards:
            sizes = [tensor.nbytes for tensor in load_file(shard).values()]
            assert sum(sizes) <= 400_000 or len(sizes) == 1
        loaded = AutoModelForImageTextToText.from_pretrained(output)
        for (name, actual), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
            assert actual.equal(expected), name

    def test_a_small_one_points_to_its_bases(self, tmp_path, sources, official_config, model):
        base = tmp_path / "instructblip"
        base.mkdir()
        tensors = {f"vision_model.{name}": tensor for name, tensor in model.vision_model.state_dict().items()}
        save_file(tensors, base / "model.safetensors")
        shutil.copytree(sources["language_model"], tmp_path / "llm", copy_function=shutil.copyfile)
        changed = {**sources, "vision": base, "language_model": tmp_path / "llm"}
        small = convert_original_checkpoint(
            **changed, output_dir=tmp_path / "small", config=official_config, small=True
        )
        saved = load_file(small / "model.safetensors")
        trained = torch.load(sources["checkpoint"], weights_only=True)["model"]
        assert "query_tokens" in saved and "visual_encoder.blocks.38.mlp.fc1.weight" in trained
        assert "vision_model.encoder.layers.38.mlp.fc1.weight" in saved
        assert "vision_model.encoder.layers.0.mlp.fc1.weight" not in saved
        of_language_model = {name for name in saved if name.startswith("language_model.")}
        tables = {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
        assert of_language_model == tables  # they have a row more than the language model's own
        loaded = AutoModelForImageTextToText.from_pretrained(small)
        for (name, actual), expected in zip(loaded.named_parameters(), model.parameters(), strict=True):
            assert actual.equal(expected), name
        tensors["vision_model.post_layernorm.bias"] = torch.ones(32)
        save_file(tensors, base / "model.safetensors")
        with pytest.raises(ValueError, match="are not those that this checkpoint was made with"):
            AutoModelForImageTextToText.from_pretrained(small)

    def test_a_small_one_cannot_point_to_a_file(self, tmp_path, sources, official_config):
        with pytest.raises(ValueError, match="which .*eva_vit_base.pth is not: give InstructBLIP"):
            convert_original_checkpoint(**sources, output_dir=tmp_path / "out", config=official_config, small=True)


MEASURED = """
import sys, threading
from pathlib import Path

def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) // 1024

import deltavlm_hf, deltavlm_hf.hub.conversion
source, output = sys.argv[1:]
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.005):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
deltavlm_hf.convert_instructblip(source, output_dir=output, max_shard_size="32MB")
done.set()
watcher.join()
print(before, peak)
"""


@pytest.fixture
def make_instructblip(tmp_path, sources, processor):
    """Transformers' own InstructBLIP with random weights and the tokenizers of a real one's kind: its folder."""

    def make(**text) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(sources["language_model"], pad_token="</s>")
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = InstructBlipConfig(
            vision_config={**sizes, "image_size": 56, "patch_size": 14, "initializer_range": 0.02},
            qformer_config={**sizes, "vocab_size": len(processor.qformer_tokenizer), "hidden_size": 24},
            text_config=LlamaConfig(**{**sizes, "vocab_size": len(tokenizer), **text}, pad_token_id=2),
            num_query_tokens=8,
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        )
        torch.manual_seed(0)
        model = InstructBlipForConditionalGeneration(config)
        torch.nn.init.normal_(model.query_tokens)
        folder = tmp_path / "instructblip"
        model.save_pretrained(folder, max_shard_size="100MB")
        tokenizer.save_pretrained(folder)
        processor.qformer_tokenizer.save_pretrained(folder / "qformer_tokenizer")
        return folder

    return make


class TestInstructBlip:
    @pytest.mark.parametrize("small", [False, True])
    def test_of_two_equal_images_it_says_what_instructblip_says(self, tmp_path, make_instructblip, pairs, small):
        folder = make_instructblip()
        output = convert_instructblip(folder, output_dir=tmp_path / "out", small=small)
        ours = AutoModelForImageTextToText.from_pretrained(output)
        theirs = InstructBlipForConditionalGeneration.from_pretrained(folder)
        image = pairs[0][0]
        inputs = AutoProcessor.from_pretrained(output)(
            images=(image, image), text="What changed here?", return_tensors="pt"
        )
        with torch.no_grad():
            expected = theirs(**{**inputs, "pixel_values": inputs["pixel_values"][:, 0]}).logits
            same = ours(**inputs).logits
            torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-5)
            pixel_values = torch.stack([inputs["pixel_values"][:, 0], -inputs["pixel_values"][:, 0]], 1)
            other = ours(**{**inputs, "pixel_values": pixel_values}).logits
            assert (other - expected).abs().max() > 10 * (same - expected).abs().max()

    def test_its_csrm_learns(self, tmp_path, make_instructblip, pairs):
        """It begins as if it were not there, but every layer gets a gradient once the output layer has moved."""
        output = convert_instructblip(make_instructblip(), output_dir=tmp_path / "out")
        model = AutoModelForImageTextToText.from_pretrained(output).train()
        inputs = AutoProcessor.from_pretrained(output)(
            images=pairs[0], text="What changed?", answers="nothing", return_tensors="pt"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model(**inputs).loss.backward()
            optimizer.step()
        assert all(weight.grad.any() for weight in model.difference.parameters())

    def test_a_small_one_points_there(self, tmp_path, make_instructblip):
        folder = make_instructblip()
        output = convert_instructblip(folder, output_dir=tmp_path / "out", small=True)
        saved = load_file(output / "model.safetensors")
        assert saved and all(name.startswith("difference.") for name in saved)
        (source,) = json.loads((output / "config.json").read_text())["weight_sources"]
        assert source["name_or_path"] == str(folder)

    def test_memory_holds_one_shard_at_a_time(self, tmp_path, make_instructblip):
        """A language model of 0.9 GB in files of 100 MB, through a limit of 32 MB."""
        folder = make_instructblip(hidden_size=1024, intermediate_size=4096, num_hidden_layers=14)
        before, peak = map(int, run_python(MEASURED, folder, tmp_path / "out").split()[-2:])
        written = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) >> 20
        assert written > 800 and peak - before < 250

    def test_something_else(self, tmp_path, sources):
        with pytest.raises(ValueError, match="is a 'llama', expected an InstructBLIP"):
            convert_instructblip(sources["language_model"], output_dir=tmp_path / "out")
        with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
            convert_instructblip(tmp_path / "nowhere", output_dir=tmp_path / "out")


@pytest.mark.parametrize(
    "given, message",
    [
        (["--checkpoint", "x.pth", "--vision", "y"], "add --language-model, --qformer-tokenizer"),
        (["--instructblip", "x", "--vision", "y"], "holds all parts itself: leave out --vision"),
    ],
)
def test_sources_that_do_not_go_together(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(tmp_path / "out"), *given])
    assert message in capsys.readouterr().err
