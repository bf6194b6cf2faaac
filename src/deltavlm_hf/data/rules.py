"""
From a change mask to facts: how many objects of each class changed, and in which cells of a 3x3 grid.

The authors published neither their rules nor their thresholds; what stands here was chosen for this package. A pixel
is 0 (no change) or the value of a class; unless a data set has classes of its own, 128 (road) or 255 (building), as in
LEVIR-MCI. The grid is named row by row from the top left.
"""

from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from ..processing.reading import READING_ERRORS, read_image
from .classes import BUILDING, NEW, REMOVED, ROAD, ROADS_AND_BUILDINGS, ChangeClass, Classes
from .words import shorten

CELLS = tuple(f"{row}-{column}" for row in ("top", "center", "bottom") for column in ("left", "center", "right"))

THREE_BY_THREE = np.ones((3, 3), bool)  # neighbours of a component: diagonal ones too
_FAINTEST = 64  # half-way from 0 to a road
_MASK_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


@dataclass(frozen=True)
class Thresholds:
    """
    What is too small to count. The defaults are meant for LEVIR's 256x256 pixels at 0.5 m.

    Args:
        min_area (`int`, *optional*, defaults to 20): pixels of a connected component, below which it is a speck and
            left out of everything. 20 pixels are 5 square metres: the sliver of a building cut by the image's edge.
        min_cell_area (`int`, *optional*, defaults to 73): changed pixels of a class that a cell needs to be listed:
            1 % of a ninth of the image.

    Raises:
        ValueError: if one is below 1.
    """

    min_area: int = 20
    min_cell_area: int = 73

    def __post_init__(self):
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1 pixel, got {value}.")

    @classmethod
    def for_size(cls, side: int) -> "Thresholds":
        """The defaults, scaled to an image of `side` x `side` pixels and rounded up."""
        scale = (side / 256) ** 2
        return cls(ceil(cls.min_area * scale), ceil(cls.min_cell_area * scale))


LEVIR = Thresholds()


@dataclass(frozen=True)
class ChangedObject:
    """
    One connected component of one class.

    Attributes:
        kind (`str`): the name of its class, such as `"building"`.
        area (`int`): pixels.
        box (`tuple[int, int, int, int]`): left, top, right, bottom in pixels; right and bottom are not part of it.
        centre (`tuple[float, float]`): column and row of its centre of mass, in pixels.
        cell (`int`): the index in [`CELLS`] of the cell with its centre.
    """

    kind: str
    area: int
    box: tuple[int, int, int, int]
    centre: tuple[float, float]
    cell: int


@dataclass(frozen=True)
class Facts:
    """
    What answers are made of. For all classes, in their order:

    Attributes:
        counts (`tuple[int, ...]`): changed objects.
        cells (`tuple[np.ndarray, ...]`, each of shape `(9,)`, bool): the grid cells with a change, row by row from the
            top left.
        counts_by_cell (`tuple[np.ndarray, ...]`, each of shape `(9,)`, int): how many objects have their centre there.
        classes ([`Classes`], *optional*): by default roads and buildings.
        removed (`bool`, *optional*, defaults to `False`): the other way round, what is new by its class is gone and
            what went is new: masks do not say it.
    """

    counts: tuple[int, ...]
    cells: tuple[np.ndarray, ...]
    counts_by_cell: tuple[np.ndarray, ...]
    classes: Classes = ROADS_AND_BUILDINGS
    removed: bool = False

    @property
    def changed(self) -> bool:
        return sum(self.counts) > 0

    def how(self, each: ChangeClass) -> str:
        """What answers say before the name of a class, see [`ChangeClass`]."""
        return {NEW: REMOVED, REMOVED: NEW}.get(each.how, each.how) if self.removed else each.how

    @property
    def roads(self) -> int:
        return self._of(self.counts, "road")

    @property
    def buildings(self) -> int:
        return self._of(self.counts, "building")

    @property
    def road_cells(self) -> np.ndarray:
        return self._of(self.cells, "road")

    @property
    def building_cells(self) -> np.ndarray:
        return self._of(self.cells, "building")

    def _of(self, values: tuple, name: str) -> Any:
        return values[self.classes.names.index(name)]


def marks_change(mask: np.ndarray, classes: Classes = ROADS_AND_BUILDINGS) -> bool:
    """Whether a mask, as [`load_mask`] reads it, marks any change but specks, with thresholds for its size."""
    return read_facts(mask, Thresholds.for_size(round(mask.size**0.5)), classes).changed


def load_mask(
    source: str | Path | Image.Image, binary: bool = False, classes: Classes = ROADS_AND_BUILDINGS
) -> np.ndarray:
    """
    Reads a change mask.

    Args:
        source (`str`, `Path` or `PIL.Image.Image`): a grey image, in colours or with a palette too as long as all of
            them are grey. Values between roads and buildings (soft edges) go to the nearest one.
        binary (`bool`, *optional*, defaults to `False`): there is one class, 128 to 255, taken for buildings. Files
            with 0 and 1 alone are binary whatever is said here.
        classes ([`Classes`], *optional*): by default roads and buildings. Others have no values in between, and of a
            palette its numbers count, not its colours; `binary` is not for them.

    Returns:
        `np.ndarray` of shape `(H, W)`, uint8: 0 or the value of a class, such as 128 (road) or 255 (building).

    Raises:
        ValueError: if the file is no image, has colours, or its values are no classes.
    """
    image, name = source, "The mask"
    if not isinstance(image, Image.Image):
        try:
            image, name = read_image(image), f"The mask {source}"
        except READING_ERRORS as error:
            raise ValueError(f"Cannot read the mask {source}: {error}") from error
    if classes == ROADS_AND_BUILDINGS:
        return _roads_and_buildings(_values(image, name), binary, name)
    if binary:
        raise ValueError("Binary masks are taken for buildings; of another class, its `mask` is their value.")
    return _own_classes(_values(image, name, palette=True), name, classes)


