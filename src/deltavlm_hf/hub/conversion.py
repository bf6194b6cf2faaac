"""
Conversion of the authors' checkpoint, or of InstructBLIP, to a folder that `from_pretrained` loads.

The authors save only what they train. The frozen rest comes from where they took it: a base vision encoder (an EVA
file or InstructBLIP) and a language model. Every key of the checkpoint is used, or listed in `names` as dropped, and
every weight of the model is given. Weights go from file to file, so that memory holds no more than one shard of the
result.
"""

import json
import math
import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    InstructBlipConfig,
    PreTrainedConfig,
    logging,
)
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME
from transformers.utils.hub import extract_commit_hash

from ..files import making
from ..modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from ..modeling.csrm import CrossSemanticRelationMeasuring
from ..modeling.weight_sources import digest, find_files, first_values, open_weights, read_torch_file, shape
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from .names import DROPPED, DROPPED_CSRM, DROPPED_LANGUAGE_MODEL, DROPPED_VISION, NAMES

logger = logging.get_logger(__name__)

Weights = dict[str, Any]  # by name: tensors, or slices of files that are read with `[...]`
Source = str | os.PathLike

# The authors' `generate` (LAVIS), with embeddings as input: their `max_length=256` counts one id that is not there.
GENERATION_DEFAULTS = {"num_beams": 5, "max_new_tokens": 255, "repetition_penalty": 1.5, "do_sample": False}
# How the authors load the tokenizer: beginning, end and unknown are all `</s>`.
SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
QFORMER_BOS = "[DEC]"


def convert_original_checkpoint(
    checkpoint: Source,
    *,
    vision: Source,
    language_model: Source,
    qformer_tokenizer: Source,
    output_dir: Source,
    config: DeltaVLMConfig | None = None,
    small: bool = False,
    max_shard_size: int | str = "2GB",
) -> Path:
    """
    Converts a checkpoint of the authors' release.

    Args:
        checkpoint: the authors' `checkpoint_best.pth`.
        vision: the base vision encoder: an EVA-ViT file (`.pth`), or InstructBLIP, a folder or Hub id. Where the
            checkpoint holds trained blocks, they win.
        language_model: folder or Hub id of the language model that the checkpoint was trained with.
        qformer_tokenizer: folder or Hub id of `bert-base-uncased`, or its `vocab.txt`.
        output_dir: the folder to make. It is written under another name and renamed when it is complete.
        config: sizes that cannot be read off weights (heads, image size); by default the paper's. Its `text_config`
            and `image_token_id` are replaced by what the language model's folder says.
        small: leave out the weights that are in `vision` and `language_model`, and point there instead: at this very
            commit of a Hub id, or at the folder.
        max_shard_size: of the files of weights, for example `"2GB"`. Memory holds one of them at a time.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        FileNotFoundError: if a source is missing.
        ValueError: if a file holds no weights, a key of the checkpoint is unknown, a shape differs from the
            configuration's, a weight of the model is in none of the sources, or `small` would have to point to a
            single file.
    """
    output_dir = _free(output_dir)
    for source in (checkpoint, vision):
        if not Path(source).exists() and (source is checkpoint or _is_local(source)):
            raise FileNotFoundError(f"{source} does not exist.")
    if small and Path(vision).is_file():
        raise ValueError(
            f"A small checkpoint points to places that `from_pretrained` reads, which {vision} is not: give "
            "InstructBLIP as `vision`, or convert the whole."
        )
    config = DeltaVLMConfig() if config is None else DeltaVLMConfig.from_dict(config.to_dict())
    config.text_config = AutoConfig.from_pretrained(language_model)
    tokenizer = AutoTokenizer.from_pretrained(language_model, **SPECIAL_TOKENS)
    processor = _build_processor(
        tokenizer, _read_bert(qformer_tokenizer), config, qformer_prompt="dialogue", normalize_text=True
    )
    special_ids = {name: getattr(processor.tokenizer, name) for name in SPECIAL_IDS}
    config.image_token_id = processor.image_token_id
    generation = GenerationConfig(**GENERATION_DEFAULTS, **special_ids)
    dropped = DROPPED if config.difference_module == "csrm" else DROPPED + DROPPED_CSRM
    with ExitStack() as stack:
        origins = [_Origin(language_model, stack, prefix="language_model.")]
        if Path(vision).is_file():
            base_vision = _read_eva(Path(vision), config)
        else:
            origins.append(_Origin(vision, stack, only=lambda name: name.startswith("vision_model.")))
            base_vision = origins[-1].weights
        trained = _rename(_load_checkpoint(Path(checkpoint)), dropped, checkpoint)
        _warn_if_csrm_is_untrained(trained, checkpoint)
        weights = {**base_vision, **trained, **origins[0].weights}
        _make_room(weights, config.text_config, special_ids["pad_token_id"])
        config.text_config.update(special_ids)
        _write(weights, config, processor, generation, output_dir, origins if small else [], max_shard_size)
    return output_dir


