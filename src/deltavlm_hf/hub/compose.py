"""
A DeltaVLM of parts that others trained: any vision encoder, any causal language model, a Q-Former between them.

What no part brings is new, and must be trained before any answer means something.
"""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    GenerationConfig,
    InstructBlipConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..files import making
from ..modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration, DeltaVLMModel
from ..modeling.weight_sources import shape
from ..processing import DeltaVLMProcessor
from ..processing.processing_deltavlm import IMAGE_TOKEN
from ..training import leave_out_frozen
from .encoders import Encoder, count_finer_maps, read_config, read_encoder
from .gguf import find_gguf
from .licences import describe_part
from .parts import SPECIAL_IDS, build_processor, check_output
from .sources import Origin, Source, Weights, named, rename

# Of BERT: what the Q-Former has no place for.
DROPPED_BERT = (r"Qformer\.bert\.embeddings\.(token_type_embeddings\.weight|position_ids)",)
_OF_BERT = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "vocab_size",
)


class Composition(NamedTuple):
    """
    Args:
        model ([`DeltaVLMForConditionalGeneration`]): in evaluation mode; what it has from the vision encoder and the
            language model is frozen.
        processor ([`DeltaVLMProcessor`]): that belongs to it.
        new (`list[str]`): the parts of the model that are random and must be trained, by name.
    """

    model: DeltaVLMForConditionalGeneration
    processor: DeltaVLMProcessor
    new: list[str]


