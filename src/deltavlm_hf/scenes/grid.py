"""The grid that both dates are read on: date 1's, at the ground resolution that the model knows."""

import math
from dataclasses import dataclass

import shapely
from affine import Affine
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError
from rasterio.io import DatasetReader

_LEAST_OVERLAP = 0.01
_SAME = 0.01  # resolutions that differ by less are one: UTM alone stretches by 0.04 to 0.1 %
_PARTS = 20  # of each edge of an outline, which may be curved in another system


@dataclass(frozen=True)
class Grid:
    """
    Square pixels on the ground.

    Args:
        crs (`str`): the coordinate reference system, as WKT.
        transform (`affine.Affine`): from column and row to coordinates. Rows go down: a raster that is stored from
            south to north is read turned over.
        width (`int`): columns.
        height (`int`): rows.
    """

    crs: str
    transform: Affine
    width: int
    height: int

    def at_least(self, side: int) -> "Grid":
        """The same grid, of at least so many columns and rows; more are added to the right and below."""
        return Grid(self.crs, self.transform, max(self.width, side), max(self.height, side))

    def outline(self) -> shapely.Polygon:
        """Of the whole grid, in columns and rows."""
        return shapely.box(0, 0, self.width, self.height)

    def to_ground(self, geometry: shapely.Geometry) -> shapely.Geometry:
        """From columns and rows to coordinates."""
        return move(geometry, self.transform)

    def to_pixels(self, geometry: shapely.Geometry) -> shapely.Geometry:
        """From coordinates to columns and rows."""
        return move(geometry, ~self.transform)

    def metres(self) -> tuple[float, float]:
        """Width and height of the pixel in the middle, in metres on the ellipsoid."""
        column, row = self.width / 2, self.height / 2
        eastings, northings = zip(
            *(self.transform @ (column + right, row + down) for right, down in ((0, 0), (1, 0), (0, 1))), strict=True
        )
        longitudes, latitudes = to_degrees(self.crs).transform(eastings, northings, errcheck=True)
        ellipsoid = geod(self.crs)
        across, down = (
            ellipsoid.inv(longitudes[0], latitudes[0], longitudes[end], latitudes[end])[2] for end in (1, 2)
        )
        return across, down


def move(geometry: shapely.Geometry, transform: Affine) -> shapely.Geometry:
    """A geometry, whose points go where the transform takes them."""
    return shapely.transform(geometry, lambda x, y: transform @ (x, y), interleaved=False)


def to_degrees(crs: str) -> Transformer:
    """To longitude and latitude, WGS 84."""
    return Transformer.from_crs(CRS(crs), CRS("OGC:CRS84"), always_xy=True)


def geod(crs: str) -> Geod:
    """The ellipsoid of a reference system."""
    return CRS(crs).get_geod() or Geod(ellps="WGS84")


def read_grid(dataset: DatasetReader, resolution: float | None = None) -> Grid:
    """
    The grid to scan a raster on.

    Args:
        dataset (`rasterio.io.DatasetReader`): of the first date.
        resolution (`float`, *optional*): metres per pixel; by default the raster's own. Where that is within 1 % of
            it, pixels stay as they are; else they become squares of this size on the ground.

    Raises:
        ValueError: if the raster is not georeferenced, or so large in its system that it has no size on the ground.
    """
    if dataset.crs is None:
        raise ValueError(
            f"{dataset.name} has no coordinate reference system: nothing says where it is. Give it one: gdal_edit.py "
            "-a_srs EPSG:..., or rio edit-info."
        )
    if dataset.transform.is_identity:
        raise ValueError(
            f"{dataset.name} has a reference system but no transform from pixels to coordinates: warp it by its "
            "control points first (gdalwarp)."
        )
    grid = Grid(dataset.crs.to_wkt(), dataset.transform, dataset.width, dataset.height)
    if grid.transform.determinant > 0:
        grid = Grid(grid.crs, grid.transform @ Affine(1, 0, 0, 0, -1, grid.height), grid.width, grid.height)
    try:
        across, down = grid.metres()
    except ProjError as error:
        raise ValueError(f"{dataset.name} lies outside of where its reference system is defined: {error}") from error
    wanted = math.sqrt(across * down) if resolution is None else resolution
    right, below = wanted / across, wanted / down
    if max(abs(right - 1), abs(below - 1)) < _SAME:
        return grid
    width, height = (max(1, math.ceil(side - 1e-6)) for side in (grid.width / right, grid.height / below))
    return Grid(grid.crs, grid.transform @ Affine.scale(right, below), width, height)


def footprint(dataset: DatasetReader, grid: Grid) -> shapely.Geometry:
    """
    What a raster covers of a grid, in the grid's columns and rows.

    Raises:
        ValueError: if it has no reference system, or one that cannot be brought to the grid's, or it covers less than
            1 % of the grid, or nothing.
    """
    own = read_grid(dataset)
    try:
        # By way of date 2's system, which may be that of a far larger raster, all of which date 1's could not hold.
        shared = _brought(grid.outline(), grid, own).intersection(own.outline())
        covered = _brought(shared, own, grid).intersection(grid.outline())
    except ProjError as error:
        raise ValueError(
            f"The reference systems of both dates cannot be brought together: {CRS(own.crs).name} of {dataset.name} "
            f"and {CRS(grid.crs).name} of date 1 do not reach each other: {error}"
        ) from error
    share = covered.area / grid.outline().area
    if share == 0:
        raise ValueError(
            f"Both dates have no ground in common: {dataset.name} lies at {_bounds(own)}, date 1 at {_bounds(grid)}."
        )
    if share < _LEAST_OVERLAP:
        raise ValueError(
            f"{dataset.name} covers {share:.2%} of date 1, at least {_LEAST_OVERLAP:.0%} are needed: cut date 1 to "
            "the ground that both have, or choose another pair."
        )
    return covered


def _brought(shape: shapely.Geometry, one: Grid, other: Grid) -> shapely.Geometry:
    """From columns and rows of one grid to those of another; ProjError where that is not defined."""
    transformer = Transformer.from_crs(CRS(one.crs), CRS(other.crs), always_xy=True)
    points = shapely.segmentize(shape, max(one.width, one.height) / _PARTS)
    moved = shapely.transform(
        one.to_ground(points), lambda x, y: transformer.transform(x, y, errcheck=True), interleaved=False
    )
    return shapely.make_valid(other.to_pixels(moved))


def _bounds(grid: Grid) -> str:
    """Left, bottom, right and top."""
    found = ", ".join(f"{value:.8g}" for value in grid.to_ground(grid.outline()).bounds)
    return f"[{found}] in {CRS(grid.crs).name}"
