"""Private names of Transformers that the package overrides: listed, and of the form that they had."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import deltavlm_hf

LISTED = (Path(__file__).parents[1] / "docs" / "compatibility.md").read_text()
LISTED = LISTED.partition("## Private names of Transformers")[2].partition("\n## ")[0]
LISTED = {name for row in LISTED.splitlines() for name in re.findall(r"`(_\w+)`", row.partition("|")[2].split("|")[0])}

# Parameters, in order, of what is overridden or called; None for what is no function.
KNOWN = {
    "PreTrainedModel._load_pretrained_model": "model state_dict checkpoint_files load_config expected_keys",
    "PreTrainedModel._adjust_missing_and_unexpected_keys": "self loading_info",
    "PreTrainedModel._from_config": "config kwargs",
    "PreTrainedModel._keys_to_ignore_on_save": None,
    "PreTrainedModel._keys_to_ignore_on_load_unexpected": None,
    "PreTrainedModel._auto_class": None,
    "InstructBlipPreTrainedModel._no_split_modules": None,
    "InstructBlipPreTrainedModel._init_weights": "self module",
    "PreTrainedModel._supports_sdpa": None,
    "PreTrainedModel._supports_flash_attn": None,
    "PreTrainedModel._supports_flex_attn": None,
    "PreTrainedModel._supports_attention_backend": None,
    "PreTrainedConfig._attn_implementation": None,
    "integrations.peft.PeftAdapterMixin._hf_peft_config_loaded": None,
    "GenerationMixin._prepare_multimodal_encoder_kwargs_for_generation": "self model_kwargs",
    "GenerationMixin._get_logits_processor": "self generation_config input_ids_seq_length encoder_input_ids "
    "prefix_allowed_tokens_fn logits_processor device model_kwargs negative_prompt_ids negative_prompt_attention_mask",
    "image_processing_backends.PilBackend._preprocess": "self images do_resize size resample do_center_crop crop_size "
    "do_rescale rescale_factor do_normalize image_mean image_std do_pad pad_size return_tensors kwargs",
    "image_processing_backends.PilBackend._prepare_image_like_inputs": "self images args expected_ndims kwargs",
    "ProcessorMixin._load_tokenizer_from_pretrained": "sub_processor_type pretrained_model_name_or_path subfolder "
    "kwargs",
    "ProcessorMixin._merge_kwargs": "self ModelProcessorKwargs tokenizer_init_kwargs kwargs",
    "Trainer._get_train_sampler": "self train_dataset",
    "Trainer._save": "self output_dir state_dict",
}


def overridden() -> set[str]:
    """By the package's own classes: private names that a class of Transformers or torch has before them."""
    found = set()
    for module in pkgutil.walk_packages(deltavlm_hf.__path__, "deltavlm_hf."):
        if not re.match(r"deltavlm_hf\.(modeling|processing|training)\.", module.name):
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if not inspect.isclass(kind) or kind.__module__ != module.name:
                continue
            others = [base for base in kind.__mro__[1:] if base.__module__.split(".")[0] in ("transformers", "torch")]
            for name in vars(kind):
                if re.match("_[a-z]", name) and any(name in vars(base) for base in others):
                    found.add(name)
    return found - {"_abc_impl"}


def test_all_are_listed():
    assert overridden() <= LISTED
    assert {name.rpartition(".")[2] for name in KNOWN} <= LISTED
    assert LISTED - {"_get_name"} == {name.rpartition(".")[2] for name in KNOWN}


@pytest.mark.parametrize("name", KNOWN)
def test_they_are_what_they_were(name):
    path, _, private = name.rpartition(".")
    module, _, kind = f"transformers.{path}".rpartition(".")
    found = getattr(getattr(importlib.import_module(module), kind), private)
    parameters = None if KNOWN[name] is None else KNOWN[name].split()
    assert (list(inspect.signature(found).parameters) if callable(found) else None) == parameters
