"""Files that Pillow does not read right, such as four bands of 16 bits, by GDAL where rasterio is installed."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

DRIVERS = ("GTiff", "JP2OpenJPEG", "PNG")  # no others: some of GDAL's formats name further files, or URLs
_COLOURS = ("red", "green", "blue")


def read_bands(file: BinaryIO) -> np.ndarray | None:
    """
    Red, green and blue of a file, see [`colour_bands`].

    Returns:
        `np.ndarray` of shape `(H, W, 3)`, of the file's own type; None without rasterio.

    Raises:
        OSError: if GDAL cannot read it.
        ValueError: if it has no such bands, or more pixels than Pillow's own bound.
    """
    with _opened(file) as dataset:
        return None if dataset is None else np.moveaxis(dataset.read(list(colour_bands(dataset))), 0, -1)


def size_of_bands(file: BinaryIO) -> tuple[int, int] | None:
    """Width and height; raises and returns None as [`read_bands`]."""
    with _opened(file) as dataset:
        return None if dataset is None else (dataset.width, dataset.height)


def colour_bands(dataset: Any) -> tuple[int, int, int]:
    """
    The bands of red, green and blue of a rasterio data set, from 1 on: by colour interpretation; or the first three;
    or, of one or two, the first thrice. A band of alpha is none of them.

    Raises:
        ValueError: if the colours are in a palette, or there is no band but alpha.
    """
    meanings = [meaning.name for meaning in dataset.colorinterp]
    if set(_COLOURS) <= set(meanings):
        red, green, blue = (meanings.index(colour) + 1 for colour in _COLOURS)
        return red, green, blue
    if meanings[0] == "palette":
        raise ValueError(f"{dataset.name} has a palette: expand it first (gdal_translate -expand rgb).")
    shown = [number for number, meaning in enumerate(meanings, start=1) if meaning != "alpha"]
    if not shown:
        raise ValueError(f"{dataset.name} has no band but alpha.")
    red, green, blue = shown[:3] if len(shown) > 2 else shown[:1] * 3
    return red, green, blue


@contextmanager
def _opened(file: BinaryIO) -> Iterator[Any]:
    """The file as a data set, or None without rasterio. From memory: what lies beside it on the disk is not read."""
    try:
        import rasterio
    except ImportError:
        yield None
        return
    file.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.MemoryFile(file.read()) as memory, memory.open(driver=list(DRIVERS)) as dataset:
            bound = Image.MAX_IMAGE_PIXELS
            if bound is not None and dataset.width * dataset.height > bound:
                raise ValueError(f"{dataset.width} x {dataset.height} pixels, at most {bound} in all are allowed")
            yield dataset
