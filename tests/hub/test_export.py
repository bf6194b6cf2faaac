"""From a checkpoint to a model of its own: nothing to point to, the same answers, one report for both."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from peft_version import needs_peft
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import deltavlm_hf
from deltavlm_hf.cli import main
from deltavlm_hf.data import PairCollator, load_generated
from deltavlm_hf.hub.publishing import Publication
from deltavlm_hf.training import FreezePolicy, freeze, leave_out_frozen
from deltavlm_hf.training.quantization import four_bit_config

REPO = "someone/changes"


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()


def make_checkpoint(folder, policy=None):
    """A small checkpoint of the shipped model, whose base lies beside it."""
    base = shutil.copytree(deltavlm_hf.tiny(), folder / "base")
    model = load(base, dtype=torch.float32)
    freeze(model, policy or FreezePolicy())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.01)
    leave_out_frozen(model)
    model.save_pretrained(folder / "small")
    AutoProcessor.from_pretrained(base).save_pretrained(folder / "small")
    (folder / "small" / "training_run.json").write_text('{"model": "someone/base"}')
    (folder / "small" / "LICENSE.md").write_text("Mine")
    return folder / "small"


@pytest.fixture
def small(tmp_path):
    return make_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def batch(tiny_processor):
    return PairCollator(tiny_processor)([load_generated(1, 4_700_000, unroll=True)[0]])


def logits(folder, batch) -> torch.Tensor:
    with torch.no_grad():
        return load(folder, dtype=torch.float32)(**batch).logits


def test_it_is_whole_and_says_the_same(small, batch, tmp_path, capsys):
    expected = logits(small, batch)
    whole = tmp_path / "whole"
    assert main(["export", str(small), str(whole), "--dtype", "float32", "--max-shard-size", "4MB"]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{small} is whole in {whole}: 3,3" in said and "in float32\n" in said
    shutil.rmtree(tmp_path / "base")
    shutil.rmtree(small)
    assert torch.equal(logits(whole, batch), expected)
    assert len(list(whole.glob("model-*-of-*.safetensors"))) > 1
    assert json.loads((whole / "config.json").read_text()).get("weight_sources") is None
    assert (whole / "LICENSE.md").read_text() == "Mine" and (whole / "training_run.json").exists()
    AutoProcessor.from_pretrained(whole)


def test_any_precision(small, tmp_path):
    assert main(["export", str(small), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    full = load(small, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, full[name].bfloat16()) for name, weight in weights.items())


@needs_peft
def test_an_adapter_is_merged(batch, tmp_path, capsys):
    small = make_checkpoint(tmp_path, FreezePolicy(lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))
    expected = logits(small, batch)
    assert not torch.allclose(expected, logits(tmp_path / "base", batch))
    assert main(["export", str(small), str(tmp_path / "whole"), "--dtype", "float32"]) == 0
    assert "its LoRA adapter was merged" in capsys.readouterr().out
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config.get("language_model_lora") is None
    assert not any("lora" in name for name in load_file(tmp_path / "whole" / "model.safetensors"))
    torch.testing.assert_close(logits(tmp_path / "whole", batch), expected, rtol=1e-4, atol=1e-4)


@needs_peft
def test_the_language_model_alone(tmp_path, capsys):
    """It gives the logits that it gives inside the model, its adapter merged; with the same tokenizer and way."""
    small = make_checkpoint(tmp_path, FreezePolicy(lora={"r": 4, "target_modules": ["q_proj", "v_proj"]}))
    model = load(small, dtype=torch.float32)
    assert main(["export-llm", str(small), str(tmp_path / "llm"), "--dtype", "float32"]) == 0
    weights = sum(each.numel() for each in load(tmp_path / "base").language_model.parameters())
    said = f"language model of {small} is in {tmp_path / 'llm'}: {weights:,} weights in float32; its LoRA adapter was"
    assert said in capsys.readouterr().out
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "llm").eval()
    ids = torch.arange(600)[None]
    with torch.no_grad():
        expected = model.language_model(ids).logits
        torch.testing.assert_close(alone(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "llm").get_vocab() == (
        AutoProcessor.from_pretrained(small).tokenizer.get_vocab()
    )
    assert alone.generation_config.to_diff_dict() == model.generation_config.to_diff_dict()


def test_of_a_model_in_four_bit_there_is_no_language_model_to_export(tmp_path, capsys):
    quantised = load(deltavlm_hf.tiny(), quantization_config=four_bit_config(torch.float32))
    quantised.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(deltavlm_hf.tiny()).save_pretrained(tmp_path / "saved")
    assert main(["export-llm", str(tmp_path / "saved"), str(tmp_path / "llm")]) == 1
    assert "whose full weights are not there" in capsys.readouterr().err and not (tmp_path / "llm").exists()


def test_the_command_that_publish_names_and_the_report_of_the_checkpoint(small, tmp_path, capsys):
    """As a user goes: measured once, refused, made whole by the command that the refusal names, published."""
    evaluate = ["evaluate", "--pairs", "2", "--tasks", "binary", "--output"]
    assert main([*evaluate, str(tmp_path / "results"), str(small)]) == 0
    report = str(tmp_path / "results" / "report.json")
    publish = ["publish", REPO, "--report", report, "--dry-run"]
    capsys.readouterr()
    assert main([*publish[:1], str(small), *publish[1:]]) == 1
    refused = capsys.readouterr().err
    command = refused.partition("`deltavlm export ")[2].partition("`")[0]
    assert command.split() == [str(small), f"{small}-whole"]
    assert main(["export", *command.split()]) == 0
    whole = tmp_path / "small-whole"
    capsys.readouterr()
    assert main([*publish[:1], str(whole), *publish[1:]]) == 0
    card = capsys.readouterr().out
    assert "| yes/no accuracy |" in card and "Measured before" not in card and "| model | `someone/base` |" in card
    assert "export.json" in card.partition("Not sent: ")[2].partition("\n")[0]

    assert main(["export", str(small), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    rounded = Publication(tmp_path / "half", REPO, report).card.text
    assert "Measured before this was done: its weights were rounded to bfloat16." in rounded

    weights = load_file(whole / "model.safetensors")
    save_file({**weights, "query_tokens": weights["query_tokens"] + 1}, whole / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="not those of the folder that is to be published"):
        Publication(whole, REPO, report)
    (tmp_path / "half" / "export.json").write_text('{"of": 1}')
    with pytest.raises(ValueError, match="not those of the folder that is to be published"):
        Publication(tmp_path / "half", REPO, report)


def test_a_report_holds_wherever_checkpoint_and_base_lie(small, tmp_path):
    output = str(tmp_path / "results")
    assert main(["evaluate", str(small), "--pairs", "1", "--tasks", "binary", "--output", output]) == 0
    config = json.loads((small / "config.json").read_text())
    config["weight_sources"][0] |= {"name_or_path": "someone/base", "revision": "0" * 40}
    (small / "config.json").write_text(json.dumps(config))
    moved = small.rename(tmp_path / "elsewhere")
    assert "| yes/no accuracy |" in Publication(moved, REPO, tmp_path / "results" / "report.json").card.text
    other = json.loads((moved / "config.json").read_text())
    (digests,) = (source["digests"] for source in other["weight_sources"])
    digests.update(dict.fromkeys(digests, "sha256:" + "0" * 64))
    (moved / "config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="not those of the folder"):
        Publication(moved, REPO, tmp_path / "results" / "report.json")


def test_the_card_still_names_what_it_was_made_from(tmp_path):
    """Nothing is fetched: what the checkpoint would take from the Hub, its own file has."""
    folder = shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["weight_sources"] = [
        {"name_or_path": "someone/eyes", "revision": "0" * 40, "prefix": "vision_model.backbone."}
    ]
    config["made_from"] = [{"part": "language_model", "name": "someone/words", "license": "apache-2.0"}]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["export", str(folder), str(tmp_path / "whole")]) == 0
    card = Publication(tmp_path / "whole", REPO).card
    assert card.data.base_model == ["someone/words", "someone/eyes"]
    assert "- `someone/words`: apache-2.0, as its own card says" in card.text


def test_what_stands_there_is_left_alone(small, tmp_path, capsys):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "mine").write_text("mine")
    assert main(["export", str(small), str(tmp_path / "whole")]) == 1
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["mine"]


@pytest.mark.parametrize("dtype", ["float33", "int8", "nn"])
def test_what_is_no_precision(small, tmp_path, dtype, capsys):
    assert main(["export", str(small), str(tmp_path / "whole"), "--dtype", dtype]) == 1
    assert f"--dtype {dtype}: expected" in capsys.readouterr().err and not (tmp_path / "whole").exists()


@pytest.mark.parametrize(
    "origins",
    [
        "x",
        ["x"],
        [{"name": "/home/me/model"}],
        [{"license": "<script>"}],
        [{"license": "a\nb"}],
        [{"path": "x"}],
        [{"name": 1}],
        [{}] * 101,
    ],
    ids=lambda origins: str(origins)[:40],
)
def test_origins_that_cannot_be(origins):
    with pytest.raises(ValueError, match="made_from"):
        deltavlm_hf.DeltaVLMConfig.from_dict({"made_from": origins})


KILLED = """
import os, signal, sys
from deltavlm_hf.hub import export
def fingerprint(folder):  # of what has been written
    os.kill(os.getpid(), signal.SIGKILL)
export.fingerprint = fingerprint
export.export(*sys.argv[1:])
"""


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "an empty folder"])
def test_a_kill_leaves_no_half_of_it(small, tmp_path, is_there):
    whole = tmp_path / "whole"
    if is_there:
        whole.mkdir()
    killed = subprocess.run([sys.executable, "-c", KILLED, str(small), str(whole)], env={**os.environ})
    assert killed.returncode == -signal.SIGKILL
    assert whole.exists() == is_there and not list(whole.glob("[!.]*"))
    assert main(["export", str(small), str(whole)]) == 0
    assert (whole / "export.json").exists() and not list(tmp_path.glob(".whole*")) and not list(whole.glob(".*"))