def convert_instructblip(
    instructblip: Source, *, output_dir: Source, small: bool = False, max_shard_size: int | str = "2GB"
) -> Path:
    """
    Makes a DeltaVLM to train from InstructBLIP alone, for users without the authors' checkpoint.

    The CSRM's output layer begins as the identity on each date's own features, so that what the Q-Former reads are
    InstructBLIP's features of one date behind those of the other: of two equal images the model says what InstructBLIP
    says of the one. Difference and relation come in as training moves that layer. The other layers of the CSRM are
    random, by the seed of torch.

    Args:
        instructblip: folder or Hub id of InstructBLIP with a language model that only decodes, such as
            `Salesforce/instructblip-vicuna-7b`, with its processor.
        output_dir: the folder to make. It is written under another name and renamed when it is complete.
        small: leave out InstructBLIP's weights, and point there instead.
        max_shard_size: of the files of weights, for example `"2GB"`.

    Returns:
        `Path`: `output_dir`.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        FileNotFoundError: if the folder is missing.
        ValueError: if it is no InstructBLIP.
    """
    output_dir = _free(output_dir)
    if _is_local(instructblip) and not Path(instructblip).is_dir():
        raise FileNotFoundError(f"{instructblip} does not exist.")
    base = AutoConfig.from_pretrained(instructblip)
    if not isinstance(base, InstructBlipConfig):
        raise ValueError(f"{instructblip} is a {base.model_type!r}, expected an InstructBLIP.")
    tokenizer = AutoTokenizer.from_pretrained(instructblip)
    bert = AutoTokenizer.from_pretrained(instructblip, subfolder="qformer_tokenizer")
    config = DeltaVLMConfig(
        vision_config=base.vision_config,
        qformer_config=base.qformer_config,
        text_config=base.text_config,
        num_query_tokens=base.num_query_tokens,
        post_layernorm_eps=base.vision_config.layer_norm_eps,
    )
    processor = _build_processor(tokenizer, bert, config)
    config.image_token_id = processor.image_token_id
    special_ids = {name: getattr(processor.tokenizer, name) for name in SPECIAL_IDS}
    with ExitStack() as stack:
        origin = _Origin(instructblip, stack)
        weights = {**origin.weights, **_neutral_csrm(config)}
        _make_room(weights, config.text_config, special_ids["pad_token_id"])
        config.text_config.update(special_ids)
        generation = GenerationConfig(**special_ids)
        _write(weights, config, processor, generation, output_dir, [origin] if small else [], max_shard_size)
    return output_dir


def _free(output_dir: Source) -> Path:
    output_dir = Path(output_dir)
    if output_dir.exists() and (
        not output_dir.is_dir() or any(not path.name.startswith(".saving-") for path in output_dir.iterdir())
    ):
        raise FileExistsError(f"{output_dir} exists already: choose another `output_dir` or remove it first.")
    return output_dir


