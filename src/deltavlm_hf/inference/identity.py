"""What a model is: of a Hub id the commit, of a folder its files."""

import hashlib
import os
from pathlib import Path

from transformers.utils.hub import resolve_revision

from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.weight_sources import digest

# Of a folder, what a model and its processor are loaded from.
_SETTINGS = (
    "config.json",
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
            found += [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
    found += [(path.name, digest(path)) for pattern in _WEIGHTS for path in folder.glob(pattern)]
    return hashlib.sha256(repr(sorted(found)).encode()).hexdigest()[:16]
