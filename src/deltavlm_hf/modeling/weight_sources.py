"""
Small checkpoints: a folder that holds only the weights that were trained, and names where the others are.

`config.weight_sources` is a list of such places, each a dict with

- `name_or_path`: a folder or Hub id, in the form of `save_pretrained`;
- `revision` (optional): of the Hub id;
- `prefix`: what stands before the names of its weights in DeltaVLM: nothing where it is a DeltaVLM itself,
  `"language_model."` where it is a causal language model;
- `digests` (optional): the SHA-256 of each of its files when the checkpoint was written. Without any, whatever lies
  there is taken.

A weight is taken from the checkpoint if it is there, else from the first source that has it.
"""

import hashlib
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import cached_file, logging

from .bounds import is_file_name
from .csrm import current_name
from .saving import finish_saving

logger = logging.get_logger(__name__)

_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
_LARGEST_INDEX = 2**26  # bytes
_BLOCK = 2**24  # values of a weight that are compared at once


def check_index(index: str | os.PathLike) -> dict[str, str]:
    """
    The files that an index of shards names, by weight.

    Raises:
        ValueError: if it is damaged, or if one of them is not a file beside it.
    """
    index = Path(index)
    if index.stat().st_size > _LARGEST_INDEX:
        raise ValueError(f"{index} has {index.stat().st_size} bytes, too many for an index.")
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        shards = set(weight_map.values())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged, get it anew: {error!r}") from error
    for shard in shards:
        if not is_file_name(shard) or not shard.endswith((".safetensors", ".bin")):
            raise ValueError(
                f"{index} names {shard!r:.100}, expected files of weights beside it, by their plain names."
            )
        check_inside(index.parent / shard)
    return weight_map


def check_inside(file: str | os.PathLike) -> None:
    """
    Raises `ValueError` if a file is a link to outside of its folder, unless both are the cache's own, whose folders
    consist of links.
    """
    file = Path(file)
    folder = file.parent.resolve()
    cached = [place.parent / "blobs" for place in folder.parents if place.name == "snapshots"]
    if (place := file.resolve().parent) not in (folder, *cached):
        raise ValueError(f"{file} is a link to {place}, outside of its folder. Put the file itself there.")


def check_indexes(folder: str | os.PathLike) -> None:
    """Every index of shards in a folder, if it is one, see [`check_index`]."""
    for index in Path(folder).glob("*.index*.json"):
        check_index(index)


def find_files(
    source: Mapping[str, Any], wanted: Callable[[str], bool] = lambda name: True, **download_kwargs
) -> list[str]:
    """
    The files with a source's weights, downloaded if need be. Safetensors go before files of torch.

    Args:
        source (`Mapping`): see the head of this module.
        wanted (`Callable`, *optional*): of a weight's name in DeltaVLM, whether it is wanted; shards without any that
            is are left out.
        download_kwargs: as for `from_pretrained`: `cache_dir`, `local_files_only`, `token`, ...

    Raises:
        OSError: if there are none.
    """
    name, revision = source["name_or_path"], source.get("revision")
    options = {key: value for key, value in download_kwargs.items() if key in DOWNLOAD and value is not None}
    missing = None
    finish_saving(name)
    for file in _FILES:
        try:
            path = cached_file(name, file, revision=None if os.path.isdir(name) else revision, **options)
        except OSError as error:
            missing = error
            continue
        if not file.endswith(".index.json"):
            return [path]
        weight_map = check_index(path)
        prefix = source.get("prefix", "")
        shards = {shard for weight, shard in weight_map.items() if wanted(current_name(prefix + weight))}
        return [cached_file(name, shard, revision=revision, **options) for shard in sorted(shards)]
    raise OSError(f"{name!r} holds no weights that can be read: {missing}") from missing


def names_in(model: nn.Module) -> Callable[[str], str]:
    """
    What gives the name in a model of a weight in a file. Transformers renames layers of vision encoders from release
    to release, and goes on to write files under their first names.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]

    def name_in_model(name: str) -> str:
        name = current_name(name)
        renamed, converted = rename_source_key(name, renamings, converters)
        return name if converted else renamed  # what is made of several is not the same weight

    return name_in_model


def open_weights(files: list[str], stack: ExitStack) -> dict[str, Any]:
    """
    Names of weights with what reads them, `[...]` the whole, from safetensors without reading them yet.

    Args:
        files (`list[str]`): of one source.
        stack (`ExitStack`): closes them.

    Raises:
        ValueError: if a file is damaged or holds something else.
    """
    weights: dict[str, Any] = {}
    for file in files:
        if not file.endswith(".safetensors"):
            weights.update(read_torch_file(file))
            continue
        try:
            opened = stack.enter_context(safe_open(file, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{file} cannot be read as a file of weights, get it anew: {error}") from error
        weights.update({name: opened.get_slice(name) for name in opened.keys()})
    return weights


def read_torch_file(file: str | os.PathLike) -> Any:
    """
    What `torch.save` wrote, tensors and containers only. Nothing else is unpickled.

    Raises:
        ValueError: if the file is damaged or holds something else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # a damaged file makes torch raise all kinds of errors
        raise ValueError(f"{file} cannot be read as a file of weights, and nothing else is loaded: {error}") from error


