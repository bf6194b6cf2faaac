"""From masks of tiles to objects on the ground: traced within cores, joined where cores meet."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from affine import Affine
from rasterio.features import shapes
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.masks import class_values
from ..data.rules import Thresholds
from .answers import FoundObject, TileAnswer
from .tiles import Tile


@dataclass(frozen=True)
class SceneObject:
    """
    An object of the whole scene.

    Attributes:
        kind (`str`): one of the model's `mask_classes`.
        shape (`shapely.Geometry`): in columns and rows of the grid.
        tile ([`Tile`]): the one with the largest part of it.
    """

    kind: str
    shape: shapely.Geometry
    tile: Tile


def trace(
    mask: np.ndarray,
    known: np.ndarray,
    tile: Tile,
    kinds: Sequence[str],
    classes: Classes = ROADS_AND_BUILDINGS,
) -> tuple[FoundObject, ...]:
    """
    The objects in a tile's core.

    Args:
        mask (`np.ndarray` of shape `(size, size)`, uint8): see [`predict_mask`].
        known (`np.ndarray` of shape `(size, size)`, bool): where there is ground at both dates; elsewhere is nothing.
        tile ([`Tile`]): where the mask lies.
        kinds (`Sequence[str]`): the model's `mask_classes`.
        classes ([`Classes`], *optional*): whose values the mask has; by default roads and buildings.
    """
    inside = tile.core_within
    found, corner = np.where(known, mask, 0)[inside], Affine.translation(*tile.core[:2])
    return tuple(
        FoundObject(kind, shape)
        for kind, value in class_values(kinds, classes).items()
        for shape in join([shapely.geometry.shape(each) for each, _ in _shapes(found == value, corner)])
    )


def _shapes(mask: np.ndarray, transform: Affine) -> Iterator[tuple[dict, float]]:
    # Diagonal neighbours would make rings that touch themselves: they are joined afterwards.
    return shapes(mask.astype(np.uint8), mask=mask, connectivity=4, transform=transform)


def join(parts: Sequence[shapely.Geometry]) -> list[shapely.Geometry]:
    """One geometry for all parts that touch, at a corner too, as connected components of a mask do."""
    if len(parts) < 2:
        return list(parts)
    return [shapely.union_all([parts[each] for each in group]) for group in _groups(parts)]


def _groups(parts: Sequence[shapely.Geometry]) -> list[list[int]]:
    """The numbers of those that hang together."""
    one, other = shapely.STRtree(parts).query(parts, predicate="intersects")
    links = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(parts),) * 2)
    _, labels = connected_components(links, directed=False)
    groups: dict[int, list[int]] = {}
    for number, label in enumerate(labels.tolist()):
        groups.setdefault(label, []).append(number)
    return list(groups.values())


def join_scene(answers: Iterable[TileAnswer]) -> Iterator[SceneObject]:
    """
    The objects of a scene, each once and whole: parts that meet where cores do are one. Only those that reach the edge
    of their core are kept until all answers are there. Specks, below the area that counting goes by, are left out.
    """
    waiting: dict[str, list[SceneObject]] = {}
    least = 0
    for answer in answers:
        least = Thresholds.for_size(answer.tile.size).min_area
        edge = shapely.box(*answer.tile.core).exterior
        for found in answer.objects:
            item = SceneObject(found.kind, found.shape, answer.tile)
            if shapely.intersects(found.shape, edge):
                waiting.setdefault(found.kind, []).append(item)
            elif found.shape.area >= least:
                yield item
    for kind, items in waiting.items():
        for group in _groups([item.shape for item in items]):
            parts = [items[each] for each in group]
            whole = shapely.union_all([part.shape for part in parts])
            if whole.area >= least:
                yield SceneObject(kind, whole, max(parts, key=lambda part: part.shape.area).tile)
