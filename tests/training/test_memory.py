"""The memory estimate against what a real step of a small model takes."""

import json

import pytest
import torch
from processes import run_python
from transformers import AutoModelForImageTextToText

from deltavlm_hf import DeltaVLMConfig
from deltavlm_hf.training import FreezePolicy, estimate_memory
from deltavlm_hf.training.quantization import four_bit_config

STEP = """
import json, sys, torch
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.training import FreezePolicy, freeze

def held():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) * 1024

config, batch_size, prompt, answer = json.loads(sys.argv[1])
torch.manual_seed(0)
model = DeltaVLMForConditionalGeneration(DeltaVLMConfig.from_dict(config))
freeze(model, FreezePolicy(vision_blocks=2))
model.train()
size = model.config.vision_config.image_size
placeholders = torch.full((batch_size, model.config.num_query_tokens), model.config.image_token_id)
input_ids = torch.cat([placeholders, torch.ones(batch_size, prompt + answer, dtype=torch.long)], 1)
inputs = {
    "pixel_values": torch.randn(batch_size, 2, 3, size, size),
    "qformer_input_ids": torch.ones(batch_size, prompt, dtype=torch.long),
    "input_ids": input_ids,
    "labels": torch.ones_like(input_ids),
}
optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
model(**{name: value[:1] for name, value in inputs.items()})  # what libraries hold from their first run on
before = held()
loss = model(**inputs).loss
activations = held() - before
loss.backward()
optimizer.step()
states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())
gradients = sum(parameter.grad.nbytes for parameter in model.parameters() if parameter.grad is not None)
trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
language_model = sum(parameter.nbytes for parameter in model.language_model.parameters())
everything = sum(parameter.nbytes for parameter in model.parameters())
print(json.dumps([activations, states, gradients, trained, language_model, everything]))
"""


def medium_config() -> DeltaVLMConfig:
    return DeltaVLMConfig(
        vision_config={
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 112,
            "patch_size": 8,
        },
        qformer_config={
            "vocab_size": 1000,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,  # else PyTorch on the CPU keeps whole attention matrices
        },
        text_config={
            "model_type": "llama",
            "vocab_size": 4000,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 8,
            "num_attention_heads": 4,
        },
        image_token_id=4000,
    )


def test_estimate_is_what_a_step_takes():
    config = medium_config()
    batch_size, prompt, answer = 16, 96, 32
    sizes = json.dumps([config.to_dict(), batch_size, prompt, answer])
    printed = run_python(STEP, sizes, MALLOC_MMAP_THRESHOLD_="65536")  # what is freed is given back at once
    activations, states, gradients, trained, language_model, everything = json.loads(printed)
    found = estimate_memory(
        config, batch_size=batch_size, prompt_tokens=prompt, answer_tokens=answer, dtype=torch.float32
    )
    assert found.trained_weights == trained
    assert found.language_model_weights == language_model
    assert found.trained_weights + found.frozen_vision_weights + found.language_model_weights == everything
    assert found.gradients == gradients
    assert found.optimizer == pytest.approx(states, rel=1e-3)  # which counts its steps as well
    assert found.activations == pytest.approx(activations, rel=0.15)


def test_four_bit_weights_are_what_bitsandbytes_keeps(base):
    model = AutoModelForImageTextToText.from_pretrained(base, quantization_config=four_bit_config(torch.float32))
    kept = 0
    for parameter in model.language_model.parameters():
        kept += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            kept += state.absmax.nbytes + state.state2.absmax.nbytes
    found = estimate_memory(model.config, dtype=torch.float32, load_in_4bit=True)
    assert found.language_model_weights == pytest.approx(kept, rel=0.02)


def test_what_saves_memory():
    config = medium_config()
    plain = estimate_memory(config)
    assert estimate_memory(config, gradient_checkpointing=True).activations < 0.4 * plain.activations
    assert estimate_memory(config, batch_size=24).activations == pytest.approx(2 * plain.activations, rel=0.05)
    assert estimate_memory(config, load_in_4bit=True).language_model_weights < 0.5 * plain.language_model_weights
    assert estimate_memory(config, FreezePolicy(0, False, False)).optimizer < 0.1 * plain.optimizer
    assert "total" in plain.table()


def test_full_size_is_computed_on_any_machine():
    found = estimate_memory(DeltaVLMConfig(), batch_size=1)
    assert 12 < found.language_model_weights / 2**30 < 13  # Vicuna-7B in 16 bits
