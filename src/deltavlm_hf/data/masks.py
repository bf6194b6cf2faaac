"""Change masks as what a model learns from, and what it predicts: one map for each class."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..processing.reading import READING_ERRORS, image_size, read_image
from .rules import CLASSES, THREE_BY_THREE, load_mask

_COLOURS = {"road": ("yellow", (255, 196, 0)), "building": ("blue", (0, 174, 255))}
_OTHER_COLOURS = (("red", (255, 40, 60)), ("green", (60, 220, 90)), ("violet", (190, 90, 255)), ("white", (255,) * 3))


def class_colours(classes: Sequence[str]) -> dict[str, tuple[str, tuple[int, int, int]]]:
    """For each class the name of its colour, and the colour, red, green and blue, as pictures and maps have it."""
    others = cycle(_OTHER_COLOURS)
    return {kind: _COLOURS.get(kind) or next(others) for kind in classes}


def check_classes(classes: Sequence[str]) -> None:
    """Raises `ValueError` for a class that masks do not have."""
    if not set(classes) <= CLASSES.keys():
        raise ValueError(f"Masks have the classes {', '.join(CLASSES)}, but the model's are {', '.join(classes)}.")


def read_mask(row: Mapping[str, Any]) -> np.ndarray | None:
    """
    The change mask of a row, see [`load_mask`].

    Args:
        row (`Mapping`): with `before`, `after` and `mask`, decoded or not, as [`load_changechat`] and
            [`load_generated`] give them with `masks=True`.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: 0, 128 (road) or 255 (building); None if the row has no mask.

    Raises:
        ValueError: if there is no such column, or the mask cannot be read or has not the size of its images.
    """
    if "mask" not in row:
        raise ValueError(f"Row {row.get('id')!r} has no column `mask`: load the data with `masks=True`.")
    if row["mask"] is None:
        return None
    try:
        mask = row["mask"] if isinstance(row["mask"], Image.Image) else read_image(row["mask"])
        values = load_mask(mask)
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


def class_maps(mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """
    One map for each class.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, uint8): 0, 128 (road) or 255 (building).
        classes (`Sequence[str]`): a model's `mask_classes`.

    Returns:
        `np.ndarray` of shape `(K, H, W)`, float32: 1 where the class changed.

    Raises:
        ValueError: for a class that masks do not have.
    """
    check_classes(classes)
    return np.stack([mask == CLASSES[name] for name in classes]).astype(np.float32)


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


def class_values(classes: Sequence[str]) -> dict[str, int]:
    """
    What stands for each class in a mask: 128 for a road and 255 for a building, or, where a model tells other classes
    apart, their numbers from 1 on.

    Raises:
        ValueError: if there are more than a pixel of 8 bits can tell apart.
    """
    if set(classes) <= CLASSES.keys():
        return {name: CLASSES[name] for name in classes}
    if len(classes) > 255:
        raise ValueError(f"A mask of 8 bits tells 255 classes apart, but the model has {len(classes)}.")
    return {name: number for number, name in enumerate(classes, start=1)}


def to_mask(probabilities: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """
    One mask of what a model says of each class.

    Args:
        probabilities (`np.ndarray` of shape `(K, H, W)`): see [`~DeltaVLMModel.segment`].
        classes (`Sequence[str]`): the model's `mask_classes`.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: the value of the likeliest class, see [`class_values`], where its
        probability is above one half; else 0.
    """
    values = np.array(list(class_values(classes).values()), np.uint8)
    return np.where(probabilities.max(0) > 0.5, values[probabilities.argmax(0)], np.uint8(0))
