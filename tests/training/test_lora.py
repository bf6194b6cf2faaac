"""A LoRA adapter on the frozen language model, through PEFT."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_version import needs_peft
from processes import run_python
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from deltavlm_hf.training import (
    DeltaVLMTrainer,
    DeltaVLMTrainingArguments,
    FreezePolicy,
    TrainingRows,
    freeze,
    leave_out_frozen,
    merge_lora,
    trainable_table,
)
from deltavlm_hf.training.quantization import four_bit_config

pytestmark = needs_peft

POLICY = FreezePolicy(lora={"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1})


def run(model, processor, rows, folder, **settings):
    args = DeltaVLMTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "per_device_train_batch_size": 4,
            "eval_strategy": "no",
            "load_best_model_at_end": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            **settings,
        }
    )
    return DeltaVLMTrainer(model, args, train_dataset=TrainingRows(rows), processing_class=processor)


def load(folder, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(folder, **kwargs)


@pytest.fixture
def tuned(base, tiny_processor, rows, tmp_path):
    """A model after a few steps with an adapter, saved as a small checkpoint in `run`."""
    model = load(base)
    freeze(model, POLICY)
    trainer = run(model, tiny_processor, rows, tmp_path / "run")
    trainer.train()
    trainer.save_model()
    return model.eval()


def test_adapter_and_queries_train_and_the_language_model_does_not(base, tuned):
    original = load(base).state_dict()
    changed = set()
    for name, tensor in tuned.state_dict().items():
        plain = name.replace(".base_layer", "")
        if plain not in original:
            assert ".lora_" in name and (tensor.any() or "lora_A" in name)
        elif not torch.equal(tensor, original[plain]):
            changed.add(plain)
    assert "query_tokens" in changed
    assert not any(name.startswith("language_model.") for name in changed)
    assert "lora_B" in str([name for name, weight in tuned.named_parameters() if weight.requires_grad])


def test_the_small_checkpoint_holds_queries_and_adapter(tuned, batch, tmp_path):
    saved = load_file(tmp_path / "run" / "model.safetensors")
    adapter = [name for name in saved if ".lora_" in name]
    assert "query_tokens" in saved and len(adapter) == 4 * 2 * 2
    assert not any(name.startswith("language_model.") for name in saved.keys() - set(adapter))
    settings = json.loads((tmp_path / "run" / "config.json").read_text())["language_model_lora"]
    assert settings == {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
    restored, information = load(tmp_path / "run", output_loading_info=True)
    assert not information["missing_keys"] and not information["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(restored(**batch).logits, tuned(**batch).logits)
    assert not any(weight.requires_grad for name, weight in restored.named_parameters() if ".lora_" in name)


def test_a_process_that_never_heard_of_it(tuned, batch, tmp_path):
    code = (
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'run')!r}, trust_remote_code=True)\n"
        "print(sum(float(weight.double().abs().sum()) for weight in model.state_dict().values()))"
    )
    expected = sum(float(weight.double().abs().sum()) for weight in tuned.state_dict().values())
    assert float(run_python(code)) == pytest.approx(expected)


def test_saved_whole_it_needs_no_base(base, tuned, batch, tmp_path):
    tuned.save_pretrained(tmp_path / "whole", only_trained=False)
    base.rename(tmp_path / "gone")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "whole")(**batch).logits, tuned(**batch).logits)


def test_merged_it_is_a_plain_model(tuned, batch, tmp_path):
    with torch.no_grad():
        before = tuned(**batch).logits
    merge_lora(tuned)
    tuned.save_pretrained(tmp_path / "merged", only_trained=False)
    assert not any("lora" in name for name in load_file(tmp_path / "merged" / "model.safetensors"))
    merged = load(tmp_path / "merged")
    assert merged.config.language_model_lora is None
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, before, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no adapter to merge"):
        merge_lora(merged)


def test_merged_it_can_still_be_a_small_checkpoint(tuned, batch, tmp_path):
    """What the merge changed differs from the base, and is saved."""
    merge_lora(tuned)
    freeze(tuned)
    leave_out_frozen(tuned)
    tuned.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "merged")(**batch).logits, tuned(**batch).logits)


def test_merged_after_a_run_it_is_saved_merged(tuned, batch, tmp_path):
    """The run had left the language model out of its checkpoints."""
    merge_lora(tuned)
    tuned.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "merged")(**batch).logits, tuned(**batch).logits)


def test_it_trains_on_a_4bit_language_model(base, tiny_processor, rows, batch, tmp_path):
    model = load(base, quantization_config=four_bit_config(torch.float32))
    freeze(model, POLICY)
    assert "4-bit" in trainable_table(model)
    trainer = run(model, tiny_processor, rows, tmp_path / "run")
    trainer.train()
    trainer.save_model()
    assert all(weight.any() for name, weight in model.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        again = load(tmp_path / "run", quantization_config=four_bit_config(torch.float32))
        freeze(again, POLICY)  # without, bitsandbytes takes its kernel for evaluation, in bf16
        torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="without quantisation"):
            merge_lora(again)
        full = load(tmp_path / "run")
        assert not torch.equal(full(**batch).logits, expected)
    merge_lora(full)


def test_it_goes_on_from_a_checkpoint(base, tiny_processor, rows, tmp_path):
    whole = load(base)
    freeze(whole, POLICY)
    settings = {"save_strategy": "steps", "save_steps": 2}
    run(whole, tiny_processor, rows, tmp_path / "whole", **settings).train()
    model = load(base)
    freeze(model, POLICY)
    run(model, tiny_processor, rows, tmp_path / "again", **settings).train(str(tmp_path / "whole" / "checkpoint-2"))
    first, second = whole.state_dict(), model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_trained_further(tuned, batch, tmp_path):
    model = load(tmp_path / "run")
    freeze(model, POLICY)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(".lora_" in name for name in trained)
    freeze(model)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert not any(".lora_" in name for name in trained)
    leave_out_frozen(model)  # the adapter, frozen now, is saved nevertheless
    model.save_pretrained(tmp_path / "further")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "further")(**batch).logits, tuned(**batch).logits)


@pytest.mark.parametrize("part", ["vision_model", "difference", "qformer", "language_projection", "language_model"])
def test_peft_s_own_wrapper_saves_each_part_by_its_name(base, batch, tmp_path, part):
    """PEFT finds `modules_to_save` by the ends of names, and cannot load again a part that it finds within another."""
    targets = ["q_proj"] if part != "language_model" else r"qformer\..+\.query"
    model = get_peft_model(load(base), LoraConfig(r=2, target_modules=targets, modules_to_save=[part]))
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert {name.split(".")[2] for name in trained if ".lora_" not in name} == {part}
    with torch.no_grad():
        for weight in trained.values():
            weight.add_(0.01)
        expected = model.eval()(**batch).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
        assert torch.equal(again(**batch).logits, expected)
        assert not torch.equal(load(base)(**batch).logits, expected)


def test_an_adapter_of_one_s_own_on_a_small_checkpoint(base, tmp_path):
    """Its weights are the adapter's, whatever else the checkpoint brings together."""
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    wrapped = get_peft_model(load(base), config)
    wrapped.save_pretrained(tmp_path / "adapter")
    model = load(base)
    freeze(model)
    leave_out_frozen(model)
    model.save_pretrained(tmp_path / "small")
    small = load(tmp_path / "small")
    small.load_adapter(tmp_path / "adapter")
    expected = {name: weight for name, weight in wrapped.base_model.model.state_dict().items() if ".lora_" in name}
    found = small.state_dict()
    assert expected and all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_what_cannot_be(base):
    with pytest.raises(ValueError, match="leave out `language_model: true`"):
        freeze(load(base), FreezePolicy(language_model=True, lora={}))
    model = load(base)
    model.language_model.add_adapter(LoraConfig(), adapter_name="mine")
    with pytest.raises(ValueError, match="a single LoRA adapter, named 'default'"):
        model.save_pretrained(base / "other")


def test_peft_by_itself_with_modules_to_save(base, batch, tmp_path):
    """`get_peft_model` on the whole model, without this package's policy: an adapter's folder of PEFT's own form."""
    config = LoraConfig(
        r=4, target_modules=r"language_model\..*\.(q_proj|v_proj)", modules_to_save=["qformer", "language_projection"]
    )
    model = get_peft_model(load(base), config).train()
    learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("modules_to_save" in name or ".lora_" in name for name in learning)
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
    before = {name: weight.detach().clone() for name, weight in learning.items()}
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, weight in learning.items() if not torch.equal(weight, before[name])}
    for part in (".lora_A", ".lora_B", "qformer.modules_to_save", "language_projection.modules_to_save"):
        assert any(part in name for name in moved), part
    model.eval().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = model(**batch).logits
        again = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
        assert torch.equal(again(**batch).logits, expected)
        again.merge_and_unload().save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(load(tmp_path / "merged")(**batch).logits, expected, rtol=1e-4, atol=1e-4)
