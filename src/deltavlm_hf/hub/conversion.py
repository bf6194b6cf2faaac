"""
Conversion of the authors' checkpoint, or of InstructBLIP, to a folder that `from_pretrained` loads.

The authors save only what they train. The frozen rest comes from where they took it: a base vision encoder (an EVA
file or InstructBLIP) and a language model. Every key of the checkpoint is used, or listed in `names` as dropped, and
every weight of the model is given. Weights go from file to file, so that memory holds no more than one shard of the
result.
"""

from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertTokenizer,
    GenerationConfig,
    InstructBlipConfig,
    PreTrainedConfig,
)

from ..modeling import DeltaVLMConfig
from ..modeling.csrm import CrossSemanticRelationMeasuring
from ..modeling.weight_sources import shape
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from .folder import embedding_names, write_folder
from .names import DROPPED, DROPPED_CSRM
from .sources import Origin, Source, Weights, is_local, load_checkpoint, read_eva, rename, warn_if_csrm_is_untrained

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
    output_dir = _check_output(output_dir)
    for source in (checkpoint, vision):
        if not Path(source).exists() and (source is checkpoint or is_local(source)):
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
        origins = [Origin(language_model, stack, prefix="language_model.")]
        if Path(vision).is_file():
            base_vision = read_eva(Path(vision), config.vision_config.num_hidden_layers)
        else:
            origins.append(Origin(vision, stack, only=lambda name: name.startswith("vision_model.")))
            base_vision = origins[-1].weights
        trained = rename(load_checkpoint(Path(checkpoint)), dropped, checkpoint)
        warn_if_csrm_is_untrained(trained, checkpoint)
        weights = {**base_vision, **trained, **origins[0].weights}
        _extend_vocabulary(weights, config.text_config, special_ids["pad_token_id"])
        config.text_config.update(special_ids)
        write_folder(weights, config, processor, generation, output_dir, origins if small else [], max_shard_size)
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
    output_dir = _check_output(output_dir)
    if is_local(instructblip) and not Path(instructblip).is_dir():
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
        origin = Origin(instructblip, stack)
        weights = {**origin.weights, **_neutral_csrm(config)}
        _extend_vocabulary(weights, config.text_config, special_ids["pad_token_id"])
        config.text_config.update(special_ids)
        generation = GenerationConfig(**special_ids)
        write_folder(weights, config, processor, generation, output_dir, [origin] if small else [], max_shard_size)
    return output_dir


def _check_output(output_dir: Source) -> Path:
    output_dir = Path(output_dir)
    if output_dir.exists() and (
        not output_dir.is_dir() or any(not path.name.startswith(".saving-") for path in output_dir.iterdir())
    ):
        raise FileExistsError(f"{output_dir} exists already: choose another `output_dir` or remove it first.")
    return output_dir


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


def _extend_vocabulary(weights: Weights, text_config: PreTrainedConfig, token_id: int) -> None:
    """
    Gives the language model rows up to `token_id`, as the authors' `[PAD]` has one. Theirs is random; here it is the
    mean of all, which is never the most likely token.
    """
    for name in embedding_names(text_config):
        rows = shape(weights[name])[0] if name in weights else token_id + 1
        if rows <= token_id:
            table = weights[name][...]
            mean = table.mean(0, keepdim=True, dtype=torch.float32).to(table.dtype)
            weights[name] = torch.cat([table, mean.expand(token_id + 1 - rows, -1)])
            text_config.vocab_size = token_id + 1


def _neutral_csrm(config: DeltaVLMConfig) -> Weights:
    width = config.vision_config.hidden_size
    csrm = CrossSemanticRelationMeasuring(width, config.difference_dropout)
    nn.init.zeros_(csrm.output.bias)
    nn.init.zeros_(csrm.output.weight)
    nn.init.eye_(csrm.output.weight[:, :width])
    return {f"difference.{name}": tensor for name, tensor in csrm.state_dict().items()}