def digest(file: str | os.PathLike) -> str:
    """The SHA-256 of a whole file: `"sha256:..."`. A change anywhere in it is noticed."""
    with open(file, "rb") as content:
        return f"sha256:{hashlib.file_digest(content, 'sha256').hexdigest()}"


def _is_same(file: str, weights: Mapping[str, Any], expected: str) -> bool:
    if expected.startswith("sha256:"):
        return digest(file) == expected
    logger.warning_once(
        "This checkpoint is of an early version, which knew the weights that it leaves out by the beginning of each: "
        "a change elsewhere in them is not noticed. Saved anew after `leave_out_frozen(model)`, it knows them whole."
    )
    return _digest_of_beginnings(weights) == expected


def _digest_of_beginnings(weights: Mapping[str, Any]) -> str:
    summary = hashlib.sha256()
    for name in sorted(weights):
        start = first_values(weights[name])
        summary.update(f"{name} {shape(weights[name])} {start.dtype}".encode())
        summary.update(start.contiguous().view(torch.uint8).numpy().tobytes())
    return summary.hexdigest()


def first_values(weight: Any) -> torch.Tensor:
    """The first row of a weight, at most 64 values, as it is stored: `(n,)`."""
    size = shape(weight)
    if not size:
        return weight[...].reshape(1)
    return weight[:1].reshape(-1)[:64]


def same_values(tensor: torch.Tensor, weight: Any) -> bool:
    """
    Whether a weight has the values of one in a file, all of them, in the precision that it has here: what was loaded
    in 16 bits from a file in 32 is the same. Read in blocks, so that memory holds little of the file at a time.
    """
    size = shape(weight)
    if tuple(tensor.shape) != size:
        return False
    if not size:
        return torch.equal(tensor, weight[...].to(tensor))
    rows = max(1, _BLOCK // max(1, math.prod(size[1:])))
    return all(
        torch.equal(tensor[start : start + rows], weight[start : start + rows].to(tensor))
        for start in range(0, size[0], rows)
    )


def shape(weight: Any) -> tuple[int, ...]:
    """Of a tensor or of a slice of a file."""
    return tuple(weight.get_shape() if hasattr(weight, "get_shape") else weight.shape)


def add_missing(
    weights: dict[str, Any],
    wanted: set[str],
    sources: list[dict[str, Any]],
    name_in_model: Callable[[str], str],
    stack: ExitStack,
    **download_kwargs,
) -> None:
    """
    Adds what a checkpoint leaves out.

    Args:
        weights (`dict`): of the checkpoint, by name; added to.
        wanted (`set[str]`): names of the model's weights.
        sources (`list[dict]`): see the head of this module.
        name_in_model (`Callable`): see [`names_in`].
        stack (`ExitStack`): closes the files that are opened.
        download_kwargs: see [`find_files`].

    Raises:
        OSError: if a source that is needed cannot be found.
        ValueError: if it is another than the one that the checkpoint was written with.
    """

    def is_missing(name: str) -> bool:
        name = name_in_model(name)
        return name in wanted and name not in weights

    for source in sources:
        prefix = source.get("prefix", "")
        missing = wanted - weights.keys()
        if not any(name.startswith(prefix) for name in missing):
            continue
        expected = source.get("digests")
        try:
            files = find_files(source, is_missing, **download_kwargs)
        except OSError as error:
            place = {key: value for key, value in source.items() if key != "digests" and value}
            raise OSError(
                f"This checkpoint holds only some of its model's weights. For the others, {error} Put them there, or "
                f"name another place: from_pretrained(..., weight_sources=[{ {**place, 'name_or_path': '...'} }])."
            ) from error
        for file in files:
            found = open_weights([file], stack)
            if expected and not _is_same(file, found, expected.get(Path(file).name, "sha256:")):
                raise ValueError(
                    f"The weights in {source['name_or_path']!r} ({Path(file).name}) are not those that this "
                    "checkpoint was made with. Give it the right ones, or, if you want these, name them without "
                    "digests: from_pretrained(..., "
                    f"weight_sources=[{ {'name_or_path': source['name_or_path'], 'prefix': prefix} }])."
                )
            found = {name_in_model(prefix + name): weight for name, weight in found.items()}
            weights.update({name: weight for name, weight in found.items() if name in missing})
