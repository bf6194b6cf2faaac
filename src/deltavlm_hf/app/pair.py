"""The two images of a visit: read as the model reads them, and shown as it is given them."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..processing import DeltaVLMImageProcessor
from ..processing.reading import (
    READING_ERRORS,
    image_size,
    loses_depth,
    read_pixels,
    why_unreadable,
)
from .overlay import embed

MAX_PIXELS = 64_000_000  # of one image
SHOWN = 1024  # longest side of what is sent to be looked at
TILE = 256  # pixels: what the data that models of this kind learn from shows at once
TILES = 3  # a side of the middle that is scanned
_LARGE = TILE * (TILES + 1)  # a side beyond which a scene is more than a few tiles
_FLAT = 26  # grey levels: a tenth of what there are


class Unusable(ValueError):
    """An image that cannot be used; the message is for the one who gave it."""


@dataclass(frozen=True)
class Photo:
    """
    One image, upright.

    Attributes:
        name (`str`): of its file.
        picture (`PIL.Image.Image`): RGB of 8 bits, what the processor makes of it.
        flat (`bool`): whether it had more than 8 bits and nearly all of them are lost.
    """

    name: str
    picture: Image.Image
    flat: bool = False

    def to_show(self) -> dict[str, Any]:
        """For the page."""
        small = self.picture.copy()
        small.thumbnail((SHOWN, SHOWN))
        width, height = self.picture.size
        return {
            "name": self.name,
            "width": width,
            "height": height,
            "url": embed(small, "png" if max(small.size) <= SHOWN // 2 else "jpeg"),
        }


def read_photo(path: str, processor: DeltaVLMImageProcessor, name: str | None = None) -> Photo:
    """
    Reads an upload as the processor would, decoded once, and only if its header promises an image of bounded size.

    Args:
        path (`str`): of the file.
        processor ([`DeltaVLMImageProcessor`]): the model's.
        name (`str`, *optional*): what it is called; by default the name of the file.

    Raises:
        Unusable: if it cannot be.
    """
    name = name or Path(path).name
    try:
        width, height = image_size(path)
        if width * height > MAX_PIXELS:
            raise Unusable(f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} in all are taken.")
        source = read_pixels(path)
    except Unusable:
        raise
    except FileNotFoundError as error:
        raise Unusable(f"{name} is no longer here; upload it again.") from error
    except READING_ERRORS as error:  # they name the path
        raise Unusable(f"{name} is {why_unreadable(error)}.") from error
    try:
        pixels = processor.process_image(source)  # (3, H, W)
    except ValueError as error:
        raise Unusable(f"{name} is not taken: {str(error).partition(';')[0]}.") from error
    deep = (
        source.dtype != np.uint8 if isinstance(source, np.ndarray) else source.mode[0] in "IF" or loses_depth(source)
    )
    return Photo(name, Image.fromarray(pixels.transpose(1, 2, 0)), deep and int(np.ptp(pixels)) < _FLAT)


def is_large(before: Photo) -> bool:
    """Whether the model sees so much of it at once that what is small is lost."""
    return max(before.picture.size) > _LARGE


def notices(before: Photo, after: Photo, processor: DeltaVLMImageProcessor) -> list[dict[str, str]]:
    """What is to be known of a pair: sentences, each with a command if there is one."""
    told = []
    sizes = [f"{photo.picture.width} x {photo.picture.height}" for photo in (before, after)]
    if sizes[0] != sizes[1]:
        told.append(
            {
                "text": f"The images differ in size: {sizes[0]} and {sizes[1]} pixels. The second is fitted to the "
                "first; if they do not show the same ground, answers are about the shift."
            }
        )
    for photo in (before, after):
        if photo.flat:
            told.append(
                {
                    "text": f"{photo.name} fills less than a tenth of its range: to the model it is nearly of one "
                    "colour. From Python, say what is black and white: processor(..., stretch=(low, high))."
                }
            )
    if is_large(before):
        side = f"{processor.size['height']} x {processor.size['width']}"
        told.append(
            {
                "text": f"A scene of {sizes[0]} pixels is more than a few tiles. At once the model sees it shrunk to "
                f"{side}, and misses what is small. “Scan the middle” looks at {TILES} x {TILES} tiles of {TILE} "
                "pixels; all of a georeferenced scene:",
                "command": f"deltavlm scan {shlex.quote(before.name)} {shlex.quote(after.name)} --html changes.html",
            }
        )
    return told


def middle_tiles(before: Photo, after: Photo) -> tuple[list[tuple[Image.Image, Image.Image]], list[float]]:
    """
    Tiles in the middle of a large scene, row by row.

    Returns:
        `tuple`: the pairs, and where all of them lie: left, top, width and height as parts of the scene.
    """
    width, height = before.picture.size
    side = min(TILE, width // TILES, height // TILES)  # of a narrow scene
    left, top = (width - TILES * side) // 2, (height - TILES * side) // 2
    across, down = (after.picture.width / width, after.picture.height / height)
    pairs = []
    for row in range(TILES):
        for column in range(TILES):
            x, y = left + column * side, top + row * side
            box = (x, y, x + side, y + side)
            there = (x * across, y * down, (x + side) * across, (y + side) * down)
            pairs.append((before.picture.crop(box), after.picture.resize((side, side), box=there)))
    return pairs, [left / width, top / height, TILES * side / width, TILES * side / height]
