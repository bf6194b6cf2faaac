"""How much memory a training step needs, by part, without running it."""

from dataclasses import asdict, dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from .freezing import FreezePolicy, freeze

# Bytes of a weight in NF4 with double quantisation: half a byte, one for every 64, four for every 64 * 256.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_ADAM_BYTES = 8  # two moments in float32


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Bytes of one process, without sharding.

    Attributes:
        trained_weights, frozen_vision_weights, language_model_weights (`int`): the weights.
        gradients (`int`): of what trains.
        optimizer (`int`): AdamW's two moments.
        activations (`int`): what autograd keeps from the forward pass for the backward pass.
    """

    trained_weights: int
    frozen_vision_weights: int
    language_model_weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    def table(self) -> str:
        """The parts in GiB."""
        parts = {**asdict(self), "total": self.total}
        return "\n".join(f"{name.replace('_', ' '):<24}{value / 2**30:8.2f} GiB" for name, value in parts.items())


def estimate_memory(
    config: DeltaVLMConfig,
    policy: FreezePolicy | None = None,
    *,
    batch_size: int = 12,
    prompt_tokens: int = 64,
    answer_tokens: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    trained_dtype: torch.dtype = torch.float32,
    load_in_4bit: bool = False,
    gradient_checkpointing: bool = False,
) -> MemoryEstimate:
    """
    What one training step holds at the end of its forward pass.

    The model is built of PyTorch's fake tensors, which have no content, and its forward pass run with them, so that
    activations are what autograd would keep, at any size. Not counted: the CUDA context (about 0.5 GiB), what an
    operation needs while it runs, such as a dequantised matrix or one checkpointed layer's activations, and
    fragmentation: leave a fifth free.

    Args:
        config ([`DeltaVLMConfig`]).
        policy ([`FreezePolicy`], *optional*): by default the authors'.
        batch_size (`int`, *optional*, defaults to 12): rows of one process and step.
        prompt_tokens (`int`, *optional*, defaults to 64): of a question with the turns before it.
        answer_tokens (`int`, *optional*, defaults to 32).
        dtype (`torch.dtype`, *optional*, defaults to `torch.bfloat16`): of frozen weights and of activations.
        trained_dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): of what trains.
        load_in_4bit (`bool`, *optional*, defaults to `False`): the language model's layers in NF4.
        gradient_checkpointing (`bool`, *optional*, defaults to `False`): keep each block's input only.

    Returns:
        [`MemoryEstimate`].

    Raises:
        ValueError: if the policy asks for LoRA, whose layers cannot be made without content.
    """
    if policy is not None and policy.lora is not None:
        raise ValueError("Memory is not estimated with `lora`: estimate without it, and leave room for the adapter.")
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"), no_init_weights():  # some parts compute numbers while they are made: not with fakes
        model = DeltaVLMForConditionalGeneration._from_config(config, dtype=dtype)
    with fake:
        model.to_empty(device="cpu")
        model.tie_weights()
        freeze(model, policy)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    language_model = set(model.language_model.parameters())
    frozen_vision = sum(
        parameter.numel()
        for parameter in model.parameters()
        if not parameter.requires_grad and parameter not in language_model
    )
    quantised = {
        module.weight
        for name, module in model.language_model.named_modules()
        if load_in_4bit and isinstance(module, torch.nn.Linear) and "lm_head" not in name
    }
    language_model_bytes = sum(
        parameter.numel() * (NF4_BYTES if parameter in quantised else dtype.itemsize)
        for parameter in language_model
        if not parameter.requires_grad
    )
    return MemoryEstimate(
        trained_weights=trained * trained_dtype.itemsize,
        frozen_vision_weights=frozen_vision * dtype.itemsize,
        language_model_weights=round(language_model_bytes),
        gradients=trained * trained_dtype.itemsize,
        optimizer=trained * _ADAM_BYTES,
        activations=_activations(model, fake, batch_size, prompt_tokens, answer_tokens, gradient_checkpointing),
    )


def _activations(
    model: DeltaVLMForConditionalGeneration,
    fake: FakeTensorMode,
    batch_size: int,
    prompt_tokens: int,
    answer_tokens: int,
    gradient_checkpointing: bool,
) -> int:
    """Bytes that autograd keeps, each storage once, without the weights."""
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    weights = {_storage(parameter) for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def keep_inputs(module: torch.nn.Module, inputs: tuple) -> None:
        if module.gradient_checkpointing and module.training:
            for tensor in inputs:
                if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                    keep(tensor)

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.register_forward_pre_hook(keep_inputs)
    size = model.config.image_size
    with fake, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        pixel_values = torch.empty(batch_size, 2, 3, size, size, dtype=model.dtype)
        question = torch.zeros(batch_size, prompt_tokens, dtype=torch.long)
        change_tokens = model.get_image_features(pixel_values, question, return_dict=True).pooler_output
        text = torch.zeros(batch_size, prompt_tokens + answer_tokens, dtype=torch.long)
        embeddings = torch.cat([change_tokens, model.get_input_embeddings()(text)], dim=1)
        logits = model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        labels = torch.zeros(logits.shape[:2], dtype=torch.long)
        loss = model.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1])
    del loss
    return sum(storage.nbytes() for storage in kept.values())


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
