"""Change masks as what a model learns from, and what it predicts: one map for each class."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from .rules import BUILDING, ROAD, THREE_BY_THREE

VALUES = {"road": ROAD, "building": BUILDING}  # of `mask_classes`, in a mask


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
    unknown = [name for name in classes if name not in VALUES]
    if unknown:
        raise ValueError(f"Masks have the classes {', '.join(VALUES)}, but the model's are {', '.join(classes)}.")
    return np.stack([mask == VALUES[name] for name in classes]).astype(np.float32)


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
