"""Change masks as what a model learns from, and what it predicts: one map for each class."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image, ImageColor
from scipy import ndimage

from ..processing.reading import READING_ERRORS, image_size, read_image
from .classes import ROADS_AND_BUILDINGS, Classes
from .rules import THREE_BY_THREE, load_mask

_OTHER_COLOURS = ("#ff283c", "#3cdc5a", "#be5aff", "#ffffff")  # red, green, violet, white


def class_colours(names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> dict[str, tuple[int, int, int]]:
    """
    For each class its colour, red, green and blue, as pictures and maps have it.

    Args:
        names (`Sequence[str]`): of the classes.
        classes ([`Classes`], *optional*): those that may say it; roads and buildings have theirs in any case.
    """
    others = cycle(_OTHER_COLOURS)
    stated = {each.name: each.colour for each in (*ROADS_AND_BUILDINGS, *classes) if each.colour}
    colours = {name: stated.get(name) or next(others) for name in names}
    return {name: ImageColor.getrgb(colour)[:3] for name, colour in colours.items()}


def check_classes(names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> None:
    """Raises `ValueError` for a model's class that masks do not have."""
    if not set(names) <= {*classes.names}:
        raise ValueError(f"Masks have the classes {', '.join(classes.names)}, but the model's are {', '.join(names)}.")


def read_mask(row: Mapping[str, Any], classes: Classes = ROADS_AND_BUILDINGS) -> np.ndarray | None:
    """
    The change mask of a row, see [`load_mask`].

    Args:
        row (`Mapping`): with `before`, `after` and `mask`, decoded or not, as [`load_changechat`] and
            [`load_generated`] give them with `masks=True`.
        classes ([`Classes`], *optional*): of the data set, see [`find_classes`]; by default roads and buildings.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: see [`load_mask`]; None if the row has no mask.

    Raises:
        ValueError: if there is no such column, or the mask cannot be read or has not the size of its images.
    """
    if "mask" not in row:
        raise ValueError(f"Row {row.get('id')!r} has no column `mask`: load the data with `masks=True`.")
    if row["mask"] is None:
        return None
    try:
        mask = row["mask"] if isinstance(row["mask"], Image.Image) else read_image(row["mask"])
        values = load_mask(mask, classes=classes)
        sizes = [_size(row[date]) for date in ("before", "after")]
    except READING_ERRORS as error:
        raise ValueError(f"Row {row.get('id')!r}: its mask cannot be used: {error}") from error
    if mask.size not in sizes:
        got, *expected = (f"{width}x{height}" for width, height in (mask.size, *dict.fromkeys(sizes)))
        raise ValueError(
            f"Row {row.get('id')!r}: its mask has {got} pixels, its images {' and '.join(expected)}. A mask is drawn "
            "on its images: give it in their size."
        )
    return values


def _size(image: Any) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else image_size(image)


def class_maps(mask: np.ndarray, names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> np.ndarray:
    """
    One map for each class.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, uint8): see [`load_mask`].
        names (`Sequence[str]`): a model's `mask_classes`.
        classes ([`Classes`], *optional*): what values in the mask stand for; by default roads and buildings.

    Returns:
        `np.ndarray` of shape `(K, H, W)`, float32: 1 where the class changed.

    Raises:
        ValueError: for a class that masks do not have.
    """
    check_classes(names, classes)
    return np.stack([mask == classes.values[name] for name in names]).astype(np.float32)


def centre_maps(maps: np.ndarray, spread: float = 2.0) -> np.ndarray:
    """
    Where the objects of each class have their centres.

    Args:
        maps (`np.ndarray` of shape `(K, H, W)`): see [`class_maps`].
        spread (`float`, *optional*, defaults to 2): pixels from the centre at which the map has fallen to 0.61.

    Returns:
        `np.ndarray` of shape `(K, H, W)`, float32: 1 at the centre of each connected component, falling around it.
    """
    centres = np.ones(maps.shape, bool)
    for free, changed in zip(centres, maps > 0, strict=True):
        labels, count = ndimage.label(changed, THREE_BY_THREE)
        for row, column in ndimage.center_of_mass(labels > 0, labels, range(1, count + 1)):
            free[round(row), round(column)] = False
    found = [np.full(free.shape, np.inf) if free.all() else ndimage.distance_transform_edt(free) for free in centres]
    return np.exp(-(np.stack(found) ** 2) / (2 * spread**2)).astype(np.float32)


def class_values(names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> dict[str, int]:
    """
    What stands for each class in a mask: the value that `classes` say, such as 128 for a road and 255 for a building;
    or, where a model tells others apart, their numbers from 1 on.

    Raises:
        ValueError: if there are more than a pixel of 8 bits can tell apart.
    """
    if set(names) <= {*classes.names}:
        return {name: classes.values[name] for name in names}
    if len(names) > 255:
        raise ValueError(f"A mask of 8 bits tells 255 classes apart, but the model has {len(names)}.")
    return {name: number for number, name in enumerate(names, start=1)}


def to_mask(probabilities: np.ndarray, names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> np.ndarray:
    """
    One mask of what a model says of each class.

    Args:
        probabilities (`np.ndarray` of shape `(K, H, W)`): see [`~DeltaVLMModel.segment`].
        names (`Sequence[str]`): the model's `mask_classes`.
        classes ([`Classes`], *optional*): what they are in masks; by default roads and buildings.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: the value of the likeliest class, see [`class_values`], where its
        probability is above one half; else 0.
    """
    values = np.array(list(class_values(names, classes).values()), np.uint8)
    return np.where(probabilities.max(0) > 0.5, values[probabilities.argmax(0)], np.uint8(0))