def compose(
    vision: Source | PreTrainedConfig | PreTrainedModel,
    language_model: Source,
    *,
    qformer: Source | None = None,
    qformer_config: dict[str, Any] | None = None,
    tokenizer: Source | PreTrainedTokenizerBase | None = None,
    qformer_tokenizer: Source | PreTrainedTokenizerBase | None = None,
    image_size: int | None = None,
    out_indices: Sequence[int] | None = None,
    num_query_tokens: int = 32,
    mask_classes: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    output_dir: Source | None = None,
    small: bool = False,
    **settings,
) -> Composition:
    """
    Makes a model to train from parts.

    Nothing but weights and settings is taken from a part: no code, and of a backbone safetensors alone.

    Args:
        vision: the encoder, as folder or Hub id: any backbone of Transformers (DINOv2, DINOv3, Swin, ConvNeXt, ...) or
            InstructBLIP. Or a backbone that is loaded; or a configuration, for an encoder that begins untrained.
            Size, mean, standard deviation, filter and scale of the processor are those of its
            `preprocessor_config.json`; without one, mean and standard deviation of ImageNet (EfficientNet-Lite: 0.5;
            InstructBLIP's ViT: CLIP's), and the size of its `config.json`.
        language_model: folder or Hub id of a causal language model, with its tokenizer; or a GGUF file, here or
            on the Hub (`owner/name/file.gguf`), which holds both. What it has in few bits becomes `dtype`, by default
            float32, and is written with the model: a pointer cannot lead there.
        qformer: folder or Hub id of an InstructBLIP or a DeltaVLM, whose Q-Former and query tokens are taken where
            shapes fit, or of a BERT, whose layers are. By default it begins untrained.
        qformer_config: settings of an untrained Q-Former. By default 6 layers that all read the images, as wide as
            vision tokens and the language model allow, up to 768.
        tokenizer: in place of the language model's own. Without a padding token it pads with its end of text.
        qformer_tokenizer: folder, Hub id or `vocab.txt` of a BERT. By default that of `qformer`, else the language
            model's own.
        image_size: the side of the images, in pixels, where the encoder takes other sizes than its own.
        out_indices: which feature maps tokens are made of. By default, where the stride is the same throughout (a
            ViT), four layers, evenly up to the last; else all stages.
        num_query_tokens: how many change tokens the language model reads of a pair.
        mask_classes: names of what change masks are made for. The decoder then reads the feature maps that are finer
            than the tokens' grid, unless `mask_skip_maps` says how many.
        dtype: of the whole model; by default the language model's own.
        output_dir: a folder to write model and processor to, whole or not at all.
        small: of `output_dir`: leave out what lies unchanged in `vision` and `language_model`, and point there.
        settings: others of [`DeltaVLMConfig`], such as `neck_hidden_size`, `neck_stride` and `difference_module`.

    Returns:
        [`Composition`]: model, processor and the names of what is new. `leave_out_frozen(model)` makes small
        checkpoints of it at once: `config.weight_sources` says where its parts are; `config.made_from`, which these
        are and under what licences, as far as they say so.

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        OSError: if a part is missing.
        ValueError: if a part is none, or parts do not go together.
    """
    if output_dir is not None:
        output_dir = check_output(output_dir)
    elif small:
        raise ValueError("`small` is about `output_dir`: give that, or call `leave_out_frozen(model)`.")
    if qformer is not None and qformer_config is not None:
        raise ValueError("`qformer_config` is for a Q-Former that begins untrained: leave it or `qformer` out.")
    llm_place, gguf = find_gguf(language_model)
    text_config = read_config(llm_place, **gguf)
    if text_config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{language_model} is a {text_config.model_type!r}, expected a causal language model.")
    dtype = dtype or text_config.dtype or torch.float32
    of_llm = _read_tokenizer(llm_place, **gguf) if tokenizer is None else _read_tokenizer(tokenizer)
    _check_vocabulary("language model", of_llm, text_config.vocab_size)
    if of_llm.eos_token_id is None:
        raise ValueError("The language model's tokenizer has no end of text (`eos_token`): no answer would end.")
    made_from = None if qformer is None else _read_qformer_config(qformer)
    if qformer_tokenizer is None and qformer is not None:
        of_qformer = _read_tokenizer(qformer, "" if isinstance(made_from, BertConfig) else "qformer_tokenizer")
    elif qformer_tokenizer is None:
        of_qformer = _read_tokenizer(llm_place, **gguf)
    else:
        of_qformer = _read_tokenizer(qformer_tokenizer)

    encoder = read_encoder(vision, image_size, out_indices, dtype)
    of_neck = {name: settings[name] for name in ("neck_hidden_size", "neck_stride") if name in settings}
    plain = DeltaVLMConfig(vision_config=encoder.config, **of_neck)
    if mask_classes is not None:
        settings = {"mask_skip_maps": count_finer_maps(plain), **settings, "mask_classes": list(mask_classes)}
    if not plain.has_backbone:
        settings = {"post_layernorm_eps": encoder.config.layer_norm_eps, **settings}
    if made_from is None:
        of_new = _new_qformer(min(plain.vision_width, text_config.hidden_size))
        qformer_config = {**of_new, "vocab_size": _size(of_qformer), **(qformer_config or {})}
    else:
        qformer_config = _qformer_settings(made_from)
    config = DeltaVLMConfig(
        vision_config=encoder.config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=num_query_tokens,
        **settings,
    )
    _check_vocabulary("Q-Former", of_qformer, config.qformer_config.vocab_size)
    longest = min(128, config.qformer_config.max_position_embeddings)
    processor = build_processor(of_llm, of_qformer, config, encoder.pixels, qformer_max_length=longest)
    special_ids = {name: getattr(of_llm, name) for name in SPECIAL_IDS}
    text_config.update(special_ids)

    model = DeltaVLMModel._from_config(config, dtype=dtype)
    new = {name for name, _ in model.named_parameters()} - _give_encoder(model, encoder)
    if made_from is not None:
        new -= _load_qformer(model, qformer, made_from)
    llm = AutoModelForCausalLM.from_pretrained(
        llm_place, config=text_config, dtype=dtype, trust_remote_code=False, **gguf
    ).requires_grad_(False)
    if gguf:  # whose few bits are full weights by now
        llm.hf_quantizer = None
        llm.config.__dict__.pop("quantization_config", None)
    config.text_config = llm.config
    for part in (config.vision_config, config.text_config):
        if os.path.isdir(part.name_or_path):
            part.name_or_path = ""  # a folder of this machine says nothing to others; an id on the Hub does
    whole = _with_language_model(model, llm)
    whole.generation_config = GenerationConfig(**special_ids)
    # An InstructBLIP has a language model too: this one's is looked for first.
    sources = [None if gguf else {"name_or_path": named(llm_place), "prefix": "language_model."}, encoder.source]
    config.weight_sources = [source for source in sources if source is not None]
    places = {"vision_model": vision if encoder.source else None, "language_model": language_model, "qformer": qformer}
    config.made_from = [describe_part(part, place) for part, place in places.items() if place is not None]
    if small:
        leave_out_frozen(whole)
    if output_dir is not None:
        with making(output_dir) as folder:
            whole.save_pretrained(folder)
            processor.save_pretrained(folder)
    return Composition(whole.eval(), processor, _parts_of(whole, new))


