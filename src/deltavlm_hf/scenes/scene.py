"""A scene: both dates on one grid, in one stretch, cut into tiles."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
from skimage.registration import phase_cross_correlation

from .grid import Grid, footprint, read_grid
from .raster import Raster, gdal, open_raster
from .stac import locate
from .tiles import Tile, Tiling
from .values import Matching, choose_stretch

OVERLAP, MIN_VALID = 0.25, 0.5
_SAMPLES, _SAMPLE_SIDE = 16, 64  # windows along each side, pixels along each side of a window
_SHIFT_SAMPLES, _SHIFT_SIDE, _SHIFT_VALID = 5, 128, 0.9
_STRIP = 64  # rows of a reduced picture that are read at once
_LARGEST_SHIFT = 1.0  # pixels, above which it is told


class TooLittleGround(Exception):
    """A tile of which too little is known at one date: it is not asked about."""


class Scene:
    """
    Two georeferenced rasters of one place, as image pairs of the size and ground resolution that a model knows:
    `scene[i]` is the pair of tile `i`, two arrays `(size, size, 3)`, uint8. Nothing is read but what is asked for, and
    each process opens the files for itself.

    Args:
        before (`str` or `Path`): raster of the first date, whatever GDAL opens, or a STAC item, see [`locate`]; its
            grid is the scene's.
        after (`str` or `Path`): raster of the second date, in any reference system and resolution.
        size (`int`): side of a tile, in pixels: the model's image size.
        resolution (`float`, *optional*): metres per pixel, see [`read_grid`].
        bands (`Sequence[int]`, *optional*): red, green and blue, from 1 on, see [`choose_bands`].
        stretch (*optional*): what is black and what is white: two numbers, or `"none"` for all that the type can hold.
            By default 8-bit values are taken as they are, and of others percentiles 2 and 98 of both dates together.
        match_histograms (`bool`, *optional*, defaults to `False`): bring date 2's values to date 1's distribution.
        overlap (`float`, *optional*, defaults to 0.25): how much of a tile its neighbour sees too.
        min_valid (`float`, *optional*, defaults to 0.5): the share of a tile that must be known at both dates.
        aoi (`str` or `Path`, *optional*): areas, in a file that GDAL opens: only tiles whose cores touch one are asked
            about.

    Attributes:
        grid ([`Grid`]): what all pixels refer to.
        tiling ([`Tiling`]): all tiles.
        chosen (`list[int]`): those to ask about.
        stretch ([`Stretch`]): for both dates.
        shift (`tuple[float, float]` or None): how many pixels date 2 lies right of and below date 1, on the median of
            samples; None where too little could be compared, or samples do not agree.

    Raises:
        ValueError: if the dates cannot be brought onto one grid or have no known ground in common, or an argument
            cannot be.
    """

    def __init__(
        self,
        before: str | os.PathLike,
        after: str | os.PathLike,
        size: int,
        *,
        resolution: float | None = None,
        bands: Sequence[int] | None = None,
        stretch: str | Sequence[float] | None = None,
        match_histograms: bool = False,
        overlap: float = OVERLAP,
        min_valid: float = MIN_VALID,
        aoi: str | os.PathLike | None = None,
    ):
        if resolution is not None and not 0 < resolution < math.inf:
            raise ValueError(f"`resolution` is {resolution}, expected metres per pixel.")
        if not 0 < min_valid <= 1:
            raise ValueError(f"`min_valid` is {min_valid}, expected a share above 0, up to 1.")
        self.size, self.min_valid = size, min_valid
        before, after = locate(before), locate(after)
        with gdal(), open_raster(before) as first, open_raster(after) as second:
            self.grid = read_grid(first, resolution)
            self.covered = footprint(second, self.grid)
        self.tiling = Tiling(self.grid.width, self.grid.height, size, overlap)
        grid = self.grid.at_least(size)
        self.before, self.after = Raster(before, grid, bands), Raster(after, grid, bands)
        self.chosen = list(range(len(self.tiling))) if aoi is None else self.tiling.touching(read_area(aoi, self.grid))
        if not self.chosen:
            raise ValueError(f"{os.fspath(aoi or '')} does not touch the scene.")
        sample = self._sample()
        self.matching = Matching.measure(*sample) if match_histograms else None
        if self.matching is not None:
            sample = sample[0], self.matching(sample[1])
        self.stretch = choose_stretch(stretch, (self.before.dtype, self.after.dtype), sample)
        self.shift = self._measure_shift()

    def __len__(self) -> int:
        return len(self.tiling)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """
        Raises: as [`read_tile`].
        """
        before, after, _ = self.read_tile(index)
        return before, after

    def read_tile(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        A tile, and what of it is known, see [`read`].

        Raises:
            TooLittleGround: where less than `min_valid` of the tile is known.
            ValueError: if a file cannot be read there.
        """
        tile = self.tiling[index]
        before, after, valid = self.read(tile.left, tile.top, tile.size)
        share = float(valid.mean())
        if share < self.min_valid:
            raise TooLittleGround(f"{share:.2f} of the ground is known at both dates, {self.min_valid} is needed")
        return before, after, valid

    @property
    def rasters(self) -> tuple[Raster, Raster]:
        """Before and after."""
        return self.before, self.after

    def read(self, left: int, top: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        A square of the grid as the model sees it. What is unknown at one date has the same colour at both: nothing
        changes there.

        Returns:
            `tuple[np.ndarray, np.ndarray, np.ndarray]`: before and after `(side, side, 3)`, uint8; and `(side, side)`,
            bool: what is known at both.
        """
        before, after, valid = self._show(*self._read(left, top, side))
        known = [image[valid] for image in (before, after)]
        colour = np.concatenate(known).mean(0) if valid.any() else np.full(3, 127.0)
        for image in (before, after):
            image[~valid] = np.rint(colour).astype(np.uint8)
        return before, after, valid

    def known(self, tile: Tile) -> np.ndarray:
        """Which pixels of a tile are known at both dates: `(size, size)`, bool."""
        return self._read(tile.left, tile.top, tile.size)[1]

    def reduced(self, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        The whole scene in so many pixels along its longer side, or fewer.

        Returns:
            As [`read`]; what is unknown is left as it is.
        """
        width, height = self.grid.width, self.grid.height
        scale = min(1.0, most / max(width, height))
        rows = np.linspace(0, height, max(1, round(height * scale)) + 1).round().astype(int)
        columns = max(1, round(width * scale))
        strips = []
        for start in range(0, len(rows) - 1, _STRIP):
            few = rows[start : start + _STRIP + 1].tolist()
            shape = len(few) - 1, columns
            read = [raster.reduced(few[0], few[-1] - few[0], shape) for raster in self.rasters]
            strips.append(self._show([values for values, _ in read], read[0][1] & read[1][1]))
        before, after, valid = (np.concatenate(each) for each in zip(*strips, strict=True))
        return before, after, valid

    def facts(self) -> dict[str, Any]:
        """What the pixels of all tiles follow from, for files to tell."""
        return {
            "before": Path(self.before.path).name,
            "after": Path(self.after.path).name,
            "bands": [list(self.before.bands), list(self.after.bands)],
            "stretch": str(self.stretch),
            "match_histograms": self.matching is not None,
            "tile": self.size,
            "tiles": [len(self.tiling.rows), len(self.tiling.columns)],
            "tiles_overlap": self.tiling.overlaps,
            "transform": list(self.grid.transform)[:6],
            "min_valid": self.min_valid,
        }

    def warnings(self) -> list[str]:
        """What the scene's answers may suffer from."""
        if self.shift is None or max(map(abs, self.shift)) <= _LARGEST_SHIFT:
            return []
        right, down = self.shift
        return [
            f"date 2 lies {right:+.1f} pixels to the right and {down:+.1f} down of date 1: what stands out may be the "
            "shift, not change. Register the dates first; nothing is moved here."
        ]

    def _show(self, values: list[np.ndarray], valid: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        before, after = values[0], values[1] if self.matching is None else self.matching(values[1])
        return self.stretch(before), self.stretch(after), valid

    def _read(self, left: int, top: int, side: int) -> tuple[list[np.ndarray], np.ndarray]:
        (before, known_before), (after, known_after) = (raster.read(left, top, side, side) for raster in self.rasters)
        return [before, after], known_before & known_after

    def _windows(self, along: int, side: int) -> Iterator[tuple[int, int, int]]:
        """Squares spread evenly over the ground that both dates have; all of it if it is small."""
        west, north, east, south = self.covered.bounds
        side = min(side, self.before.grid.width, self.before.grid.height)
        for top in _spread(north, south, self.before.grid.height, along, side):
            for left in _spread(west, east, self.before.grid.width, along, side):
                yield left, top, side

    def _sample(self) -> tuple[np.ndarray, np.ndarray]:
        """Values of both dates where both are known, `(3, N)` each."""
        parts = []
        for window in self._windows(_SAMPLES, _SAMPLE_SIDE):
            values, valid = self._read(*window)
            parts.append([each[:, valid] for each in values])
        before, after = (np.concatenate(date, axis=1) for date in zip(*parts, strict=True))
        if not before.size:
            raise ValueError(
                f"No pixel of {self.before.path} and {self.after.path} is known at both dates: where one has ground, "
                "the other has nodata, is masked or ends."
            )
        return before, after

    def _measure_shift(self) -> tuple[float, float] | None:
        found = []
        for window in self._windows(_SHIFT_SAMPLES, _SHIFT_SIDE):
            before, after, valid = self.read(*window)
            if valid.mean() >= _SHIFT_VALID:
                taper = np.outer(*2 * [np.hanning(len(valid))])
                dates = [(each.mean(2) - each.mean()) * taper for each in (before, after)]
                if all(date.any() for date in dates):
                    moved, _, _ = phase_cross_correlation(*dates, upsample_factor=10)
                    found.append(moved)
        if not found:
            return None
        middle = np.median(found, axis=0)
        if (np.abs(np.array(found) - middle).max(1) <= _LARGEST_SHIFT).mean() < 0.5:
            return None  # samples of scenes that look alike nowhere agree on nothing
        down, right = -middle  # what is measured is the way back
        return float(right), float(down)


def read_area(path: str | os.PathLike, grid: Grid) -> shapely.Geometry:
    """
    Areas in a file, in columns and rows of a grid.

    Raises:
        ValueError: if the file cannot be read or has no areas.
    """
    try:
        areas = geopandas.read_file(path)
    except Exception as error:  # of pyogrio, GDAL and geopandas
        raise ValueError(f"Cannot read areas from {os.fspath(path)!r}: {error}") from error
    areas = areas[areas.geometry.notna() & ~areas.geometry.is_empty]
    if areas.empty or areas.crs is None:
        raise ValueError(f"{os.fspath(path)!r} has no {'areas' if areas.empty else 'reference system'}.")
    return grid.to_pixels(shapely.make_valid(areas.to_crs(grid.crs).union_all()))


def _spread(start: float, end: float, length: int, count: int, side: int) -> list[int]:
    """Where windows begin that lie evenly between two places, within so many pixels; none overlap."""
    first, last = int(start), max(int(start), math.ceil(end) - side)
    number = max(1, min(count, 1 + (last - first) // side))
    return [min(round(each), length - side) for each in np.linspace(first, last, number)]