def _is_local(source: Source) -> bool:
    """Whether a source can only be a path: a Hub id is `owner/name` at most."""
    text = os.fspath(source)
    return not isinstance(source, str) or os.path.isabs(text) or text.startswith(".") or Path(text).suffix == ".pth"


class _Origin:
    """Where the frozen weights come from: a folder or Hub id in the form of `save_pretrained`."""

    def __init__(
        self, source: Source, stack: ExitStack, prefix: str = "", only: Callable[[str], bool] = lambda name: True
    ):
        name = os.path.abspath(source) if os.path.isdir(source) else os.fspath(source)
        self.place = {"name_or_path": name, "prefix": prefix}
        self.files: dict[str, Weights] = {}  # by path
        try:
            files = find_files(self.place, only)
        except OSError as error:
            raise FileNotFoundError(str(error)) from error
        for file in files:
            found = open_weights([file], stack)
            self.place.setdefault("revision", extract_commit_hash(file, None))
            self.files[file] = {prefix + name: weight for name, weight in found.items()}
        self.weights = {
            name: weight
            for found in self.files.values()
            for name, weight in found.items()
            if only(name) and not DROPPED_LANGUAGE_MODEL.fullmatch(name)
        }

    def pointer(self, names: set[str]) -> dict[str, Any]:
        """For `weight_sources`: to the files that hold some of these weights."""
        digests = {Path(file).name: digest(file) for file, found in self.files.items() if names & found.keys()}
        return {key: value for key, value in {**self.place, "digests": digests}.items() if value is not None}


def _longest_prompt(text_config: PreTrainedConfig) -> int:
    """What leaves room for an answer of the default length, or half of what the language model can read."""
    positions = text_config.max_position_embeddings
    return max(positions - GENERATION_DEFAULTS["max_new_tokens"], positions // 2)


def _read_bert(source: Source) -> BertTokenizer:
    bert = BertTokenizer(str(source)) if Path(source).is_file() else BertTokenizer.from_pretrained(source)
    bert.add_special_tokens({"bos_token": QFORMER_BOS})
    return bert


def _build_processor(tokenizer, bert, config: DeltaVLMConfig, **kwargs) -> DeltaVLMProcessor:
    size = config.vision_config.image_size
    image_processor = DeltaVLMImageProcessor(size={"height": size, "width": size})
    processor = DeltaVLMProcessor(image_processor, tokenizer, bert, num_query_tokens=config.num_query_tokens, **kwargs)
    tokenizer.model_max_length = min(tokenizer.model_max_length, _longest_prompt(config.text_config))
    return processor


def _make_room(weights: Weights, text_config: PreTrainedConfig, token_id: int) -> None:
    """
    Gives the language model rows up to `token_id`, as the authors' `[PAD]` has one. Theirs is random; here it is the
    mean of all, which is never the most likely token.
    """
    for name in _tables(text_config):
        rows = shape(weights[name])[0] if name in weights else token_id + 1
        if rows <= token_id:
            table = weights[name][...]
            mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(token_id + 1 - rows, -1)])
            text_config.vocab_size = token_id + 1


def _tables(text_config: PreTrainedConfig) -> list[str]:
    """The names of the language model's embeddings: of what it reads, and of what it writes."""
    with torch.device("meta"):
        llm = AutoModelForCausalLM.from_config(text_config)
    names = {module: name for name, module in llm.named_modules()}
    return [
        f"language_model.{names[table]}.weight" for table in (llm.get_input_embeddings(), llm.get_output_embeddings())
    ]


def _neutral_csrm(config: DeltaVLMConfig) -> Weights:
    width = config.vision_config.hidden_size
    csrm = CrossSemanticRelationMeasuring(width, config.difference_dropout)
    nn.init.zeros_(csrm.output.bias)
    nn.init.zeros_(csrm.output.weight)
    nn.init.eye_(csrm.output.weight[:, :width])
    return {f"difference.{name}": tensor for name, tensor in csrm.state_dict().items()}


