"""GGUF files, which hold a language model with its tokenizer: where one is, and the licence that it states."""

import importlib.util
import os
from pathlib import Path

from transformers.utils import cached_file

from .sources import Source


def find_gguf(source: Source) -> tuple[Source, dict[str, str]]:
    """
    A language model's place for `from_pretrained`, and what else to tell it of a GGUF file.

    Args:
        source: a folder or Hub id, which comes back as it is; a file `.../name.gguf`; or one on the Hub,
            `owner/name/file.gguf`.

    Raises:
        FileNotFoundError: if the file is not there.
        ImportError: without the package that reads GGUF.
    """
    text = os.fspath(source)
    if not text.endswith(".gguf") or os.path.isdir(text):
        return source, {}
    on_hub = text.count("/") == 2 and not text.startswith(("/", ".")) and not os.path.exists(text)
    if not on_hub and not os.path.isfile(text):
        raise FileNotFoundError(f"{text} does not exist; a GGUF file on the Hub is named owner/name/file.gguf.")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError("A GGUF file is read by the package gguf: pip install gguf")
    place, _, file = text.rpartition("/")
    return place or ".", {"gguf_file": file}


def licence_of_gguf(source: Source) -> str | None:
    """The licence that a GGUF file states of itself."""
    from gguf import GGUFReader

    place, gguf = find_gguf(source)
    file = Path(source) if os.path.isfile(source) else cached_file(place, gguf["gguf_file"])
    stated = GGUFReader(file).fields.get("general.license")
    return None if stated is None else str(stated.contents())
