"""A language model in 4-bit (bitsandbytes on the CPU), with trained parts in full precision around it."""

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import deltavlm_hf
from deltavlm_hf.training import (
    DeltaVLMTrainer,
    DeltaVLMTrainingArguments,
    TrainingRows,
    freeze,
    leave_out_frozen,
    trainable_table,
)
from deltavlm_hf.training.quantization import four_bit_config


@pytest.fixture
def quantised(base):
    return AutoModelForImageTextToText.from_pretrained(base, quantization_config=four_bit_config(torch.float32))


def test_only_the_language_model_is_quantised(quantised):
    kinds = {name: type(module) for name, module in quantised.named_modules() if isinstance(module, torch.nn.Linear)}
    four_bit = {name for name, kind in kinds.items() if kind is bitsandbytes.nn.Linear4bit}
    layers = {name for name in kinds if name.startswith("language_model.model.layers.")}
    assert four_bit == layers and len(layers) == 4 * 7


@pytest.mark.parametrize("size", [1, 3])
def test_gradients_are_those_of_the_dequantised_model(quantised, tiny_processor, batch, size):
    freeze(quantised)
    plain = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    freeze(plain)
    for name, module in quantised.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            plain.get_submodule(name).weight.data = dequantize_4bit(module.weight.data, module.weight.quant_state)
    few = {name: value[:size] for name, value in batch.items()}
    losses = [model(**few).loss for model in (quantised, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    compared = 0
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            scale = float(parameter.grad.abs().max()) or 1.0
            torch.testing.assert_close(
                quantised.get_parameter(name).grad / scale, parameter.grad / scale, rtol=1e-3, atol=1e-4
            )
            compared += bool(parameter.grad.any())
    assert compared > 100


def test_gradients_survive_an_evaluation(quantised, batch):
    """Before and after `freeze`; bitsandbytes has a kernel for evaluation on the CPU that knows no gradients."""
    quantised.eval()
    with torch.no_grad():
        quantised(**batch)
    freeze(quantised)
    gradients = []
    for _ in range(2):
        quantised.zero_grad()
        quantised.train()
        torch.manual_seed(0)  # dropout
        quantised(**batch).loss.backward()
        gradients.append(quantised.language_projection.weight.grad.clone())
        quantised.eval()
        with torch.no_grad():
            quantised(**batch)
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_trainer_takes_it_and_its_checkpoint_loads_either_way(quantised, tiny_processor, rows, base, tmp_path):
    freeze(quantised)
    args = DeltaVLMTrainingArguments(
        output_dir=str(tmp_path / "run"),
        max_steps=2,
        learning_rate=1e-3,
        warmup_steps=0,
        per_device_train_batch_size=4,
        eval_strategy="no",
        load_best_model_at_end=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    trainer = DeltaVLMTrainer(quantised, args, train_dataset=TrainingRows(rows), processing_class=tiny_processor)
    trainer.train()
    trainer.save_model()
    assert "4-bit" in trainable_table(quantised)
    full = AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    original = AutoModelForImageTextToText.from_pretrained(base)
    assert torch.equal(full.query_tokens, quantised.query_tokens)
    assert not torch.equal(full.query_tokens, original.query_tokens)
    weight = "language_model.model.layers.0.mlp.up_proj.weight"
    assert torch.equal(full.get_parameter(weight), original.get_parameter(weight))
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run", quantization_config=four_bit_config(torch.float32)
    )
    assert torch.equal(again.get_parameter(weight).data, quantised.get_parameter(weight).data)
    with pytest.raises(ValueError, match="save only what was trained"):
        quantised.save_pretrained(tmp_path / "whole", only_trained=False)


def test_a_language_model_that_is_not_the_base_s_cannot_be_left_out(quantised, base):
    freeze(quantised)
    left_out = set(leave_out_frozen(quantised))
    assert {name for name in quantised.state_dict() if name.startswith("language_model.")} <= left_out
    weights = load_file(base / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    weights[name][5:] *= 1.5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"1 weights in 4-bit, among them {name}, are not made of those"):
        leave_out_frozen(quantised)


def test_it_cannot_be_trained_itself(quantised):
    with pytest.raises(ValueError, match="in 4-bit cannot be trained"):
        freeze(quantised, deltavlm_hf.training.FreezePolicy(language_model=True))