def _load_checkpoint(path: Path) -> Weights:
    checkpoint = read_torch_file(path)
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under 'model'.")
    return state_dict


def _rename(state_dict: Weights, dropped: tuple[str, ...], source: Source) -> Weights:
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


def _read_eva(path: Path, config: DeltaVLMConfig) -> Weights:
    blocks = config.vision_config.num_hidden_layers
    state_dict = {f"visual_encoder.{name}": tensor for name, tensor in _load_checkpoint(path).items()}
    unused = [
        name
        for name in state_dict
        if (block := re.match(r"visual_encoder\.blocks\.(\d+)\.", name)) and int(block[1]) >= blocks
    ]
    return _rename(state_dict, (*DROPPED_VISION, *map(re.escape, unused)), path)


def _warn_if_csrm_is_untrained(state_dict: Weights, source: Source) -> None:
    weight = state_dict.get("difference.context_delta.weight")
    if weight is not None and weight.abs().max() <= weight.shape[1] ** -0.5:
        logger.warning(
            f"The CSRM weights of {source} lie within the range of their initialisation: they have probably never "
            "been trained. The authors' released training code leaves CSRM out; `difference_module='concat'` is what "
            "such a checkpoint was trained with."
        )


def _check_against(model: DeltaVLMForConditionalGeneration, weights: Weights) -> None:
    expected = model.state_dict()
    for name, weight in weights.items():
        if name in expected and shape(weight) != tuple(expected[name].shape):
            raise ValueError(
                f"{name} has shape {shape(weight)}, but the configuration asks for {tuple(expected[name].shape)}: "
                "pass the `config` that belongs to the checkpoint."
            )
    missing = [name for name in expected if name not in weights and name not in model.all_tied_weights_keys]
    if missing:
        raise ValueError(
            f"Weights of the model are in none of the sources: {_some(missing)}. Is `vision` the encoder that the "
            "checkpoint was trained from, and do the sizes of `config` agree with it?"
        )
    unexpected = [name for name in weights if name not in expected]
    if unexpected:
        raise ValueError(f"The configuration has no place for these weights: {_some(unexpected)}.")


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _write(
    weights: Weights,
    config: DeltaVLMConfig,
    processor: DeltaVLMProcessor,
    generation: GenerationConfig,
    output_dir: Path,
    pointed_at: list[_Origin],
    max_shard_size: int | str,
) -> None:
    """
    Writes apart and renames, so that an interrupted run leaves no half-made model. Each weight keeps the precision of
    its source; `dtype`, the language model's, is what all of them are loaded in unless asked otherwise.
    """
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    _check_against(model, weights)
    config.dtype = _dtype(weights[_tables(config.text_config)[0]])
    config.architectures = [type(model).__name__]
    sources = []
    for origin in pointed_at:
        left_out = {name for name, weight in weights.items() if weight is origin.weights.get(name)}
        sources.append(origin.pointer(left_out))
        weights = {name: weight for name, weight in weights.items() if name not in left_out}
    config.weight_sources = sources or None
    with making(output_dir) as new:
        save_without_weights(config, processor, Path(new))
        generation.save_pretrained(new)
        _write_shards(weights, Path(new), max_shard_size)


def save_without_weights(config: DeltaVLMConfig, processor: DeltaVLMProcessor, folder: Path) -> None:
    """Writes configuration, processor and the code that both name, so that the folder loads without this package."""
    with torch.device("meta"):
        model = DeltaVLMForConditionalGeneration(config)
    custom_object_save(model, folder)
    config.auto_map = dict(model.auto_map)
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def _write_shards(weights: Weights, folder: Path, max_shard_size: int | str) -> None:
    split = split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda weight: math.prod(shape(weight)) * _dtype(weight).itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: weights[name][...].contiguous() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _dtype(weight: Any) -> torch.dtype:
    return first_values(weight).dtype
