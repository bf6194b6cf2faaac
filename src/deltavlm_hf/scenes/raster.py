"""One date on the common grid, in windows: values of three bands, and which of them are known."""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import rasterio
from affine import Affine
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.warp import reproject

from ..processing.gdal_reading import colour_bands
from .grid import Grid, read_grid

CACHE = 64 * 2**20  # bytes of decoded blocks that GDAL keeps in each process; its own default grows with the machine
WARP_MEMORY = 32  # MiB, for one step of warping


def gdal() -> rasterio.Env:
    """The bounds within which GDAL works here."""
    return rasterio.Env(GDAL_CACHEMAX=CACHE)


def open_raster(path: str | os.PathLike) -> DatasetReader:
    """
    Opens what GDAL opens.

    Raises:
        ValueError: if GDAL cannot, or the raster has no values that are numbers.
    """
    try:
        dataset = rasterio.open(path)
    except RasterioError as error:
        raise ValueError(f"Cannot open {os.fspath(path)!r} as a raster: {error}") from error
    if dataset.count == 0:
        raise ValueError(f"{os.fspath(path)!r} has no bands of its own: name one of its subdatasets (gdalinfo).")
    if any(np.dtype(kind).kind == "c" for kind in dataset.dtypes):
        raise ValueError(f"{os.fspath(path)!r} has complex numbers: convert it to amplitudes first.")
    return dataset


def choose_bands(dataset: DatasetReader, bands: Sequence[int] | None = None) -> tuple[int, int, int]:
    """
    The bands of red, green and blue, from 1 on: those given, or see [`colour_bands`].

    Raises:
        ValueError: if there is no such band, or not three are given.
    """
    if bands is not None:
        if len(bands) != 3 or not all(1 <= band <= dataset.count for band in bands):
            raise ValueError(
                f"--bands {' '.join(map(str, bands))}: expected three of 1 to {dataset.count}, which {dataset.name} "
                "has, for red, green and blue."
            )
        return bands[0], bands[1], bands[2]
    return colour_bands(dataset)


class Raster:
    """
    One date, warped onto a grid (bilinear) as it is read. Each process opens the file for itself, at its first read.

    Args:
        path (`str` or `Path`): whatever GDAL opens.
        grid ([`Grid`]): to read on. Where the raster has no ground, nothing is known.
        bands (`Sequence[int]`, *optional*): see [`choose_bands`].

    Attributes:
        bands (`tuple[int, int, int]`): red, green and blue.
        dtype (`np.dtype`): that all of them fit.

    Raises:
        ValueError: see [`open_raster`] and [`choose_bands`].
    """

    def __init__(self, path: str | os.PathLike, grid: Grid, bands: Sequence[int] | None = None):
        self.path, self.grid = os.fspath(path), grid
        with gdal(), open_raster(path) as dataset:
            self.bands = choose_bands(dataset, bands)
            self.dtype = np.result_type(*(dataset.dtypes[band - 1] for band in self.bands))
            self.scale = math.sqrt(math.prod(read_grid(dataset).metres()) / math.prod(grid.metres()))
        self._opened: tuple[int, DatasetReader] | None = None

    def read(self, left: int, top: int, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
        """
        A window of the grid.

        Returns:
            `tuple[np.ndarray, np.ndarray]`: values `(3, H, W)` of the raster's own type; and `(H, W)`, bool: which
            pixels are known: neither nodata, transparent, masked, NaN nor beyond the raster.

        Raises:
            ValueError: if the file cannot be read there.
        """
        with gdal():
            if self._opened is None or self._opened[0] != os.getpid():  # a handle of before a fork is another's
                self._opened = os.getpid(), open_raster(self.path)
            transform = self.grid.transform @ Affine.translation(left, top)
            return self._warp(self._opened[1], transform, (height, width), self.scale)

    def reduced(self, top: int, height: int, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """
        Rows of the grid, in so many pixels `(H, W)`, of the overview that comes nearest.

        Returns and Raises: as [`read`].
        """
        rows, columns = shape
        shrunk = self.grid.width / columns
        transform = self.grid.transform @ Affine.translation(0, top) @ Affine.scale(shrunk, height / rows)
        with gdal(), open_raster(self.path) as dataset:
            factors = [factor for factor in dataset.overviews(self.bands[0]) if factor * self.scale <= shrunk]
            if not factors:
                return self._warp(dataset, transform, shape, self.scale / shrunk)
            with rasterio.open(self.path, overview_level=len(factors) - 1) as overview:
                return self._warp(overview, transform, shape, factors[-1] * self.scale / shrunk)

    def _warp(
        self, dataset: DatasetReader, transform: Affine, shape: tuple[int, int], scale: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """`scale`: pixels of the result for one of the dataset's."""
        read = sorted({*self.bands})  # each once; rasterio puts them at the places that they have in the file
        found = np.zeros((read[-1] + 1, *shape), self.dtype)
        # Without its scale GDAL guesses how much pixels shrink from each window's outline, and blurs what is turned.
        scale = 1.0 if scale > 0.99 else scale
        alpha = dataset.count if dataset.colorinterp[-1] == ColorInterp.alpha else 0
        try:
            reproject(
                rasterio.band(dataset, read),
                found,
                dst_transform=transform,
                dst_crs=self.grid.crs,
                src_alpha=alpha,
                dst_alpha=len(found),
                resampling=Resampling.bilinear,
                warp_mem_limit=WARP_MEMORY,
                XSCALE=scale,
                YSCALE=scale,
            )
        except RasterioError as error:
            column, row = (round(each) for each in ~self.grid.transform @ (transform.c, transform.f))
            raise ValueError(f"Cannot read {self.path!r} at column {column}, row {row}: {error}") from error
        values = found[[band - 1 for band in self.bands]]
        return values, (found[-1] > 0) & np.isfinite(values).all(0)

    def close(self) -> None:
        if self._opened is not None and self._opened[0] == os.getpid():
            self._opened[1].close()
        self._opened = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": None}
