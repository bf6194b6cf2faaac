"""What a scan writes: layers that other programs open, a raster, a picture and a page."""

import json
import pickle
import re
import sqlite3
from contextlib import closing
from html.parser import HTMLParser

import geopandas
import numpy as np
import pyarrow.parquet
import pytest
import rasterio
import shapely
import torch
from geo_rasters import CORNER, UTM_33, UTM_34, as_reflectance, lay_out, rewarp, write_raster
from PIL import Image
from pyproj import Geod

from deltavlm_hf.cli import main
from deltavlm_hf.scenes import Scene, scan, to_geodataframe
from deltavlm_hf.scenes.heat import write_heat
from deltavlm_hf.scenes.layers import Layers, write_layers
from deltavlm_hf.scenes.picture import draw_scene
from deltavlm_hf.scenes.scanning import answer_tiles, open_scene

STRIP = 60


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Six scenes of 16 bits, three in a row; left of column 60 nothing is known."""
    folder = tmp_path_factory.mktemp("scenes")
    before, after, _ = lay_out((2, 8, 10, 0, 22, 5), 3)
    before[:, :STRIP] = 0
    dates = as_reflectance(before, 0), as_reflectance(after)
    return [write_raster(folder / f"{date}.tif", image, nodata=0) for date, image in enumerate(dates, start=1)]


@pytest.fixture(scope="module")
def answers(files, tiny_model, tiny_processor):
    return list(scan(tiny_model, tiny_processor, *files, stretch=(0, 2850)))


@pytest.fixture(scope="module")
def masked(make_mask_model, files):
    """Answers of a model with masks that knows nothing, but finds something, and the model."""
    model, processor = make_mask_model()
    answers = list(scan(model, processor, *files, questions=[], overlap=0.5, stretch=(0, 2850)))
    assert 0 < len(to_geodataframe(answers, "objects"))
    return answers, model, processor


def test_a_geopackage_has_its_layers_and_their_styles(answers, tmp_path):
    (path,) = write_layers(tmp_path / "new" / "scan.gpkg", Layers(answers))
    layers = geopandas.list_layers(path).dropna()
    kinds = {"tiles": "Polygon", "cells": "Polygon", "objects": "MultiPolygon"}
    assert dict(zip(layers.name, layers.geometry_type, strict=True)) == kinds
    changes = [answer.changed for answer in answers]
    tiles, cells = (geopandas.read_file(path, layer=name) for name in ("tiles", "cells"))
    assert tiles.crs == cells.crs == UTM_33 and tiles.is_valid.all() and cells.is_valid.all()
    assert tiles.changed.tolist() == [{None: "unknown"}.get(each, str(each).lower()) for each in changes]
    assert changes.count(None) == 2 and {*changes} == {None, True, False}
    assert tiles.geometry[4].bounds == (735_048, 4_999_904, 735_096, 4_999_952)
    assert len(cells) and set(cells.kind) <= {"road", "building"} and set(cells.tile) <= set(tiles.tile)
    assert {"before", "after", "model", "commit", "stretch", "question", "answer", "reason"} <= {*tiles.columns}
    assert tiles.model[0] == "tiny" and tiles.stretch[0] == "0..2850 0..2850 0..2850"
    with closing(sqlite3.connect(path)) as database:
        rows = database.execute("SELECT f_table_name, f_geometry_column, styleQML, useAsDefault FROM layer_styles")
        styles = {name: (column, qml, default) for name, column, qml, default in rows}
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert {*styles} == {"tiles", "cells", "objects"}
    for column, qml, default in styles.values():
        assert (column, default) == ("geom", 1) and "<renderer-v2" in qml
    assert re.findall(r'category .*?value="(\w+)"', styles["tiles"][1]) == ["true", "false", "unknown"]
    assert [each.name for each in path.parent.iterdir()] == ["scan.gpkg"]
    write_layers(path, Layers(answers[1:]))  # in place of it, not beside it
    assert len(geopandas.read_file(path, layer="tiles")) == 5


def test_parquet_and_geojson_are_of_their_standards(answers, tmp_path):
    layers, tiles = Layers(answers), to_geodataframe(answers)
    paths = write_layers(tmp_path / "scan.parquet", layers)
    assert [path.name for path in paths] == ["scan.parquet", "scan_cells.parquet", "scan_objects.parquet"]
    about = json.loads(pyarrow.parquet.read_schema(paths[0]).metadata[b"geo"])
    assert about["version"] == "1.1.0" and about["columns"]["geometry"]["covering"]
    assert geopandas.read_parquet(paths[0]).drop(columns="bbox", errors="ignore").equals(tiles)
    paths = write_layers(tmp_path / "scan.geojson", layers)
    collection = json.loads(paths[0].read_text())
    assert "crs" not in collection and len(collection["features"]) == 6
    for feature, shape in zip(collection["features"], tiles.to_crs("EPSG:4326").geometry, strict=True):
        drawn = shapely.geometry.shape(feature["geometry"])
        assert drawn.exterior.is_ccw and 17.9 < drawn.centroid.x < 18.1
        assert drawn.symmetric_difference(shape).area < 1e-3 * shape.area
    with pytest.raises(ValueError, match="layers are written as .gpkg, .parquet, .geojson"):
        write_layers(tmp_path / "scan.shp", layers)


def test_areas_are_those_on_the_ellipsoid(answers, masked):
    tiles = to_geodataframe(answers)
    left, top, right, bottom = tiles.total_bounds
    whole = geopandas.GeoSeries([shapely.box(left, top, right, bottom)], crs=UTM_33).to_crs("EPSG:4326").item()
    expected, _ = Geod(ellps="WGS84").geometry_area_perimeter(shapely.orient_polygons(whole))
    assert tiles.area_m2.sum() == pytest.approx(expected, rel=1e-5)
    assert tiles.area_m2.sum() < 0.9996 * tiles.geometry.area.sum(), "the map enlarges, far from its middle meridian"
    objects, cores = to_geodataframe(masked[0], "objects"), to_geodataframe(masked[0])
    assert objects.is_valid.all() and objects.geometry.area.sum() <= cores.geometry.area.sum()
    for kind in ("road", "building"):
        found = objects[objects.kind == kind]
        assert cores[f"{kind}_objects"].sum() == len(found)
        assert cores[f"{kind}_m2"].sum() >= 0.999 * found.area_m2.sum()  # specks are in the one alone
    assert not objects.intersects(shapely.box(left, bottom, left + 0.5 * STRIP - 0.01, top)).any()


def test_layers_of_nothing(answers):
    with pytest.raises(ValueError, match="`layer` is 'roads', expected one of tiles, cells, objects"):
        to_geodataframe(answers, "roads")
    with pytest.raises(ValueError, match="no answers"):
        to_geodataframe([])


def test_heat_lies_on_the_grid_of_date_1(files, tiny_model, tiny_processor, tmp_path):
    scene = open_scene(tiny_model, tiny_processor, *files, stretch=(0, 2850))
    path = tmp_path / "heat.tif"
    write_heat(path, tiny_model, tiny_processor, scene)
    with rasterio.open(path) as file:
        assert (file.transform, file.shape, file.crs) == (CORNER, (192, 288), rasterio.CRS.from_string(UTM_33))
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        heat = file.read(1)
    assert np.isnan(heat[:, :96]).all() and np.isfinite(heat[:, 96:]).all(), "the first tiles are unknown"
    pair = scene[4]
    with torch.no_grad():
        inputs = tiny_processor(images=pair, text="Where?", history=[], return_tensors="pt")
        expected = tiny_model.explain(**inputs).change[0].numpy()
    assert np.abs(heat[96:, 96:192] - expected).max() < 1e-3
    coarse = Scene(*files, 96, resolution=1.0, overlap=0, stretch=(0, 2850))
    write_heat(path, tiny_model, tiny_processor, coarse)
    with rasterio.open(path) as file:
        assert (file.transform, file.shape) == (CORNER, (192, 288))
        assert np.isnan(file.read(1)[:, : STRIP - 4]).all() and np.isfinite(file.read(1)[:, STRIP + 4 :]).all()
    assert list(tmp_path.iterdir()) == [path]


def test_heat_of_a_model_with_masks_is_a_probability(files, masked, tmp_path):
    _, model, processor = masked
    scene = open_scene(model, processor, *files, stretch=(0, 2850), overlap=0)
    write_heat(tmp_path / "heat.tif", model, processor, scene)
    with rasterio.open(tmp_path / "heat.tif") as file:
        heat = file.read(1)[64:128, 128:192]
    inputs = processor(images=scene[scene.tiling.touching(shapely.Point(160, 100))[0]], return_tensors="pt")
    expected = model.segment(**inputs)[0].amax(0).numpy()
    assert np.abs(heat - expected).max() < 1e-3


def test_a_picture_shows_what_was_found(files, answers, tiny_model, tiny_processor, tmp_path):
    scene = open_scene(tiny_model, tiny_processor, *files, stretch=(0, 2850))
    draw_scene(tmp_path / "scene.png", scene, answers)
    with Image.open(tmp_path / "scene.png") as image:
        pixels = np.asarray(image)
    after = scene.read(96, 0, 96)[1].astype(int)
    assert pixels.shape[1] >= 288 and pixels.shape[0] > 192 + 40
    unchanged = [answer.tile for answer in answers if answer.changed is False][0]
    left, top = unchanged.left, unchanged.top
    shown = scene.read(left, top, 96)[1]
    assert (pixels[top + 2 : top + 94, left + 2 : left + 94] == shown[2:94, 2:94]).all()
    assert np.abs(pixels[2:94, 98:190] - after[2:94, 2:94]).max() > 20 or answers[1].changed is False
    draw_scene(tmp_path / "small.png", open_scene(tiny_model, tiny_processor, *files, resolution=2.0), answers)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.sources, self.tags, self.groups = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.sources += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "g":
            self.groups.append(attributes["id"])


def test_all_at_once_from_the_command_line(files, tmp_path, capsys):
    names = {"--output": "s.gpkg", "--heat": "s.tif", "--preview": "s.png", "--html": "s.html"}
    options = [text for option, name in names.items() for text in (option, str(tmp_path / name))]
    assert main(["scan", *map(str, files), "--model", "tiny", "--stretch", "0", "2850", *options]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names.values())
    said = capsys.readouterr()
    assert "2 of 6 tiles unknown" in said.out and "as answers number them" in said.out
    text = (tmp_path / "s.html").read_text()
    page = Page(text)
    assert page.groups == ["tiles", "cells"] and page.tags.count("img") == 2 and page.tags.count("path") > 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "http" not in text.replace("<!doctype", "") and "0..2850" in text


def test_objects_from_the_command_line(files, mask_model_folder, tmp_path, capsys):
    options = ["--max-new-tokens", "2", "--stretch", "0", "2850", "--output", str(tmp_path / "s.gpkg")]
    options += ["--preview", str(tmp_path / "s.png"), "--html", str(tmp_path / "s.html")]
    assert main(["scan", *map(str, files), "--model", str(mask_model_folder), *options]) == 0
    said = capsys.readouterr().out
    objects = geopandas.read_file(tmp_path / "s.gpkg", layer="objects")
    for kind in ("road", "building"):
        found = objects[objects.kind == kind]
        assert f"{kind}: {len(found)} objects, {found.area_m2.sum():,.0f} m²\n" in said
    page = Page((tmp_path / "s.html").read_text())
    assert len(objects) and page.groups == ["tiles", "objects"]
    with Image.open(tmp_path / "s.png") as image:
        assert image.width >= 288


def test_a_reduced_scene_is_the_scene(files, tmp_path):
    scene = Scene(*files, 96, stretch=(0, 2850))
    before, after, valid = scene.reduced(96)
    assert before.shape == (64, 96, 3) and valid[:, 20:].all() and not valid[:, :19].any()
    read = scene.read(STRIP, 0, 192)[1][:, :228].astype(float)
    assert np.abs(after[:, 20:84].mean((0, 1)) - read[:192, :192].mean((0, 1))).max() < 3
    with rasterio.open(files[1]) as file:
        content = file.read().transpose(1, 2, 0)
    copy = write_raster(tmp_path / "overviews.tif", content, nodata=0)
    with rasterio.open(copy, "r+") as file:
        file.build_overviews([2, 4], rasterio.enums.Resampling.average)
    again = Scene(files[0], copy, 96, stretch=(0, 2850)).reduced(96)[1]
    assert np.abs(again[:, 20:].astype(int) - after[:, 20:]).mean() < 6
    coarse = Scene(files[0], rewarp(files[1], tmp_path / "coarse.tif", UTM_34, 0.8), 96, stretch=(0, 2850))
    assert np.abs(coarse.reduced(288)[1][:, STRIP:].mean() - after[:, 20:].mean()) < 3


def test_tiles_that_several_processes_read_come_in_order(files, tiny_model, tiny_processor):
    scene = open_scene(tiny_model, tiny_processor, *files)
    found = answer_tiles(tiny_model, tiny_processor, scene, questions=["binary"], num_workers=2, batch_size=2)
    assert [answer.tile.index for answer in found] == list(range(6))
    again = pickle.loads(pickle.dumps(scene))  # as where processes are spawned
    assert all((one == two).all() for one, two in zip(again[4], scene[4], strict=True))
