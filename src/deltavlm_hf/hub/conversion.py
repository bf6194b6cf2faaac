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
from .folder import embedding_names, write_folder
from .names import DROPPED, DROPPED_CSRM
from .parts import MAX_NEW_TOKENS, SPECIAL_IDS, build_processor, check_output
from .sources import Origin, Source, Weights, is_local, load_checkpoint, read_eva, rename, warn_if_csrm_is_untrained

# The authors' `generate` (LAVIS), with embeddings as input.
GENERATION_DEFAULTS = {"num_beams": 5, "max_new_tokens": MAX_NEW_TOKENS, "repetition_penalty": 1.5, "do_sample": False}
# How the authors load the tokenizer: beginning, end and unknown are all `</s>`.
SPECIAL_TOKENS = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "[PAD]"}
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
    output_dir = check_output(output_dir)
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
    processor = build_processor(
        tokenizer, _read_bert(qformer_tokenizer), config, qformer_prompt="dialogue", normalize_text=True
    )
    special_ids = {name: getattr(processor.tokenizer, name) for name in SPECIAL_IDS}
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
    output_dir = check_output(output_dir)
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
    processor = build_processor(tokenizer, bert, config)
    special_ids = {name: getattr(processor.tokenizer, name) for name in SPECIAL_IDS}
    with ExitStack() as stack:
        origin = Origin(instructblip, stack)
        weights = {**origin.weights, **_neutral_csrm(config)}
        _extend_vocabulary(weights, config.text_config, special_ids["pad_token_id"])
        config.text_config.update(special_ids)
        generation = GenerationConfig(**special_ids)
        write_folder(weights, config, processor, generation, output_dir, [origin] if small else [], max_shard_size)
    return output_dir


def _read_bert(source: Source) -> BertTokenizer:
    bert = BertTokenizer(str(source)) if Path(source).is_file() else BertTokenizer.from_pretrained(source)
    bert.add_special_tokens({"bos_token": QFORMER_BOS})
    return bert


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