def _give_encoder(model: DeltaVLMModel, encoder: Encoder) -> set[str]:
    """Gives the model its encoder's weights, frozen; the names of these."""
    if encoder.model is None:
        return set()
    if model.config.has_backbone:
        part, model.vision_model.backbone = "vision_model.backbone.", encoder.model
    else:
        part = "vision_model."
        model.vision_model.load_state_dict(encoder.model.state_dict())
    loaded = {f"{part}{name}" for name, _ in encoder.model.named_parameters() if name not in encoder.new}
    for name, parameter in model.vision_model.named_parameters(prefix="vision_model"):
        parameter.requires_grad_(name not in loaded)
    return loaded


def _with_language_model(model: DeltaVLMModel, llm: PreTrainedModel) -> DeltaVLMForConditionalGeneration:
    """The whole of both, without making a language model first that would be thrown away."""
    with torch.device("meta"):
        whole = DeltaVLMForConditionalGeneration(model.config)
    for name, part in model.named_children():
        setattr(whole, name, part)
    whole.query_tokens, whole.language_model = model.query_tokens, llm
    return whole


def _read_tokenizer(
    source: Source | PreTrainedTokenizerBase, subfolder: str = "", **gguf: str
) -> PreTrainedTokenizerBase:
    if isinstance(source, PreTrainedTokenizerBase):
        tokenizer = source
    elif Path(source).is_file():
        tokenizer = BertTokenizer(str(source))
    else:
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=subfolder, trust_remote_code=False, **gguf)
    if tokenizer.pad_token_id is None:  # padding is masked: any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How large a vocabulary must be that has all tokens but the placeholder, which is never looked up."""
    return 1 + max(index for token, index in tokenizer.get_vocab().items() if token != IMAGE_TOKEN)


def _check_vocabulary(part: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    if _size(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer of the {part} has {_size(tokenizer)} tokens, but the {part} knows {vocab_size}: it is "
            "another model's."
        )


def _new_qformer(width: int) -> dict[str, Any]:
    width = max(64, min(768, width) // 64 * 64)
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_hidden_layers": 6,
        "cross_attention_frequency": 1,
    }


def _read_qformer_config(qformer: Source) -> PreTrainedConfig:
    config = read_config(qformer)
    if not isinstance(config, BertConfig | InstructBlipConfig | DeltaVLMConfig):
        raise ValueError(f"{qformer} is a {config.model_type!r}, expected an InstructBLIP, a DeltaVLM or a BERT.")
    return config


def _qformer_settings(made_from: PreTrainedConfig) -> dict[str, Any]:
    if isinstance(made_from, BertConfig):
        return {name: getattr(made_from, name) for name in _OF_BERT}
    return made_from.qformer_config.to_dict()


def _load_qformer(model: DeltaVLMModel, qformer: Source, made_from: PreTrainedConfig) -> set[str]:
    """Gives the Q-Former what fits; the names of that."""
    own, loaded = model.state_dict(), set()
    with ExitStack() as stack:
        weights = Origin(qformer, stack).weights
        if isinstance(made_from, BertConfig):
            weights = _as_qformer(weights, qformer)
        for name, weight in weights.items():
            if name.startswith(("qformer.", "query_tokens")) and name in own and shape(weight) == own[name].shape:
                own[name].copy_(weight[...])
                loaded.add(name)
    if not loaded:
        raise ValueError(f"{qformer} holds no weights that fit into its Q-Former.")
    return loaded


def _as_qformer(weights: Weights, source: Source) -> Weights:
    """BERT's layers under the Q-Former's names; what queries go through begins as what text goes through."""
    named = {
        f"Qformer.bert.{name}".replace("LayerNorm.gamma", "LayerNorm.weight").replace(
            "LayerNorm.beta", "LayerNorm.bias"
        ): weight
        for name, weight in ((name.removeprefix("bert."), weight) for name, weight in weights.items())
        if name.startswith(("embeddings.", "encoder."))
    }
    found = rename(named, DROPPED_BERT, source)
    of_queries = {
        re.sub(r"(layer\.\d+\.(?:intermediate|output))\.", r"\1_query.", name): weight
        for name, weight in found.items()
    }
    return {**of_queries, **found}


def _parts_of(model: nn.Module, names: set[str], prefix: str = "") -> list[str]:
    """Parameters by name, with one name for a module all of whose parameters are among them."""
    own = {f"{prefix}{name}" for name, _ in model.named_parameters(remove_duplicate=False)}
    if own and own <= names:
        return [prefix.removesuffix(".")]
    found = [f"{prefix}{name}" for name, _ in model.named_parameters(recurse=False) if f"{prefix}{name}" in names]
    for name, part in model.named_children():
        if any(each.startswith(f"{prefix}{name}.") for each in names):
            found += _parts_of(part, names, f"{prefix}{name}.")
    return found
