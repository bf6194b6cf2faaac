"""Where tiles lie on a grid, and what of it each of them owns."""

import math
from dataclasses import dataclass

import numpy as np
import shapely

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the grid; right and bottom are not part of it


@dataclass(frozen=True)
class Tile:
    """
    What the model sees at once.

    Attributes:
        index (`int`): its number, row by row from the top left.
        row, column (`int`): its place among the tiles.
        left, top, size (`int`): its square, in pixels of the grid.
        core (`tuple[int, int, int, int]`): what it owns: left, top, right, bottom. The cores of all tiles cover the
            grid, each pixel once.
    """

    index: int
    row: int
    column: int
    left: int
    top: int
    size: int
    core: Box

    @property
    def name(self) -> str:
        return f"r{self.row:04d}c{self.column:04d}"

    @property
    def core_within(self) -> tuple[slice, slice]:
        """Rows and columns of the core, within the tile."""
        left, top, right, bottom = self.core
        return slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)

    def cell(self, number: int) -> shapely.Geometry:
        """A cell of the 3x3 grid, row by row from the top left, as far as it lies in the core."""
        row, column = divmod(number, 3)
        third = self.size / 3
        left, top = self.left + column * third, self.top + row * third
        return shapely.box(left, top, left + third, top + third).intersection(shapely.box(*self.core))


class Tiling:
    """
    Tiles that cover a grid. Neighbours overlap, and share the overlap half and half; the last of a row or column is
    moved back into the grid.

    Args:
        width, height (`int`): of the grid, in pixels.
        size (`int`): side of a tile, in pixels.
        overlap (`float`): how much of a tile its neighbour sees too, from 0 to less than 1.

    Raises:
        ValueError: if `overlap` is out of bounds.
    """

    def __init__(self, width: int, height: int, size: int, overlap: float):
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"`overlap` is {overlap}, expected 0 to 0.9 of a tile.")
        self.size = size
        step = size - round(size * overlap)
        self.columns, self.rows = _cut(width, size, step), _cut(height, size, step)

    @property
    def overlaps(self) -> bool:
        """Whether any two tiles see the same ground; without an overlap, where the grid's sides are no multiple."""
        sides = (self.columns, self.rows)
        return any(after[0] - one[0] < self.size for side in sides for one, after in zip(side, side[1:], strict=False))

    def __len__(self) -> int:
        return len(self.columns) * len(self.rows)

    def __getitem__(self, index: int) -> Tile:
        row, column = divmod(index, len(self.columns))
        left, start, end = self.columns[column]
        top, upper, lower = self.rows[row]
        return Tile(index, row, column, left, top, self.size, (start, upper, end, lower))

    def touching(self, area: shapely.Geometry) -> list[int]:
        """The tiles whose cores have a part in an area, which is given in columns and rows of the grid."""
        shapely.prepare(area)
        lefts, rights = (np.array([part[end] for part in self.columns]) for end in (1, 2))
        found: list[int] = []
        for row, (_, upper, lower) in enumerate(self.rows):
            cores = shapely.box(lefts, upper, rights, lower)
            found += (row * len(self.columns) + np.flatnonzero(shapely.intersects(area, cores))).tolist()
        return found


def _cut(length: int, size: int, step: int) -> list[tuple[int, int, int]]:
    """Along one side: where each tile begins, and from where to where its core goes."""
    count = 1 + max(0, math.ceil((length - size) / step))
    starts = [min(number * step, max(0, length - size)) for number in range(count)]
    borders = [0, *((start + size + after) // 2 for start, after in zip(starts, starts[1:], strict=False)), length]
    return [(start, *core) for start, core in zip(starts, zip(borders, borders[1:], strict=False), strict=True)]
