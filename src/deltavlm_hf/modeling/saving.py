"""Saving over what is there: the old files stay until all new ones are complete."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


@contextmanager
def replacing(folder: str | os.PathLike) -> Iterator[str]:
    """
    A folder to write to, whose files go to `folder` at the end. Weights take the place of all weights there: of a
    single file and shards beside each other, `from_pretrained` would read the single file, the newest or not.

    Args:
        folder (`str` or `os.PathLike`): is made if it is not there.

    Raises:
        OSError: if it cannot be written to. What was there before is untouched.
    """
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as partial:
        try:
            yield partial
        except SafetensorError as error:
            raise OSError(
                f"The weights cannot be written to {os.fspath(folder)!r}: {error}. What was there before is untouched."
            ) from error
        names = os.listdir(partial)
        for name in names:
            os.replace(os.path.join(partial, name), os.path.join(folder, name))
        if {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & set(names):
            for path in Path(folder).iterdir():
                if _WEIGHTS.fullmatch(path.name) and path.name not in names:
                    path.unlink()
