"""What a model is: of a Hub id the commit, of a folder its files."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME
from transformers.utils.hub import resolve_revision

from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.weight_sources import digest

# Of a folder, what a model and its processor are loaded from.
_SETTINGS = (
    CONFIG_NAME,
    "generation_config.json",
    "*processor_config.json",
    "*.jinja",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.index.json",
)
EXPORT_FILE = "export.json"  # beside what was made of a checkpoint: of which
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def identify(model: DeltaVLMForConditionalGeneration) -> list[str]:
    """
    What changes when the model or its processor do: of a Hub id the commit, of a folder its files. The same of each
    place that a small checkpoint points to.
    """
    return [f"{name}: {commit}" for name, commit in _places(model)]


def commit_of(model: DeltaVLMForConditionalGeneration) -> str:
    """The same without the places: commits, or digests of files, joined by `+`."""
    return "+".join(commit for _, commit in _places(model))


def fingerprint(name: str, revision: str | None = None, sources: Sequence[Mapping[str, Any]] | None = None) -> str:
    """
    What was trained, and what it points to, wherever either lies: a model that is moved, or whose base is, keeps it.

    Args:
        name (`str`): folder or Hub id.
        revision (`str`, *optional*): the commit of a Hub id.
        sources (`Sequence[dict]`, *optional*): its `weight_sources`. What counts of each are the digests of files that
            it states, which are compared whenever it is loaded.
    """
    parts = [_digest_files(Path(name)) if os.path.isdir(name) else str(revision)]
    for source in sources or []:
        if digests := source.get("digests"):
            parts.append(hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()[:16])
        elif os.path.isdir(source["name_or_path"]):
            parts.append(_digest_files(Path(source["name_or_path"])))
        else:
            parts.append(str(source.get("revision")))
    return "+".join(parts)


def fingerprint_of(model: DeltaVLMForConditionalGeneration) -> str:
    """The [`fingerprint`] of a loaded model: of what it was loaded from."""
    return fingerprint(model.config.name_or_path, model.weights_revision, model.config.weight_sources)


def _places(model: DeltaVLMForConditionalGeneration) -> list[tuple[str, str]]:
    places = [(model.config.name_or_path, model.weights_revision)]
    for source in model.config.weight_sources or []:
        revision = resolve_revision(source["name_or_path"], source.get("revision"))
        places.append((source["name_or_path"], getattr(revision, "resolved", revision)))
    return [(name, _digest_files(Path(name)) if os.path.isdir(name) else str(revision)) for name, revision in places]


def _digest_files(folder: Path) -> str:
    found: list[tuple] = []
    for place in (folder, folder / "qformer_tokenizer"):
        for pattern in _SETTINGS:
            files = [path for path in place.glob(pattern) if path.is_file()]
            found += [(str(path.relative_to(folder)), _without_places(path)) for path in files]
    found += [(path.name, digest(path)) for pattern in _WEIGHTS for path in folder.glob(pattern)]
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]


def _without_places(file: Path) -> bytes:
    """What a file of settings says, but for where other weights are: these are known by what they are."""
    content = file.read_bytes()
    if file.name == CONFIG_NAME and b'"weight_sources"' in content:
        settings = json.loads(content)
        settings.pop("weight_sources", None)
        return json.dumps(settings).encode()
    return content
