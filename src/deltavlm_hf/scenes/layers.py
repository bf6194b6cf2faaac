"""Answers as layers for a map: GeoPackage, GeoParquet and GeoJSON."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import geopandas
import pyogrio
import shapely

from ..files import placing
from .answers import TileAnswer
from .grid import Grid, geod, to_degrees
from .objects import join_scene
from .styles import add_styles

LAYERS = ("tiles", "cells", "objects")
TOLD = ("before", "after", "model", "commit", "stretch")  # of a scan's facts, wherever it is shown
WORDS = {True: "true", False: "false", None: "unknown"}
SUFFIXES = (".gpkg", ".parquet", ".geojson")
_ROWS_AT_ONCE = 5000  # that are in memory while a GeoPackage is written


def to_geodataframe(answers: Iterable[TileAnswer], layer: str = "tiles") -> geopandas.GeoDataFrame:
    """
    A layer of what a scan said, in date 1's reference system.

    Args:
        answers (`Iterable[TileAnswer]`): see [`scan`]; all of them are kept.
        layer (`str`, *optional*, defaults to `"tiles"`): `"tiles"`: what each tile's answers are and mean, drawn as
            its core. `"cells"`: the cells of the 3x3 grids that answers name, as far as they lie in cores.
            `"objects"`: what masks show, each object once.

    Raises:
        ValueError: for a layer that is none of these, or if there are no answers.
    """
    if layer not in LAYERS:
        raise ValueError(f"`layer` is {layer!r}, expected one of {', '.join(LAYERS)}.")
    answers = list(answers)
    if not answers:
        raise ValueError("There are no answers to make a layer of.")
    layers = Layers(answers)
    return layers.frame(layer, layers.rows[layer]())


class Layers:
    """
    What a scan said, row by row: dicts of columns, with a geometry in columns and rows of the grid.

    Args:
        answers (`Sequence[TileAnswer]`): at least one.

    Attributes:
        rows (`dict`): for each of [`LAYERS`] what gives its rows.
    """

    def __init__(self, answers: Sequence[TileAnswer]):
        self.answers, self.source = answers, answers[0].source
        self.area = _Area(self.source.grid)
        self.rows: dict[str, Callable[[], Iterator[dict[str, Any]]]]
        self.rows = {"tiles": self.tiles, "cells": self.cells, "objects": self.objects}
        self._numbers: Counter | None = None

    def objects(self) -> Iterator[dict[str, Any]]:
        numbers: Counter = Counter()
        for found in join_scene(self.answers):
            numbers[found.tile.index, found.kind] += 1
            yield self._row(found.tile.name, found.shape, kind=found.kind)
        self._numbers = numbers

    def cells(self) -> Iterator[dict[str, Any]]:
        for answer in self.answers:
            for kind, name, shape in answer.cells:
                yield self._row(answer.tile.name, shape, kind=kind, cell=name)

    def tiles(self) -> Iterator[dict[str, Any]]:
        for answer in self.answers:
            said = answer.meaning
            row = {
                "changed": WORDS[answer.changed],
                **{each.count_column: said[each.count_column] for each in self.source.classes},
                **{each.cells_column: ", ".join(said[each.cells_column] or ()) for each in self.source.classes},
                "question": "\n".join(self.source.questions),
                "answer": "\n".join(answer.answers),
                "reason": answer.reason or "",
            }
            yield self._row(answer.tile.name, shapely.box(*answer.tile.core), **row, **self._found(answer))

    def _found(self, answer: TileAnswer) -> dict[str, Any]:
        """Of each class of masks, how many objects have their largest part in a tile, and its area there."""
        if self._numbers is None:
            self._numbers = Counter((each.tile.index, each.kind) for each in join_scene(self.answers))
        row: dict[str, Any] = {}
        for kind in self.source.kinds:
            shapes = [each.shape for each in answer.objects if each.kind == kind]
            known = answer.reason is None
            row[f"{kind}_objects"] = self._numbers[answer.tile.index, kind] if known else None
            row[f"{kind}_m2"] = sum(map(self.area, shapes)) if known else None
        return row

    def _row(self, tile: str, shape: shapely.Geometry, **columns) -> dict[str, Any]:
        return {"tile": tile, **columns, "area_m2": self.area(shape), "geometry": shape}

    def frame(self, layer: str, rows: Iterable[dict[str, Any]]) -> geopandas.GeoDataFrame:
        """Rows of a layer as a frame, with what all of them have in common."""
        columns = {
            "tiles": ["tile", "changed", *self.source.classes.columns]
            + [f"{kind}_{what}" for kind in self.source.kinds for what in ("objects", "m2")]
            + [*("area_m2", "question", "answer", "reason")],
            "cells": ["tile", "cell", "kind", "area_m2"],
            "objects": ["tile", "kind", "area_m2"],
        }[layer]
        frame = geopandas.GeoDataFrame(list(rows), columns=[*columns, "geometry"], crs=self.source.grid.crs)
        frame["geometry"] = [self.source.grid.to_ground(shape) for shape in frame["geometry"]]
        whole = {each.count_column for each in self.source.classes}
        whole |= {f"{kind}_objects" for kind in self.source.kinds}
        types = {name: "Int64" if name in whole else "Float64" if name.endswith("_m2") else "str" for name in columns}
        told = {name: str(self.source.facts[name]) for name in TOLD}
        return frame.astype(types).assign(**told)[[*columns, *told, "geometry"]].set_geometry("geometry")


class _Area:
    """Square metres on the ellipsoid, of what is given in columns and rows."""

    def __init__(self, grid: Grid):
        self.grid, self.geod, self.transformer = grid, geod(grid.crs), to_degrees(grid.crs)

    def __call__(self, shape: shapely.Geometry) -> float:
        degrees = shapely.transform(self.grid.to_ground(shape), self.transformer.transform, interleaved=False)
        return round(abs(self.geod.geometry_area_perimeter(shapely.orient_polygons(degrees))[0]), 2)


def check_output(path: str | os.PathLike) -> None:
    """Raises `ValueError` for a file name that is none of a layer's."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{os.fspath(path)!r}: layers are written as {', '.join(SUFFIXES)}, by the name's ending.")


