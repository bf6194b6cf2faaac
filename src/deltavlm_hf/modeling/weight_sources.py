"""
Small checkpoints: a folder that holds only the weights that were trained, and names where the others are.

`config.weight_sources` is a list of such places, each a dict with

- `name_or_path`: a folder or Hub id, in the form of `save_pretrained`;
- `revision` (optional): of the Hub id;
- `prefix`: what stands before the names of its weights in DeltaVLM: nothing where it is a DeltaVLM itself,
  `"language_model."` where it is a causal language model;
- `digest` (optional): what [`digest`] said of its weights when the checkpoint was written.

A weight is taken from the checkpoint if it is there, else from the first source that has it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

_FILES = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
_DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "token")


def find_files(source: Mapping[str, Any], **download_kwargs) -> list[str]:
    """
    The files with a source's weights, downloaded if need be. Safetensors go before files of torch.

    Args:
        source (`Mapping`): see the head of this module.
        download_kwargs: as for `from_pretrained`: `cache_dir`, `local_files_only`, `token`, ...

    Raises:
        OSError: if there are none.
    """
    name, revision = source["name_or_path"], source.get("revision")
    options = {key: value for key, value in download_kwargs.items() if key in _DOWNLOAD and value is not None}
    missing = None
    for file in _FILES:
        try:
            path = cached_file(name, file, revision=None if os.path.isdir(name) else revision, **options)
        except OSError as error:
            missing = error
            continue
        if not file.endswith(".index.json"):
            return [path]
        shards = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
        return [cached_file(name, shard, revision=revision, **options) for shard in shards]
    wanted = {key: value for key, value in source.items() if key in ("name_or_path", "revision", "prefix") and value}
    raise OSError(
        f"This checkpoint holds only some of its model's weights. The others are in {name!r}"
        f"{f' (revision {revision})' if revision else ''}, which cannot be read: {missing} Put it there, or name "
        f"another place: from_pretrained(..., weight_sources=[{ {**wanted, 'name_or_path': '...'} }])."
    ) from missing


def open_weights(files: list[str], stack: ExitStack) -> dict[str, Any]:
    """
    Names of weights with what reads them, `[...]` the whole, from safetensors without reading them yet.

    Args:
        files (`list[str]`): of one source.
        stack (`ExitStack`): closes them.
    """
    weights: dict[str, Any] = {}
    for file in files:
        if file.endswith(".safetensors"):
            opened = stack.enter_context(safe_open(file, framework="pt"))
            weights.update({name: opened.get_slice(name) for name in opened.keys()})
        else:
            weights.update(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
    return weights


def digest(weights: Mapping[str, Any]) -> str:
    """
    Tells one set of weights from another: names, shapes and the beginning of each weight, whatever their precision on
    disk costs to read in full.
    """
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


def shape(weight: Any) -> tuple[int, ...]:
    """Of a tensor or of a slice of a file."""
    return tuple(weight.get_shape() if hasattr(weight, "get_shape") else weight.shape)


def add_missing(
    weights: dict[str, Any],
    wanted: set[str],
    sources: list[dict[str, Any]],
    stack: ExitStack,
    **download_kwargs,
) -> None:
    """
    Adds what a checkpoint leaves out.

    Args:
        weights (`dict`): of the checkpoint, by name; added to.
        wanted (`set[str]`): names of the model's weights.
        sources (`list[dict]`): see the head of this module.
        stack (`ExitStack`): closes the files that are opened.
        download_kwargs: see [`find_files`].

    Raises:
        OSError: if a source that is needed cannot be found.
        ValueError: if it is another than the one that the checkpoint was written with.
    """
    for source in sources:
        prefix = source.get("prefix", "")
        if not any(name.startswith(prefix) for name in wanted - weights.keys()):
            continue
        found = open_weights(find_files(source, **download_kwargs), stack)
        if source.get("digest") and digest(found) != source["digest"]:
            raise ValueError(
                f"The weights in {source['name_or_path']!r} are not those that this checkpoint was made with. Give it "
                "the right ones, or, if you want these, name them without a digest: from_pretrained(..., "
                f"weight_sources=[{ {'name_or_path': source['name_or_path'], 'prefix': prefix} }])."
            )
        for name, weight in found.items():
            full = prefix + name
            if full in wanted:
                weights.setdefault(full, weight)