def _values(image: Image.Image, name: str, palette: bool = False) -> np.ndarray:
    """The grey values `(H, W)` of a mask, or the numbers of its palette."""
    if image.mode not in _MASK_MODES:
        raise ValueError(f"{name} is an image of mode {image.mode}; expected grey values of 8 bits.")
    if image.mode == "P" and not palette:
        image = image.convert("RGB")
    values = np.asarray(image.convert("L") if image.mode in ("1", "LA") else image)
    if values.ndim == 3:
        if (values[..., :3] != values[..., :1]).any():
            raise ValueError(f"{name} has colours; expected grey values, such as 0, 128 (road) and 255 (building).")
        values = values[..., 0]
    return values


def _roads_and_buildings(values: np.ndarray, binary: bool, name: str) -> np.ndarray:
    faintest, brightest = int(values.min()), int(values.max())
    if brightest == 1:
        return np.where(values == 1, BUILDING, 0).astype(np.uint8)
    if faintest < 0 or 0 < brightest < (ROAD if binary else _FAINTEST) or brightest > BUILDING:
        raise ValueError(
            f"{name} has values from {faintest} to {brightest}; expected 0, 128 (road) and 255 (building), "
            "or a binary mask with 0 and 1 or 0 and 255. Other classes are named in classes.yaml, see docs/data.md."
        )
    if binary:
        return np.where(values >= ROAD, BUILDING, 0).astype(np.uint8)
    return np.array([0, ROAD, BUILDING], np.uint8)[np.digitize(values, (_FAINTEST, (ROAD + BUILDING + 1) // 2))]


def _own_classes(values: np.ndarray, name: str, classes: Classes) -> np.ndarray:
    known = classes.values
    if other := sorted({*np.unique(values).tolist()} - {0, *known.values(), *classes.unchanged}):
        expected = ", ".join(f"{value} ({kind})" for kind, value in known.items())
        unchanged = ", ".join(map(str, sorted({0, *classes.unchanged})))
        raise ValueError(
            f"{name} has the values {shorten(other)}, which are no class's: expected "
            f"{unchanged} (unchanged) and {expected}."
        )
    return np.where(np.isin(values, [*known.values()]), values, 0).astype(np.uint8)


def find_objects(
    mask: np.ndarray, thresholds: Thresholds = LEVIR, classes: Classes = ROADS_AND_BUILDINGS
) -> list[ChangedObject]:
    """
    The connected components of each class (with diagonal neighbours) that are no specks.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, uint8): see [`load_mask`].
        thresholds ([`Thresholds`], *optional*).
        classes ([`Classes`], *optional*): by default roads and buildings.

    Returns:
        `list[ChangedObject]`: of one class after the other, each from the top down.
    """
    height, width = mask.shape
    objects = []
    for kind, value in classes.values.items():
        labels, count = ndimage.label(mask == value, THREE_BY_THREE)
        areas = np.bincount(labels.ravel(), minlength=count + 1)
        centres = ndimage.center_of_mass(labels > 0, labels, range(1, count + 1))
        for label, ((rows, columns), (row, column)) in enumerate(
            zip(ndimage.find_objects(labels), centres, strict=True), start=1
        ):
            if areas[label] >= thresholds.min_area:
                box = (columns.start, rows.start, columns.stop, rows.stop)
                cell = _third(row, height) * 3 + _third(column, width)
                objects.append(ChangedObject(kind, int(areas[label]), box, (float(column), float(row)), cell))
    return objects


def read_facts(mask: np.ndarray, thresholds: Thresholds = LEVIR, classes: Classes = ROADS_AND_BUILDINGS) -> Facts:
    """
    Counts objects and lists cells.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, uint8): see [`load_mask`].
        thresholds ([`Thresholds`], *optional*).
        classes ([`Classes`], *optional*): by default roads and buildings.

    Returns:
        [`Facts`].
    """
    objects = find_objects(mask, thresholds, classes)
    centres = [[item.cell for item in objects if item.kind == name] for name in classes.names]
    changed = (_without_specks(mask == value, thresholds) for value in classes.values.values())
    return Facts(
        counts=tuple(map(len, centres)),
        cells=tuple(grid_cells(each, thresholds.min_cell_area) for each in changed),
        counts_by_cell=tuple(np.bincount(each, minlength=9) for each in centres),
        classes=classes,
    )


def grid_cells(changed: np.ndarray, min_area: int) -> np.ndarray:
    """
    Which cells of the 3x3 grid have enough change. Sides that three does not divide give the first cells a pixel more.

    Args:
        changed (`np.ndarray` of shape `(H, W)`, bool): the changed pixels.
        min_area (`int`): changed pixels that a cell needs.

    Returns:
        `np.ndarray` of shape `(9,)`, bool, row by row from the top left.
    """
    cells = [cell for row in np.array_split(changed, 3) for cell in np.array_split(row, 3, axis=1)]
    return np.array([np.count_nonzero(cell) >= min_area for cell in cells])


def _without_specks(changed: np.ndarray, thresholds: Thresholds) -> np.ndarray:
    labels, _ = ndimage.label(changed, THREE_BY_THREE)
    areas = np.bincount(labels.ravel())
    return changed & (areas >= thresholds.min_area)[labels]


def _third(position: float, length: int) -> int:
    """In which of three equal parts a pixel's middle lies."""
    return min(2, int((position + 0.5) * 3 / length))
