"""What trains, and what evaluation mode is good for in what does not."""

import re

import pytest
import torch
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

import deltavlm_hf
from deltavlm_hf.data import PairCollator
from deltavlm_hf.hub.names import DROPPED, NAMES
from deltavlm_hf.training import FreezePolicy, freeze, trainable_table


def trained(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


NORM = "vision_model.post_layernorm."


def test_what_trains_is_what_the_authors_checkpoint_holds(converted, official):
    """Their trainer saves what has gradients: `ln_vision` too, which their `freeze_vit` leaves out."""
    model = AutoModelForImageTextToText.from_pretrained(converted)
    freeze(model)
    saved = set()
    for name in official["checkpoint_keys"]:
        if not any(re.fullmatch(pattern, name) for pattern in DROPPED):
            pattern, replacement = next(each for each in NAMES if re.fullmatch(each[0], name))
            saved.add(re.sub("[qv]_bias$", "qkv.bias", re.sub(pattern, replacement, name)))
    assert trained(model) == saved and {f"{NORM}weight", f"{NORM}bias"} <= saved


def test_gradients_reach_the_layer_norm_without_any_block(tiny_model, batch):
    freeze(tiny_model, FreezePolicy(vision_blocks=0))
    tiny_model.train()
    tiny_model(**batch).loss.backward()
    assert tiny_model.vision_model.post_layernorm.weight.grad.any()


def test_all_but_the_language_model_and_the_first_blocks_train(tiny_model):
    freeze(tiny_model)
    blocks = tuple(f"vision_model.encoder.layers.{number}." for number in (3, 4))
    own = (NORM, "difference.", "qformer.", "language_projection.", "query_tokens")
    names = {name for name, _ in tiny_model.named_parameters()}
    assert trained(tiny_model) == {name for name in names if name.startswith((*blocks, *own))}


@pytest.mark.parametrize(
    ("policy", "beginnings"),
    [
        (FreezePolicy(vision_blocks=0), (NORM, "difference.", "qformer.", "language_projection.", "query_tokens")),
        (FreezePolicy(-1, difference=False, qformer=False, projection=False), ("vision_model.",)),
        (
            FreezePolicy(-1, False, False, False, vision_layernorm=False),
            ("vision_model.embeddings.", "vision_model.encoder."),
        ),
        (FreezePolicy(0, False, False, False), (NORM,)),
        (FreezePolicy(0, False, False, False, language_model=True, vision_layernorm=False), ("language_model.",)),
        (FreezePolicy(0, False, True, False, vision_layernorm=False), ("qformer.", "query_tokens")),
    ],
)
def test_other_policies(tiny_model, policy, beginnings):
    freeze(tiny_model, policy)
    names = {name for name, _ in tiny_model.named_parameters()}
    assert trained(tiny_model) == {name for name in names if name.startswith(beginnings)} != set()


@pytest.mark.parametrize("masks", [True, False])
def test_the_mask_decoder_trains_where_there_is_one(make_mask_model, masks):
    model, _ = make_mask_model(backbone=False)
    freeze(model, FreezePolicy(vision_blocks=1, masks=masks))
    decoder = {name for name, _ in model.named_parameters() if name.startswith("mask_decoder.")}
    assert decoder and trained(model) & decoder == (decoder if masks else set())


def test_blocks_that_are_not_there(tiny_model):
    with pytest.raises(ValueError, match="`vision_blocks` is 6; the vision encoder has 5 blocks"):
        freeze(tiny_model, FreezePolicy(vision_blocks=6))


def test_nothing_drops_out_in_frozen_parts(tiny_model):
    freeze(tiny_model, FreezePolicy(difference=False))
    tiny_model.eval()
    tiny_model.train()
    assert tiny_model.training and tiny_model.qformer.training
    assert not any(module.training for module in tiny_model.difference.modules())
    assert not any(module.training for module in tiny_model.language_model.modules())
    assert [block.training for block in tiny_model.vision_model.encoder.layers] == [False] * 3 + [True] * 2
    tiny_model.requires_grad_(True)
    tiny_model.train()
    assert all(module.training for module in tiny_model.modules())


def test_checkpointing_goes_on_in_frozen_parts(tiny_model, batch):
    """A frozen language model keeps activations too: gradients pass through it."""
    freeze(tiny_model, FreezePolicy(difference=False))
    tiny_model.train()
    tiny_model(**batch).loss.backward()
    expected = {name: parameter.grad for name, parameter in tiny_model.named_parameters() if parameter.requires_grad}
    tiny_model.zero_grad()
    tiny_model.activation_checkpointing_enable()
    tiny_model.train()
    runs = []
    handle = tiny_model.language_model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    tiny_model(**batch).loss.backward()
    handle.remove()
    assert len(runs) == 2  # once more on the way back
    for name, gradient in expected.items():
        torch.testing.assert_close(tiny_model.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-6)


def test_plain_trainer_changes_what_trains_and_nothing_else(tiny_model, tiny_processor, rows, tmp_path):
    freeze(tiny_model)
    before = {name: parameter.clone() for name, parameter in tiny_model.named_parameters()}
    modes = []
    tiny_model.difference.register_forward_hook(lambda module, *_: modes.append(module.training))
    tiny_model.language_model.register_forward_hook(lambda module, *_: modes.append(module.training))
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )
    Trainer(tiny_model, args, train_dataset=rows, data_collator=PairCollator(tiny_processor)).train()
    assert modes == [True, False] * 2
    changed = {name for name, parameter in tiny_model.named_parameters() if not torch.equal(parameter, before[name])}
    last = "qformer.encoder.layer.3."  # its feed-forward layer for text leads nowhere: only queries are read after it
    nowhere = {name for name in before if name.startswith((f"{last}intermediate.", f"{last}output."))}
    assert changed == trained(tiny_model) - nowhere


def test_table(tiny_model):
    freeze(tiny_model)
    lines = {line.split()[0]: line.split() for line in trainable_table(tiny_model).splitlines()}
    count = sum(parameter.numel() for parameter in tiny_model.parameters())
    assert lines["total"][1] == f"{count:,}"
    assert lines["language_model"][2] == "0"
    assert lines["qformer"][1] == lines["qformer"][2]
    assert lines["query_tokens"] == ["query_tokens", "4,096", "4,096", "float32"]


def test_what_trains_is_kept_in_float32_under_autocast(tiny_processor, rows, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny(), dtype=torch.bfloat16)
    freeze(model)
    kept = {parameter.dtype: parameter.requires_grad for parameter in model.parameters()}
    assert kept == {torch.float32: True, torch.bfloat16: False}
    args = TrainingArguments(
        str(tmp_path),
        max_steps=2,
        bf16=True,
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        use_cpu=True,
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=PairCollator(tiny_processor))
    trainer.train()
    assert all(0 < entry["loss"] < 5 for entry in trainer.state.log_history if "loss" in entry)
    trainer.save_model()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(loaded.query_tokens, model.query_tokens)