def write_layers(path: str | os.PathLike, layers: Layers) -> list[Path]:
    """
    Writes layers, each file whole or not at all.

    Args:
        path (`str` or `Path`): of the file. A `.gpkg` holds all layers, with styles that QGIS takes up by itself; few
            of its rows are in memory at once. A `.parquet` (GeoParquet 1.1) and a `.geojson` (RFC 7946, longitude and
            latitude) hold the tiles, and beside it are files for the others: `NAME_cells`, `NAME_objects`.
        layers ([`Layers`]): of all answers.

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: for another suffix.
    """
    check_output(path)
    path = Path(path)
    if path.suffix.lower() == ".gpkg":
        with placing(path) as new:
            for name in reversed(LAYERS):  # objects first: tiles number them
                _write_geopackage(new, name, layers)
            add_styles(new, layers.source)
        return [path]
    paths = {name: path.with_name(f"{path.stem}_{name}{path.suffix}") for name in LAYERS} | {"tiles": path}
    for name, file in paths.items():
        frame = layers.frame(name, layers.rows[name]())
        with placing(file) as new:
            if path.suffix.lower() == ".parquet":
                frame.to_parquet(new, schema_version="1.1.0", write_covering_bbox=True)
            else:
                options = {"RFC7946": "YES", "WRITE_NAME": "NO"}
                pyogrio.write_dataframe(frame, new, driver="GeoJSON", geometry_type=_kind(name), **options)
    return list(paths.values())


def _write_geopackage(path: Path, name: str, layers: Layers) -> None:
    rows = layers.rows[name]()
    some, is_first = list(islice(rows, _ROWS_AT_ONCE)), True
    while some or is_first:
        options: dict[str, Any] = {"driver": "GPKG", "geometry_type": _kind(name), "append": not is_first}
        frame = layers.frame(name, some)
        pyogrio.write_dataframe(frame, path, layer=name, promote_to_multi=name == "objects", **options)
        some, is_first = list(islice(rows, _ROWS_AT_ONCE)), False


def _kind(layer: str) -> str:
    """What geometries of a layer are; an object may have parts that touch at a corner."""
    return "MultiPolygon" if layer == "objects" else "Polygon"
