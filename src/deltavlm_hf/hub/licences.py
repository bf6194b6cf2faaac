"""What is known of a part that others made, for the model card: its name on the Hub, its commit, its licence."""

import os
import re
from pathlib import Path

from huggingface_hub.repocard import metadata_load
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash
from yaml import YAMLError

from ..modeling.bounds import check_origins
from .gguf import find_gguf, licence_of_gguf
from .sources import Source


def describe_part(part: str, source: object) -> dict[str, str]:
    """
    An entry of `config.made_from`. Folders of this machine are not named: that says nothing to others.

    Args:
        part (`str`): which one it is, such as `"language_model"`.
        source: folder, Hub id or GGUF file; of a model that is loaded nothing is known.
    """
    described = {"part": part}
    if not isinstance(source, str | os.PathLike):
        return described
    place, gguf = find_gguf(source)
    if not os.path.isdir(place):
        described["name"] = str(place)
        commit = extract_commit_hash(_file(place, next(iter(gguf.values()), CONFIG_NAME)), None)
        if commit is not None:
            described["revision"] = commit
    licence = licence_of_gguf(source) if gguf else None
    licence = licence or _licence_of_card(_file(place, "README.md"))
    if licence is not None:
        described["license"] = licence
    for name in list(described):
        try:
            check_origins([{name: described[name]}])
        except ValueError:  # a stranger's words that are no name of a licence
            del described[name]
    return described


def _file(place: Source, name: str) -> str | None:
    return cached_file(
        place, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _licence_of_card(card: str | None) -> str | None:
    """What the head of a model card says, where its folder has one."""
    if card is None:
        return None
    try:
        head = metadata_load(Path(card)) or {}
    except (ValueError, YAMLError):
        return None
    stated = head.get("license_name") if head.get("license") == "other" else None
    stated = stated or head.get("license")
    return stated if isinstance(stated, str) and re.search(r"\w", stated) else None
