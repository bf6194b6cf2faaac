"""Answers as layers for a map: GeoPackage, GeoParquet and GeoJSON."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import geopandas
import pyogrio
import shapely

from ..files import placing
from .answers import Source, TileAnswer
from .grid import geod, to_degrees
from .objects import join_scene
from .styles import add_styles

LAYERS = ("tiles", "cells", "objects")
WORDS = {True: "true", False: "false", None: "unknown"}
SUFFIXES = (".gpkg", ".parquet", ".geojson")


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
    return make_layers(answers)[layer]


def make_layers(answers: Sequence[TileAnswer]) -> dict[str, geopandas.GeoDataFrame]:
    """The layers of [`to_geodataframe`], by name: those that the questions and the model give something for."""
    source = answers[0].source
    area = _Area(source)
    objects = [
        {"kind": each.kind, "tile": each.tile.name, "area_m2": area(each.shape), "geometry": each.shape}
        for each in join_scene(answers)
    ]
    numbers: dict[tuple[str, str], int] = {}
    for each in objects:
        numbers[each["tile"], each["kind"]] = numbers.get((each["tile"], each["kind"]), 0) + 1
    tiles = [_tile_row(answer, area, numbers) for answer in answers]
    cells = [row for answer in answers for row in _cell_rows(answer, area)]
    about = _about(source)
    columns = {"cells": ["tile", "cell", "kind", "area_m2"], "objects": ["tile", "kind", "area_m2"]}
    made = {"tiles": _frame(tiles, list(tiles[0])[:-1], source, about)}
    made["cells"] = _frame(cells, columns["cells"], source, about)
    made["objects"] = _frame(objects, columns["objects"], source, about)
    return made


def _tile_row(answer: TileAnswer, area: "_Area", numbers: dict[tuple[str, str], int]) -> dict[str, Any]:
    known, said = answer.reason is None, answer.meaning
    row = {
        "tile": answer.tile.name,
        "question": "\n".join(answer.source.questions),
        "answer": "\n".join(answer.answers),
        "changed": WORDS[answer.changed],
        "reason": answer.reason,
        "roads": said["roads"],
        "buildings": said["buildings"],
        "road_cells": ", ".join(said["road_cells"] or ()),
        "building_cells": ", ".join(said["building_cells"] or ()),
        "area_m2": area(shapely.box(*answer.tile.core)),
    }
    for kind in answer.source.kinds:
        found = [each.shape for each in answer.objects if each.kind == kind]
        row[f"{kind}_objects"] = numbers.get((answer.tile.name, kind), 0) if known else None
        row[f"{kind}_m2"] = sum(map(area, found)) if known else None
    return {**row, "geometry": shapely.box(*answer.tile.core)}


def _cell_rows(answer: TileAnswer, area: "_Area") -> list[dict[str, Any]]:
    return [
        {"tile": answer.tile.name, "cell": name, "kind": kind, "area_m2": area(shape), "geometry": shape}
        for kind, name, shape in answer.cells
    ]


class _Area:
    """Square metres on the ellipsoid, of what is given in columns and rows."""

    def __init__(self, source: Source):
        self.grid = source.grid
        self.geod, self.transformer = geod(source.grid.crs), to_degrees(source.grid.crs)

    def __call__(self, shape: shapely.Geometry) -> float:
        degrees = shapely.transform(self.grid.to_ground(shape), self.transformer.transform, interleaved=False)
        return round(abs(self.geod.geometry_area_perimeter(shapely.orient_polygons(degrees))[0]), 2)


def _about(source: Source) -> dict[str, str]:
    return {name: str(source.facts[name]) for name in ("before", "after", "model", "commit", "stretch")}


def _frame(
    rows: list[dict[str, Any]], columns: list[str], source: Source, about: dict[str, str]
) -> geopandas.GeoDataFrame:
    frame = geopandas.GeoDataFrame(rows, columns=[*columns, "geometry"], geometry="geometry", crs=source.grid.crs)
    frame["geometry"] = [source.grid.to_ground(shape) for shape in frame.geometry]
    for name in frame.columns.intersection(["roads", "buildings", *(f"{kind}_objects" for kind in source.kinds)]):
        frame[name] = frame[name].astype("Int64")
    frame = frame.assign(**about)
    return frame[[name for name in frame.columns if name != "geometry"] + ["geometry"]]


def check_output(path: str | os.PathLike) -> None:
    """Raises `ValueError` for a file name that is none of a layer's."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{os.fspath(path)!r}: layers are written as {', '.join(SUFFIXES)}, by the name's ending.")


def write_layers(path: str | os.PathLike, layers: dict[str, geopandas.GeoDataFrame]) -> list[Path]:
    """
    Writes layers, each file whole or not at all.

    Args:
        path (`str` or `Path`): of the file. A `.gpkg` holds all layers, with styles that QGIS takes up by itself. A
            `.parquet` (GeoParquet 1.1) and a `.geojson` (RFC 7946, longitude and latitude) hold the tiles, and beside
            it are files for the others: `NAME_cells`, `NAME_objects`.
        layers (`dict`): see [`make_layers`].

    Returns:
        `list[Path]`: the files.

    Raises:
        ValueError: for another suffix.
    """
    check_output(path)
    path = Path(path)
    if path.suffix.lower() == ".gpkg":
        kinds = dict.fromkeys([*("road", "building"), *layers["cells"]["kind"], *layers["objects"]["kind"]])
        with placing(path) as new:
            for name, frame in layers.items():
                pyogrio.write_dataframe(frame, new, layer=name, driver="GPKG", geometry_type=_kind(frame))
            add_styles(new, kinds)
        return [path]
    paths = []
    for name, frame in layers.items():
        paths.append(path if name == "tiles" else path.with_name(f"{path.stem}_{name}{path.suffix}"))
        with placing(paths[-1]) as new:
            if path.suffix.lower() == ".parquet":
                frame.to_parquet(new, schema_version="1.1.0", write_covering_bbox=True)
            else:
                options = {"RFC7946": "YES", "WRITE_NAME": "NO"}
                pyogrio.write_dataframe(frame, new, driver="GeoJSON", geometry_type=_kind(frame), **options)
    return paths


def _kind(frame: geopandas.GeoDataFrame) -> str:
    return "MultiPolygon" if (frame.geom_type == "MultiPolygon").any() else "Polygon"
