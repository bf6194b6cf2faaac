"""
A checkpoint as a model of its own: every weight in it, in one precision, an adapter merged, nothing to point to. Or
its language model alone.

What was measured of the checkpoint holds for the whole too: `export.json` beside the weights says of which checkpoint
they were made, and which they are.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, PreTrainedModel

from ..files import find_licences, making
from ..inference.identity import EXPORT_FILE, fingerprint, fingerprint_of
from ..inference.loading import find_source, load_model
from ..modeling import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..training import SETTINGS_FILE, merge_lora
from .parts import check_output, find_dtype
from .sources import Source


class Export(NamedTuple):
    """
    Args:
        folder (`Path`): the model.
        weights (`int`): how many numbers it holds.
        dtype (`str`): in which precision.
        changes (`list[str]`): what makes it answer a little otherwise than the checkpoint, if anything does.
    """

    folder: Path
    weights: int
    dtype: str
    changes: list[str]


def export(
    checkpoint: Source, output_dir: Source, *, dtype: str = "auto", max_shard_size: int | str = "2GB"
) -> Export:
    """
    Makes a whole model of a checkpoint, small or not, with its processor, licence and the settings of its training.

    Args:
        checkpoint: folder or Hub id; `small` or `tiny` for the models inside the package.
        output_dir: the folder to make. It is written under another name and renamed when it is complete.
        dtype: the precision of all weights, such as `"bfloat16"`; by default that in which the checkpoint is loaded.
        max_shard_size: of the files of weights, for example `"2GB"`.

    Returns:
        [`Export`].

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        ValueError: if there is no such model or precision.
    """
    made = _load(checkpoint, output_dir, dtype)
    config: DeltaVLMConfig = made.model.config
    config.made_from = _origins(config) or None
    with making(made.output_dir) as new:
        made.model.save_pretrained(new, only_trained=False, max_shard_size=max_shard_size)
        made.processor.save_pretrained(new)
        for file in _beside(Path(made.source)):
            shutil.copy(file, new)
        made.sign(Path(new))
    return made.report(made.model)


def export_language_model(
    checkpoint: Source, output_dir: Source, *, dtype: str = "auto", max_shard_size: int | str = "2GB"
) -> Export:
    """
    Makes a plain folder of a model's language model, with its tokenizer and the way to generate, as
    `AutoModelForCausalLM`, vLLM and others load it. It gives the logits that it gives inside the model; its vocabulary
    stays what it is.

    Args: see [`export`].

    Returns:
        [`Export`].

    Raises:
        FileExistsError: if `output_dir` exists and is not empty.
        ValueError: if there is no such model or precision, or the model is saved in 4-bit.
    """
    made = _load(checkpoint, output_dir, dtype)
    llm = made.model.language_model
    llm.generation_config = made.model.generation_config
    with making(made.output_dir) as new:
        llm.save_pretrained(new, max_shard_size=max_shard_size)
        made.processor.tokenizer.save_pretrained(new)
        made.sign(Path(new))
    return made.report(llm)


class _Loaded(NamedTuple):
    """A checkpoint, whole in memory, and the folder to make of it."""

    source: str
    output_dir: Path
    model: DeltaVLMForConditionalGeneration
    processor: DeltaVLMProcessor
    made_of: str
    changes: list[str]

    def sign(self, folder: Path) -> None:
        said = {"of": self.made_of, "is": fingerprint(str(folder)), "changes": self.changes}
        (folder / EXPORT_FILE).write_text(json.dumps(said, indent=2) + "\n")

    def report(self, part: PreTrainedModel) -> Export:
        return Export(
            self.output_dir, part.num_parameters(), str(self.model.dtype).removeprefix("torch."), self.changes
        )


def _load(checkpoint: Source, output_dir: Source, dtype: str) -> _Loaded:
    output_dir = check_output(output_dir)
    if dtype != "auto":
        find_dtype(dtype)
    source = find_source(str(checkpoint))
    model, processor = load_model(str(checkpoint), "cpu", dtype)
    if getattr(model, "is_quantized", False):
        raise ValueError(
            f"{checkpoint} is saved with a quantised language model, whose full weights are not there: export the "
            "checkpoint that it was made of."
        )
    config: DeltaVLMConfig = model.config
    made_of = fingerprint_of(model)
    changes = _rounding(source, model.weights_revision, model.dtype)
    if config.language_model_lora:
        merge_lora(model)
        changes.append("its LoRA adapter was merged")
    return _Loaded(source, output_dir, model, processor, made_of, changes)


def read_export(folder: Path, known: str) -> tuple[str | None, list[str]]:
    """
    Of which checkpoint a folder was made, by its [`fingerprint`], and what was changed; nothing where it was not, or
    holds something else by now.

    Args:
        folder (`Path`): the model.
        known (`str`): its own fingerprint.
    """
    try:
        said = json.loads((folder / EXPORT_FILE).read_text())
        return (str(said["of"]), [str(each) for each in said["changes"]]) if said["is"] == known else (None, [])
    except (OSError, ValueError, LookupError, TypeError):
        return None, []


def _rounding(source: str, revision: str | None, dtype: torch.dtype) -> list[str]:
    """What a precision loses of the one that the checkpoint is loaded in by itself, which it was measured in."""
    own = AutoConfig.from_pretrained(source, revision=revision).dtype or torch.float32
    return [] if dtype in (own, torch.float32) else [f"its weights were rounded to {dtype}".replace("torch.", "")]


def _origins(config: DeltaVLMConfig) -> list[dict[str, Any]]:
    """What the model card names as its bases: with the pointers gone, the configuration keeps their names."""
    found: list[Mapping[str, Any]] = list(config.made_from or [])
    named = {each.get("name") for each in found}
    for source in config.weight_sources or []:
        place, revision = source["name_or_path"], source.get("revision")
        if not Path(place).exists() and place.count("/") == 1 and place not in named:
            part = source.get("prefix", "").partition(".")[0]
            found.append({"part": part, "name": place, **({"revision": revision} if revision else {})})
    return [dict(each) for each in found]


def _beside(folder: Path) -> list[Path]:
    """A licence and the settings of a training run; of one of the run's checkpoints these lie a folder higher."""
    run = folder.parent if folder.name.startswith("checkpoint-") else folder
    return [*find_licences(folder), *(path for path in [run / SETTINGS_FILE] if path.is_file())]
