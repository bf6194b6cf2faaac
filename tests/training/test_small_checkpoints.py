"""Checkpoints that hold what trains, and point to the rest."""

import json
import shutil

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from deltavlm_hf import DeltaVLMForConditionalGeneration
from deltavlm_hf.training import FreezePolicy, freeze, leave_out_frozen


def load(folder, **kwargs) -> DeltaVLMForConditionalGeneration:
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


def same_weights(one, other) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def tuned(base):
    """The shipped model with changed weights where it trains."""
    model = load(base)
    freeze(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    return model


def test_what_is_left_out_comes_back(base, tuned, tmp_path):
    left_out = leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    saved = load_file(tmp_path / "small" / "model.safetensors")
    frozen = {name for name, parameter in tuned.named_parameters() if not parameter.requires_grad}
    assert not saved.keys() & set(left_out) and frozen <= set(left_out)
    assert same_weights(load(tmp_path / "small"), tuned)
    assert not same_weights(load(base), tuned)
    half = load(tmp_path / "small", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_a_base_named_from_one_folder_is_found_from_another(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load("base")
    freeze(model)
    leave_out_frozen(model)
    model.save_pretrained("small")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert same_weights(load("../small"), model)


def test_a_process_that_never_heard_of_it(tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    code = (
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'small')!r}, trust_remote_code=True)\n"
        "print(sum(float(weight.double().abs().sum()) for weight in model.state_dict().values()))"
    )
    expected = sum(float(weight.double().abs().sum()) for weight in tuned.state_dict().values())
    assert float(run_python(code)) == pytest.approx(expected)


def test_without_its_language_model(tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    part = AutoModel.from_pretrained(tmp_path / "small")
    assert not hasattr(part, "language_model")
    assert torch.equal(part.vision_model.post_layernorm.weight, tuned.vision_model.post_layernorm.weight)
    assert torch.equal(part.query_tokens, tuned.query_tokens)


def test_a_whole_one_on_request(base, tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "whole", only_trained=False)
    shutil.rmtree(base)
    assert same_weights(load(tmp_path / "whole"), tuned)
    assert json.loads((tmp_path / "whole" / "config.json").read_text()).get("weight_sources") is None
    loaded = load(tmp_path / "whole")
    loaded.save_pretrained(tmp_path / "again")
    assert same_weights(load(tmp_path / "again"), tuned)


def test_loaded_and_saved_again_it_is_whole(base, tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    load(tmp_path / "small").save_pretrained(tmp_path / "whole")
    shutil.rmtree(base)
    assert same_weights(load(tmp_path / "whole"), tuned)


def test_trained_further_it_points_to_the_first_base_only(base, tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    further = load(tmp_path / "small")
    freeze(further)
    leave_out_frozen(further)
    assert [source["name_or_path"] for source in further.config.weight_sources] == [str(base)]
    narrow = load(tmp_path / "small")
    freeze(narrow, FreezePolicy(vision_blocks=0, difference=False))
    leave_out_frozen(narrow)
    assert [source["name_or_path"] for source in narrow.config.weight_sources] == [str(tmp_path / "small"), str(base)]
    narrow.save_pretrained(tmp_path / "smaller")
    assert same_weights(load(tmp_path / "smaller"), narrow)


def test_a_base_that_is_gone(base, tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(OSError, match="holds only some of its model's weights") as caught:
        load(tmp_path / "small")
    assert str(base) in str(caught.value) and "weight_sources=[" in str(caught.value)
    elsewhere = [{"name_or_path": str(moved), "prefix": ""}]
    assert same_weights(load(tmp_path / "small", weight_sources=elsewhere), tuned)


def test_another_base_than_it_was_trained_on(base, tuned, tmp_path):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    weights = load_file(base / "model.safetensors")
    weights["language_model.model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those that this checkpoint was made with"):
        load(tmp_path / "small")
    changed = load(tmp_path / "small", weight_sources=[{"name_or_path": str(base)}])
    assert torch.equal(changed.language_model.model.norm.weight, weights["language_model.model.norm.weight"].float())


def test_what_differs_from_the_base_is_saved(tuned, tmp_path):
    tuned.resize_token_embeddings(len(tuned.get_input_embeddings().weight) + 3)
    freeze(tuned)
    with torch.no_grad():
        tuned.vision_model.embeddings.position_embedding.mul_(2)
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    assert same_weights(load(tmp_path / "small"), tuned)


def everywhere_but_at_the_beginning(weight: torch.Tensor) -> torch.Tensor:
    """A weight changed where a look at the first values of the first row does not see it."""
    changed = weight.detach().clone()
    (changed[1:] if changed.ndim > 1 else changed[64:]).add_(0.5)
    return changed


def last_value(weight: torch.Tensor) -> torch.Tensor:
    changed = weight.detach().clone()
    changed.view(-1)[-1] += 0.5
    return changed


@pytest.mark.parametrize("change", [everywhere_but_at_the_beginning, last_value])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_frozen_weights_that_were_changed_anywhere_are_saved(base, tmp_path, change, dtype):
    model = load(base, dtype=dtype)
    freeze(model)
    changed = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with torch.no_grad():
        for name in changed:
            model.get_parameter(name).copy_(change(model.get_parameter(name)))
    original = load(base, dtype=dtype)
    changed = {name for name in changed if not torch.equal(model.get_parameter(name), original.get_parameter(name))}
    assert len(changed) > 50
    left_out = leave_out_frozen(model)
    assert not changed & set(left_out)
    model.save_pretrained(tmp_path / "small")
    loaded = load(tmp_path / "small", dtype=dtype)
    assert all(torch.equal(loaded.get_parameter(name), model.get_parameter(name)) for name in changed)


def test_loaded_in_16_bits_it_is_still_the_base(base, tmp_path):
    """The base is in float16, another precision: what was not changed is left out, and comes back the same."""
    model = load(base, dtype=torch.bfloat16)
    freeze(model)
    left_out = set(leave_out_frozen(model))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} <= left_out
    model.save_pretrained(tmp_path / "small")
    loaded = load(tmp_path / "small", dtype=torch.bfloat16)
    assert all(torch.equal(loaded.get_parameter(name), model.get_parameter(name)) for name in left_out)


def test_weights_are_compared_in_blocks(base, monkeypatch):
    monkeypatch.setattr("deltavlm_hf.modeling.weight_sources._BLOCK", 1000)
    model = load(base)
    name = "language_model.model.embed_tokens.weight"
    with torch.no_grad():
        model.get_parameter(name)[-1, -1] += 1
    freeze(model)
    assert name not in leave_out_frozen(model)
    assert "language_model.model.layers.0.mlp.up_proj.weight" in leave_out_frozen(model)


@pytest.mark.parametrize("change", [everywhere_but_at_the_beginning, last_value])
def test_a_base_that_was_changed_anywhere(base, tuned, tmp_path, change):
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "small")
    weights = load_file(base / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: change(weights[name])}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="are not those that this checkpoint was made with"):
        load(tmp_path / "small")


def test_what_trains_only_later_is_saved(tuned, tmp_path):
    """As in a second stage, in which more trains than in the first."""
    leave_out_frozen(tuned)
    freeze(tuned, FreezePolicy(vision_blocks=-1, language_model=True))
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter.add_(0.01)
    tuned.save_pretrained(tmp_path / "small")
    assert same_weights(load(tmp_path / "small"), tuned)


def test_it_does_not_overwrite_what_it_points_to(base, tuned, tmp_path, monkeypatch):
    leave_out_frozen(tuned)
    before = (base / "model.safetensors").read_bytes()
    monkeypatch.chdir(tmp_path)
    for folder in (base, "base", "base/../base"):
        with pytest.raises(ValueError, match="would take the place of the weights there that it leaves out"):
            tuned.save_pretrained(folder)
    assert (base / "model.safetensors").read_bytes() == before
    tuned.save_pretrained(base, only_trained=False)
    assert same_weights(load(base), tuned)


def test_a_plain_language_model_as_a_source(base, tuned, tmp_path):
    """As a converted model in its small form has it: the language model is somebody else's."""
    tuned.language_model.save_pretrained(tmp_path / "llm")
    tuned.keep_out_of_checkpoints(
        [name for name in tuned.state_dict() if name.startswith("language_model.")],
        [{"name_or_path": str(tmp_path / "llm"), "prefix": "language_model."}],
    )
    tuned.save_pretrained(tmp_path / "small")
    shutil.rmtree(base)
    saved = load_file(tmp_path / "small" / "model.safetensors")
    assert not any(name.startswith("language_model.") for name in saved)
    assert same_weights(load(tmp_path / "small"), tuned)


def test_from_a_configuration_there_is_no_base(small_model):
    freeze(small_model)
    with pytest.raises(ValueError, match="was made from a configuration"):
        leave_out_frozen(small_model)
