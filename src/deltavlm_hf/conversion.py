"""
Conversion of the authors' checkpoint to a folder that `from_pretrained` loads.

The authors save only what they train. The frozen rest comes from where they took it: a base vision encoder (an EVA
file or an InstructBLIP folder) and a language model. Every key of the checkpoint is used or listed below as dropped,
and every weight of the model is given.
"""

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    PreTrainedModel,
    logging,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from .processing import DeltaVLMImageProcessor, DeltaVLMProcessor

logger = logging.get_logger(__name__)

StateDict = dict[str, torch.Tensor]

# The authors' names (model/blip2_vicua.py, LAVIS) -> ours, tried in this order on the whole name.
NAMES = (
    (r"visual_encoder\.cls_token", "vision_model.embeddings.class_embedding"),
    (r"visual_encoder\.pos_embed", "vision_model.embeddings.position_embedding"),
    (r"visual_encoder\.patch_embed\.proj\.(weight|bias)", r"vision_model.embeddings.patch_embedding.\1"),
    (r"visual_encoder\.blocks\.(\d+)\.norm([12])\.(.+)", r"vision_model.encoder.layers.\1.layer_norm\2.\3"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.proj\.(.+)", r"vision_model.encoder.layers.\1.self_attn.projection.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.attn\.(.+)", r"vision_model.encoder.layers.\1.self_attn.\2"),
    (r"visual_encoder\.blocks\.(\d+)\.mlp\.(.+)", r"vision_model.encoder.layers.\1.mlp.\2"),
    (r"ln_vision\.(.+)", r"vision_model.post_layernorm.\1"),
    (r"context1\.(.+)", r"difference.context_difference.\1"),
    (r"context2\.(.+)", r"difference.context_features.\1"),
    (r"context3\.(.+)", r"difference.output.\1"),
    (r"gate1\.(.+)", r"difference.gate_difference.\1"),
    (r"gate2\.(.+)", r"difference.gate_features.\1"),
    (r"query_tokens", "query_tokens"),
    (r"Qformer\.bert\.embeddings\.LayerNorm\.(.+)", r"qformer.embeddings.layernorm.\1"),
    (r"Qformer\.bert\.(encoder\..+)\.(attention|crossattention)\.self\.(.+)", r"qformer.\1.\2.attention.\3"),
    (r"Qformer\.bert\.((?:embeddings|encoder)\..+)", r"qformer.\1"),
    (r"llm_proj\.(.+)", r"language_projection.\1"),
)
# What no answer depends on: buffers, and heads that the authors build but never call.
DROPPED = (
    r"Qformer\.bert\.embeddings\.position_ids",
    r"llm_model\..+\.inv_freq",
    r"(vision_proj|text_proj)\.(weight|bias)",
    r"temp",
)
# With `difference_module="concat"`, what the authors' training code leaves untrained.
DROPPED_CSRM = (r"(context[123]|gate[12])\.(weight|bias)",)
# Of a base EVA file: what stands behind the last block that is used.
DROPPED_VISION = (r"visual_encoder\.(norm|fc_norm|head)\.(weight|bias)",)

# The authors' `generate` (LAVIS), with embeddings as input: their `max_length=256` counts one id that is not there.
GENERATION_DEFAULTS = {"num_beams": 5, "max_new_tokens": 255, "repetition_penalty": 1.5, "do_sample": False}
# How the authors load the tokenizer: beginning, end and unknown are all `</s>`.
SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
QFORMER_BOS = "[DEC]"


def convert_original_checkpoint(
    checkpoint: str | os.PathLike,
    *,
    vision: str | os.PathLike,
    language_model: str | os.PathLike,
    qformer_tokenizer: str | os.PathLike,
    output_dir: str | os.PathLike,
    config: DeltaVLMConfig | None = None,
) -> Path:
    """
    Converts a checkpoint of the authors' release.

    Args:
        checkpoint: the authors' `checkpoint_best.pth`.
        vision: the base vision encoder: an EVA-ViT file (`.pth`), or a folder with InstructBLIP in safetensors. Where
            the checkpoint holds trained blocks, they win.
        language_model: folder or Hub id of the language model that the checkpoint was trained with.
        qformer_tokenizer: folder or Hub id of `bert-base-uncased`, or its `vocab.txt`.
        output_dir: the folder to make. It is written under another name and renamed when it is complete.
        config: sizes that cannot be read off weights (heads, image size); by default the paper's. Its `text_config`
            and `image_token_id` are replaced by what the language model's folder says.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        FileNotFoundError: if a source is missing.
        ValueError: if a file holds no weights, a key of the checkpoint is unknown, a shape differs from the
            configuration's, or a weight of the model is in none of the sources.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"{output_dir} exists already: choose another `output_dir` or remove it first.")
    for source in (checkpoint, vision):
        if not Path(source).exists():
            raise FileNotFoundError(f"{source} does not exist.")

    config = DeltaVLMConfig() if config is None else DeltaVLMConfig.from_dict(config.to_dict())
    processor = _build_processor(language_model, qformer_tokenizer, config)
    config.image_token_id = processor.image_token_id

    llm = AutoModelForCausalLM.from_pretrained(language_model, dtype="auto")
    special_ids = {name: getattr(processor.tokenizer, name) for name in SPECIAL_IDS}
    _make_room(llm, special_ids["pad_token_id"])
    llm.config.update(special_ids)
    config.text_config = llm.config
    state_dict = _read_vision(Path(vision), config)
    dropped = DROPPED if config.difference_module == "csrm" else DROPPED + DROPPED_CSRM
    trained = _rename(_load_checkpoint(Path(checkpoint)), dropped, checkpoint)
    _warn_if_csrm_is_untrained(trained, checkpoint)
    state_dict.update(trained)
    state_dict.update({f"language_model.{name}": tensor for name, tensor in llm.state_dict().items()})

    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    _check_against(model.state_dict(), state_dict)
    model.load_state_dict(state_dict, assign=True)
    model.tie_weights()
    model.generation_config = GenerationConfig(**GENERATION_DEFAULTS, **special_ids)
    processor.tokenizer.model_max_length = min(processor.tokenizer.model_max_length, _longest_prompt(llm))
    _save(model, processor, llm.dtype, output_dir)
    return output_dir


def _longest_prompt(llm: PreTrainedModel) -> int:
    """What leaves room for an answer of the default length, or half of what the language model can read."""
    positions = llm.config.max_position_embeddings
    return max(positions - GENERATION_DEFAULTS["max_new_tokens"], positions // 2)


def _build_processor(language_model, qformer_tokenizer, config: DeltaVLMConfig) -> DeltaVLMProcessor:
    tokenizer = AutoTokenizer.from_pretrained(language_model, **SPECIAL_TOKENS)
    if Path(qformer_tokenizer).is_file():
        bert = BertTokenizer(str(qformer_tokenizer))
    else:
        bert = BertTokenizer.from_pretrained(qformer_tokenizer)
    bert.add_special_tokens({"bos_token": QFORMER_BOS})
    image_size = config.vision_config.image_size
    return DeltaVLMProcessor(
        DeltaVLMImageProcessor(size={"height": image_size, "width": image_size}),
        tokenizer,
        bert,
        num_query_tokens=config.num_query_tokens,
        qformer_prompt="dialogue",
        normalize_text=True,
    )


def _make_room(llm: PreTrainedModel, token_id: int) -> None:
    """
    Gives the language model rows up to `token_id`, as the authors' `[PAD]` has one. Theirs is random; here it is the
    mean of all, which is never the most likely token.
    """
    rows = llm.get_input_embeddings().num_embeddings
    if token_id < rows:
        return
    llm.resize_token_embeddings(token_id + 1, mean_resizing=False)
    with torch.no_grad():
        for table in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            table.weight[rows:] = table.weight[:rows].float().mean(0).to(table.weight.dtype)


def _load_checkpoint(path: Path) -> StateDict:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a file of weights, and nothing else is loaded: {error}") from error
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under 'model'.")
    return state_dict


def _rename(state_dict: StateDict, dropped: tuple[str, ...], source) -> StateDict:
    """Gives the authors' tensors our names, joins the attention's biases, and accounts for every key."""
    renamed, unknown = {}, []
    for name, tensor in state_dict.items():
        if any(re.fullmatch(pattern, name) for pattern in dropped):
            continue
        for pattern, replacement in NAMES:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = tensor
                break
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{source} holds keys that are not of DeltaVLM: {_some(unknown)}.")
    for name in [name for name in renamed if name.endswith("self_attn.q_bias")]:
        attention = name.removesuffix("q_bias")
        if f"{attention}v_bias" not in renamed:
            raise ValueError(f"{source} holds {name}, but not the v_bias that belongs to it.")
        query, value = renamed.pop(name), renamed.pop(f"{attention}v_bias")
        renamed[f"{attention}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


def _read_vision(path: Path, config: DeltaVLMConfig) -> StateDict:
    if path.is_dir():
        return dict(_read_safetensors(path, prefix="vision_model."))
    blocks = config.vision_config.num_hidden_layers
    state_dict = {f"visual_encoder.{name}": tensor for name, tensor in _load_checkpoint(path).items()}
    unused = [
        name
        for name in state_dict
        if (block := re.match(r"visual_encoder\.blocks\.(\d+)\.", name)) and int(block[1]) >= blocks
    ]
    return _rename(state_dict, (*DROPPED_VISION, *map(re.escape, unused)), path)


def _read_safetensors(folder: Path, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}.")
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.startswith(prefix):
                        yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read: {error}") from error


def _warn_if_csrm_is_untrained(state_dict: StateDict, source) -> None:
    weight = state_dict.get("difference.context_difference.weight")
    if weight is not None and weight.abs().max() <= weight.shape[1] ** -0.5:
        logger.warning(
            f"The CSRM weights of {source} lie within the range of their initialisation: they have probably never "
            "been trained. The authors' released training code leaves CSRM out; `difference_module='concat'` is what "
            "such a checkpoint was trained with."
        )


def _check_against(expected: StateDict, state_dict: StateDict) -> None:
    for name, tensor in state_dict.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but the configuration asks for "
                f"{tuple(expected[name].shape)}: pass the `config` that belongs to the checkpoint."
            )
    missing = [name for name in expected if name not in state_dict]
    if missing:
        raise ValueError(
            f"Weights of the model are in none of the sources: {_some(missing)}. Is `vision` the encoder that the "
            "checkpoint was trained from, and do the sizes of `config` agree with it?"
        )
    unexpected = [name for name in state_dict if name not in expected]
    if unexpected:
        raise ValueError(f"The configuration has no place for these weights: {_some(unexpected)}.")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _save(
    model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, dtype: torch.dtype, output_dir: Path
) -> None:
    """
    Writes beside `output_dir` and renames, so that an interrupted run leaves no half-made model. Each weight keeps the
    precision of its source; `dtype`, the language model's, is what all of them are loaded in unless asked otherwise.
    """
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output_dir.name}-", dir=output_dir.parent))
    try:
        model.save_pretrained(partial)
        processor.save_pretrained(partial)
        config = json.loads((partial / CONFIG_NAME).read_text())
        config["dtype"] = str(dtype).removeprefix("torch.")
        (partial / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n")
        partial.chmod(0o755)
        partial.replace(output_dir)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
