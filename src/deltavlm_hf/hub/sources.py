"""Where weights come from: the authors' checkpoint and EVA files under our names, and the frozen parts' folders."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import logging
from transformers.utils.hub import extract_commit_hash

from ..data.words import shorten
from ..modeling.weight_sources import digest, find_files, open_weights, read_torch_file
from .names import DROPPED_LANGUAGE_MODEL, DROPPED_VISION, NAMES

logger = logging.get_logger(__name__)

Weights = dict[str, Any]  # by name: tensors, or slices of files that are read with `[...]`
Source = str | os.PathLike


def is_local(source: Source) -> bool:
    """Whether a source can only be a path: a Hub id is `owner/name` at most."""
    text = os.fspath(source)
    return not isinstance(source, str) or os.path.isabs(text) or text.startswith(".") or Path(text).suffix == ".pth"


def named(source: Source) -> str:
    """A folder by its whole path, which is found from every working directory; a Hub id as it is."""
    return os.path.abspath(source) if os.path.isdir(source) else os.fspath(source)


class Origin:
    """Where the frozen weights come from: a folder or Hub id in the form of `save_pretrained`."""

    def __init__(
        self, source: Source, stack: ExitStack, prefix: str = "", only: Callable[[str], bool] = lambda name: True
    ):
        self.place = {"name_or_path": named(source), "prefix": prefix}
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


def load_checkpoint(path: Path) -> Weights:
    """The tensors of a file that `torch.save` wrote, alone or under 'model'."""
    checkpoint = read_torch_file(path)
    state_dict = checkpoint.get("model", checkpoint) if isinstance(checkpoint, dict) else checkpoint
    if not isinstance(state_dict, dict) or not all(isinstance(value, torch.Tensor) for value in state_dict.values()):
        raise ValueError(f"{path} holds no weights: expected tensors by name, alone or under 'model'.")
    return state_dict


def rename(state_dict: Weights, dropped: tuple[str, ...], source: Source) -> Weights:
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
        raise ValueError(f"{source} holds keys that are not of DeltaVLM: {shorten(unknown)}.")
    for name in [name for name in renamed if name.endswith("self_attn.q_bias")]:
        attention = name.removesuffix("q_bias")
        if f"{attention}v_bias" not in renamed:
            raise ValueError(f"{source} holds {name}, but not the v_bias that belongs to it.")
        query, value = renamed.pop(name), renamed.pop(f"{attention}v_bias")
        renamed[f"{attention}qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])
    return renamed


def read_eva(path: Path, blocks: int) -> Weights:
    """The vision encoder of a base EVA file, without the blocks behind the last one that is used."""
    state_dict = {f"visual_encoder.{name}": tensor for name, tensor in load_checkpoint(path).items()}
    unused = [
        name
        for name in state_dict
        if (block := re.match(r"visual_encoder\.blocks\.(\d+)\.", name)) and int(block[1]) >= blocks
    ]
    return rename(state_dict, (*DROPPED_VISION, *map(re.escape, unused)), path)


def warn_if_csrm_is_untrained(state_dict: Weights, source: Source) -> None:
    weight = state_dict.get("difference.context_delta.weight")
    if weight is not None and weight.abs().max() <= weight.shape[1] ** -0.5:
        logger.warning(
            f"The CSRM weights of {source} lie within the range of their initialisation: they have probably never "
            "been trained. The authors' released training code leaves CSRM out; `difference_module='concat'` is what "
            "such a checkpoint was trained with."
        )
