"""4-bit loading: the language model alone is quantised."""

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel

# What stays as it is: all of DeltaVLM's own, and the output layer, which a list like this would else include.
FULL_PRECISION = ("vision_model", "difference", "qformer", "language_projection", "lm_head")


def four_bit_config(compute_dtype: torch.dtype = torch.bfloat16) -> BitsAndBytesConfig:
    """
    For `from_pretrained(..., quantization_config=four_bit_config())`: NF4 with double quantisation, of the language
    model only.

    Args:
        compute_dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): what products are computed in.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(FULL_PRECISION),
    )


def quantised_part_only(model: PreTrainedModel) -> None:
    """
    Says of the language model, and no longer of the whole, that it is quantised.

    [`four_bit_config`] quantises nothing but the language model, but Transformers marks the whole model, and `Trainer`
    refuses a quantised model without adapters, for there would be nothing to train. Here there is: everything around
    the language model, in full precision, with gradients that pass through its frozen weights. So the marks move to
    where they are true. A checkpoint of what was trained then names no quantisation, and loads in any precision.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): changed in place; nothing happens if it is not quantised.
    """
    if not getattr(model, "is_quantized", False):
        return
    for mark in ("is_quantized", "quantization_method", "hf_quantizer", "is_loaded_in_4bit"):
        if mark in vars(model):
            setattr(model.language_model, mark, vars(model).pop(mark))
    del model.config.quantization_config
    # On CPUs with bf16 instructions, bitsandbytes repacks weights in the first evaluation for a kernel that has no
    # backward: every gradient would be 0 from then on, without an error.
    for module in model.language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.state_dict()  # unpacks what was packed already
            module.support_avx512bf16_for_cpu = False
