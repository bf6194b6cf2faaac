"""Tiles with cores, and the objects that masks of tiles make together."""

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from geo_rasters import CORNER, UTM_33, UTM_34, write_raster
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from deltavlm_hf.data.rules import THREE_BY_THREE, Thresholds
from deltavlm_hf.scenes import Grid, Scene, TileAnswer
from deltavlm_hf.scenes.answers import Source
from deltavlm_hf.scenes.objects import join_scene, trace
from deltavlm_hf.scenes.tiles import Tiling

KINDS = ("road", "building")


@given(st.integers(1, 400), st.integers(1, 400), st.integers(8, 96), st.sampled_from((0, 0.1, 0.25, 0.5, 0.9)))
def test_cores_cover_the_grid_once(width, height, size, overlap):
    tiling = Tiling(width, height, size, overlap)
    owners = np.zeros((height, width), int)
    for index in range(len(tiling)):
        tile = tiling[index]
        left, top, right, bottom = tile.core
        assert tile.left <= left < right <= tile.left + size and tile.top <= top < bottom <= tile.top + size
        assert tile.left + size <= max(width, size) and tile.top + size <= max(height, size), "within the ground"
        assert (tile.row, tile.column, tile.index) == (*divmod(index, len(tiling.columns)), index)
        owners[top:bottom, left:right] += 1
    assert (owners == 1).all()


def test_tiles_are_not_made_without_need():
    assert len(Tiling(288, 288, 96, 0)) == 9
    assert [Tiling(288, 96, 96, 0.25)[index].left for index in range(4)] == [0, 72, 144, 192]
    with pytest.raises(ValueError, match="`overlap` is 1, expected 0 to 0.9"):
        Tiling(288, 288, 96, 1)


def test_cells_of_a_tile_lie_in_its_core():
    tile = Tiling(288, 288, 96, 0.25)[5]
    cells = [tile.cell(number) for number in range(9)]
    assert shapely.union_all(cells).equals(shapely.box(*tile.core))
    assert sum(cell.area for cell in cells) == pytest.approx(shapely.box(*tile.core).area)
    assert cells[0].bounds[:2] == tile.core[:2] and cells[8].bounds[2:] == tile.core[2:]


@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_objects_are_those_of_the_whole_mask(overlap):
    rng = np.random.default_rng(0)
    smooth = ndimage.gaussian_filter(rng.normal(size=(2, 200, 300)), (0, 4, 4))
    mask = np.where(smooth[0] > 0.05, 128, np.where(smooth[1] > 0.05, 255, 0)).astype(np.uint8)
    tiling = Tiling(300, 200, 64, overlap)
    source = Source(Grid(UTM_33, CORNER, 300, 200), (), KINDS, {})
    answers = []
    for index in range(len(tiling)):
        tile = tiling[index]
        window = mask[tile.top : tile.top + 64, tile.left : tile.left + 64]
        objects = trace(window, np.ones((64, 64), bool), tile, KINDS)
        answers.append(TileAnswer(source, tile, objects=objects))
    again = [TileAnswer.from_entry(answer.to_entry(), source, answer.tile) for answer in answers]
    assert again == answers
    found = list(join_scene(answers))
    assert all(each.shape.is_valid for each in found)
    for kind, value in zip(KINDS, (128, 255), strict=True):
        labels, count = ndimage.label(mask == value, THREE_BY_THREE)
        areas = np.bincount(labels.ravel())[1:]
        areas = np.sort(areas[areas >= Thresholds.for_size(64).min_area])
        assert np.sort([each.shape.area for each in found if each.kind == kind]).tolist() == areas.tolist()
        assert count > 5


def test_nothing_is_found_where_nothing_is_known():
    tile = Tiling(64, 64, 64, 0)[0]
    mask, known = np.full((64, 64), 255, np.uint8), np.ones((64, 64), bool)
    known[:, 20:] = False
    (found,) = trace(mask, known, tile, KINDS)
    assert (found.kind, found.shape.bounds) == ("building", (0, 0, 20, 64))


def test_an_area_chooses_the_tiles_whose_cores_it_touches(tmp_path):
    raster = write_raster(tmp_path / "scene.tif", np.full((288, 288, 3), 90, np.uint8))
    place = Affine(*CORNER[:6]) @ (100, 200)
    area = geopandas.GeoDataFrame(geometry=[shapely.Point(place).buffer(10)], crs=UTM_33)
    area.to_crs("EPSG:4326").to_file(tmp_path / "area.geojson")
    area.to_crs(UTM_34).to_file(tmp_path / "area.gpkg")
    for name in ("area.geojson", "area.gpkg"):
        scene = Scene(raster, raster, 96, overlap=0, aoi=tmp_path / name)
        assert scene.chosen == [3, 4, 6, 7]  # columns 80 to 120, rows 180 to 220
    area.translate(1000).to_file(tmp_path / "elsewhere.geojson")
    with pytest.raises(ValueError, match="elsewhere.geojson does not touch the scene"):
        Scene(raster, raster, 96, aoi=tmp_path / "elsewhere.geojson")
    with pytest.raises(ValueError, match="Cannot read areas from"):
        Scene(raster, raster, 96, aoi=tmp_path / "nowhere.geojson")
