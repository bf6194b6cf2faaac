"""What trains and what stays as it is; checkpoints that hold the one and point to the other."""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils.hub import extract_commit_hash

from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.lora import LORA_MARK, make_lora_config, without_adapter
from ..modeling.weight_sources import digest, find_files, names_in, open_weights, same_values, shape
from .quantization import quantised_part_only


@dataclass(frozen=True)
class FreezePolicy:
    """
    What trains. The defaults are what the authors' code trains: all but the language model and the first vision
    blocks.

    Args:
        vision_blocks (`int`, *optional*): how many of the last blocks of the vision encoder train; -1 for all of them
            and what is before them. By default 2 of InstructBLIP's ViT, as the authors have it, and none of a
            backbone, whose blocks are its stages, or a ViT's layers; its neck always trains. The layer norm after the
            ViT has a field of its own.
        difference (`bool`, *optional*, defaults to `True`): the CSRM.
        qformer (`bool`, *optional*, defaults to `True`): the Q-Former and its queries.
        projection (`bool`, *optional*, defaults to `True`): the projection to the language model.
        language_model (`bool`, *optional*, defaults to `False`): the language model itself.
        lora (`dict`, *optional*): settings of PEFT's `LoraConfig`, such as `{"r": 16, "lora_alpha": 32}`: a LoRA
            adapter on the frozen language model trains. A model that has one already goes on with that.
        vision_layernorm (`bool`, *optional*, defaults to `True`): the layer norm after the ViT's blocks, whichever of
            these train. The authors' `freeze_vit` leaves it out (`ln_vision`), so that it trains.
        masks (`bool`, *optional*, defaults to `True`): the mask decoder, of models that have one.
    """

    vision_blocks: int | None = None
    difference: bool = True
    qformer: bool = True
    projection: bool = True
    language_model: bool = False
    lora: dict[str, Any] | None = None
    vision_layernorm: bool = True
    masks: bool = True


def freeze(model: DeltaVLMForConditionalGeneration, policy: FreezePolicy | None = None) -> None:
    """
    Sets `requires_grad` of every parameter by a policy. Parts that are frozen as a whole stay in evaluation mode
    through `model.train()`, which `Trainer` calls. What trains is kept in float32: a model loaded in 16 bits then
    needs autocast, `bf16=True` in `TrainingArguments`. A language model in 4-bit is told apart from the rest, see
    [`quantised_part_only`], so that `Trainer` takes the model.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]).
        policy ([`FreezePolicy`], *optional*): by default the authors'.

    Raises:
        ValueError: if the policy asks for what the model does not have, or for two things that exclude each other.
        ImportError: if `lora` is asked for without PEFT.
    """
    policy = policy or FreezePolicy()
    vision, layers = model.vision_model, vision_layers(model)
    blocks = policy.vision_blocks
    if blocks is None:
        blocks = 0 if model.config.has_backbone else 2
    if not -1 <= blocks <= len(layers):
        raise ValueError(f"`vision_blocks` is {blocks}; the vision encoder has {len(layers)} blocks, or -1 for all.")
    quantised_part_only(model)
    if policy.language_model and policy.lora is not None:
        raise ValueError("`lora` trains an adapter on a frozen language model: leave out `language_model: true`.")
    if policy.language_model and getattr(model.language_model, "is_quantized", False):
        raise ValueError(
            "A language model in 4-bit cannot be trained: load it in bfloat16, leave it frozen, or train an adapter "
            "on it (`lora`)."
        )
    if policy.lora is not None and not getattr(model.language_model, "peft_config", None):
        model.language_model.add_adapter(make_lora_config(policy.lora))
    model.requires_grad_(False)
    trained: list[nn.Module | nn.Parameter] = []
    if blocks == -1:
        trained += [vision.backbone] if model.config.has_backbone else [vision.embeddings, *layers]
    elif blocks:
        trained += layers[-blocks:]
    if model.config.has_backbone:
        trained.append(vision.neck)
    elif policy.vision_layernorm:
        trained.append(vision.post_layernorm)
    if policy.difference:
        trained.append(model.difference)
    if policy.qformer:
        trained += [model.qformer, model.query_tokens]
    if policy.projection:
        trained.append(model.language_projection)
    if policy.masks and model.config.mask_classes:
        trained.append(model.mask_decoder)
    if policy.language_model:
        trained.append(model.language_model)
    if policy.lora is not None:
        trained += [parameter for name, parameter in model.named_parameters() if LORA_MARK in name]
    for part in trained:
        part.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()  # small steps would be lost in 16 bits
    model.train(model.training)


def vision_layers(model: DeltaVLMForConditionalGeneration) -> list[nn.Module]:
    """The blocks of the vision encoder, or the stages of a backbone, as far as its feature maps need them."""
    if not model.config.has_backbone:
        return list(model.vision_model.encoder.layers)
    config: Any = model.config.vision_config  # whose stages are its stem and these
    stages = next(module for module in model.vision_model.backbone.modules() if isinstance(module, nn.ModuleList))
    return list(stages[: max(index % len(config.stage_names) for index in config.out_indices)])


def trainable_table(model: nn.Module) -> str:
    """A table of parameters by part: how many there are, how many train, and in which precision they are kept."""
    lines = [("part", "parameters", "trained", "kept as")]
    total = trained_total = 0
    for name, parameters in _parts(model):
        count = sum(_size(parameter) for parameter in parameters)
        trained = sum(_size(parameter) for parameter in parameters if parameter.requires_grad)
        kept = sorted({_kept_as(parameter) for parameter in parameters})
        lines.append((name, f"{count:,}", f"{trained:,}", ", ".join(kept)))
        total, trained_total = total + count, trained_total + trained
    lines.append(("total", f"{total:,}", f"{trained_total:,}", f"{100 * trained_total / max(total, 1):.2f} % trained"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return "\n".join(
        f"{name:<{widths[0]}}  {count:>{widths[1]}}  {trained:>{widths[2]}}  {kept}".rstrip()
        for name, count, trained, kept in lines
    )


def _parts(model: nn.Module) -> Iterator[tuple[str, list[nn.Parameter]]]:
    own = list(model.parameters(recurse=False))
    for name, part in model.named_children():
        parameters = list(part.parameters())
        if parameters:
            yield name, parameters
    if own:
        yield "query_tokens", own


def _size(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)  # of bitsandbytes: two weights in a byte
    return parameter.numel() if state is None else state.shape.numel()


def _kept_as(parameter: nn.Parameter) -> str:
    return "4-bit" if hasattr(parameter, "quant_state") else str(parameter.dtype).removeprefix("torch.")


def leave_out_frozen(model: DeltaVLMForConditionalGeneration) -> list[str]:
    """
    Makes `save_pretrained`, and so `Trainer`'s checkpoints, hold only what is not the same in the place that the model
    was loaded from. `config.weight_sources` points there. `from_pretrained` puts both together again.

    What trains is always saved, and so is what differs from its source already, such as embeddings that were resized:
    every value is compared with the files, in the precision that the model has. Call it again after other changes to
    what is frozen. Undo it with `model.save_pretrained(folder, only_trained=False)`.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): after [`freeze`].

    Returns:
        `list[str]`: the names of the weights that are left out.

    Raises:
        ValueError: if the model was not loaded from anywhere, or holds weights in 4-bit that are not made of those
            there: they can neither be left out nor saved.
        OSError: if it is not there any more.
    """
    base, sources = model.config.name_or_path, model.config.weight_sources or []
    if not (base or sources):
        raise ValueError(
            "A small checkpoint points to the place of the frozen weights, but this model was made from a "
            "configuration: save it once with `save_pretrained`, and train what `from_pretrained` makes of that."
        )
    if base:
        if os.path.isdir(base):
            base = os.path.abspath(base)  # found from every working directory
        sources = [{"name_or_path": base, "revision": model.weights_revision, "prefix": ""}, *sources]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = {without_adapter(name): tensor for name, tensor in model.state_dict().items()}
    kept = {name for name in tensors if name in trained or LORA_MARK in name}  # adapters are looked for here alone
    unplaced = {name: tensor for name, tensor in tensors.items() if name not in kept}
    quantised = {
        f"{without_adapter(name)}.weight": module.weight
        for name, module in model.named_modules()
        if hasattr(getattr(module, "weight", None), "quant_state")
    }
    left_out, needed, name_in_model = [], [], names_in(model)
    for source in sources:
        prefix = source.get("prefix", "")
        same, digests = [], {}
        with ExitStack() as stack:
            for file in find_files(source, lambda name: name_in_model(name) in unplaced):
                weights = open_weights([file], stack)
                found = {name_in_model(prefix + name): weight for name, weight in weights.items()}
                here = [name for name in unplaced if name in found and same_values(unplaced[name], found[name])]
                for owner in quantised.keys() & found.keys() & unplaced.keys() - set(here):
                    if _same_in_4bit(quantised[owner], found[owner]):
                        here += [name for name in unplaced if name == owner or name.startswith(f"{owner}.")]
                if here:
                    same += here
                    digests[Path(file).name] = digest(file)
        if same:
            commit = None if os.path.isdir(source["name_or_path"]) else extract_commit_hash(file, None)
            described = {**source, "revision": commit or source.get("revision"), "digests": digests}
            needed.append({key: value for key, value in described.items() if value is not None})
        left_out += same
        for name in same:
            del unplaced[name]
    if lost := [name for name in quantised if name in unplaced]:
        raise ValueError(
            f"{len(lost)} weights in 4-bit, among them {lost[0]}, are not made of those in {base!r}. They can neither "
            "be left out of a checkpoint nor be saved: load the model from the place that has its language model."
        )
    elsewhere = {tensors[name].data_ptr() for name in left_out}
    left_out += [name for name in unplaced if tensors[name].data_ptr() in elsewhere]  # tied to one of them
    model.keep_out_of_checkpoints(left_out, needed)
    return left_out


def _same_in_4bit(parameter: Any, weight: Any) -> bool:
    """Whether bitsandbytes makes the same values of a weight in a file."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    state = parameter.quant_state
    if tuple(state.shape) != shape(weight):
        return False
    again = quantize_4bit(
        weight[...].to(parameter.device, state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    return torch.equal(dequantize_4bit(*again), dequantize_4bit(parameter.data, state))


def merge_lora(model: DeltaVLMForConditionalGeneration) -> None:
    """
    Adds a LoRA adapter of the language model to the weights that it stands beside: a plain model is left, which loads
    without PEFT and answers as fast as one that never had an adapter.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): changed in place; loaded without quantisation.

    Raises:
        ValueError: if there is no adapter, or if the language model is quantised.
    """
    if not getattr(model.language_model, "peft_config", None):
        raise ValueError("The language model has no adapter to merge.")
    if getattr(model, "is_quantized", False) or getattr(model.language_model, "is_quantized", False):
        raise ValueError("An adapter is merged into full weights: load the model without quantisation.")
    from peft.tuners.lora import LoraLayer

    merged = set()
    for name, module in list(model.language_model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge(safe_merge=True)
            merged.add(f"language_model.{name}.weight")
            parent, _, child = name.rpartition(".")
            setattr(model.language_model.get_submodule(parent), child, module.get_base_layer())
    del model.language_model.peft_config
    model.language_model._hf_peft_config_loaded = False
    model.config.language_model_lora = None
    if model._keys_to_ignore_on_save:  # what was merged is no longer what lies in its place
        left_out = [name for name in model._keys_to_ignore_on_save if name not in merged]
        model.keep_out_of_checkpoints(left_out, model.config.weight_sources or [])
