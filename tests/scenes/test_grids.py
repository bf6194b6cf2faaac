"""Two rasters on one grid: whatever reference system, resolution and direction each of them has."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from geo_rasters import CORNER, UTM_33, UTM_34, as_reflectance, lay_out, rewarp, write_raster
from skimage.registration import phase_cross_correlation

from deltavlm_hf import DeltaVLMConfig
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.scenes import Scene
from deltavlm_hf.scenes.grid import read_grid

SIZE = 96


@pytest.fixture(scope="module")
def ground():
    """Nine scenes, of 16 bits."""
    return as_reflectance(lay_out(range(9), 3)[0])


@pytest.fixture
def before(ground, tmp_path):
    return write_raster(tmp_path / "before.tif", ground)


def as_it_is(path, ground, source):
    write_raster(path, ground)


def shifted(path, ground, source):
    write_raster(path, ground[37:250, 11:280], CORNER @ Affine.translation(11, 37))


def finer(path, ground, source):
    write_raster(path, ground.repeat(3, 0).repeat(3, 1), CORNER @ Affine.scale(1 / 3))


def south_up(path, ground, source):
    write_raster(path, ground[::-1], CORNER @ Affine(1, 0, 0, 0, -1, len(ground)))


def turned_by_90_degrees(path, ground, source):
    turned = np.rot90(ground)  # what was at the right is at the top
    write_raster(path, turned, CORNER @ Affine.translation(ground.shape[1], 0) @ Affine(0, -1, 0, 1, 0, 0))


def in_another_zone(path, ground, source):
    rewarp(source, path, UTM_34, 0.3)


def in_degrees(path, ground, source):
    rewarp(source, path, "EPSG:4326", 3e-6)


FORMS = (as_it_is, shifted, finer, south_up, turned_by_90_degrees, in_another_zone, in_degrees)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_date_2_is_brought_onto_the_grid_of_date_1(form, before, ground, tmp_path):
    form(tmp_path / "after.tif", ground, before)
    scene = Scene(before, tmp_path / "after.tif", SIZE, overlap=0)
    one, other, valid = scene.read(SIZE, SIZE, SIZE)
    assert valid.all() and (one == scene.stretch(ground[SIZE:-SIZE, SIZE:-SIZE, :3].transpose(2, 0, 1))).all()
    assert np.abs(one - other.astype(float)).mean() < 8, "the same ground"
    moved, _, _ = phase_cross_correlation(one.mean(2), other.mean(2), upsample_factor=20)
    assert np.abs(moved).max() < 0.5
    assert not scene.warnings()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_date_1_of_any_form_is_read_from_north_to_south(form, before, ground, tmp_path):
    form(tmp_path / "first.tif", ground, before)
    scene = Scene(tmp_path / "first.tif", before, SIZE)
    one, other, valid = scene.read(0, 0, 64)
    assert np.abs(one - other.astype(float))[valid].mean() < 12
    if form is not turned_by_90_degrees:
        assert scene.grid.transform.e < 0 < scene.grid.transform.a


def test_a_shift_between_the_dates_is_told(before, ground, tmp_path):
    after = write_raster(tmp_path / "after.tif", ground, CORNER @ Affine.translation(4, -2.5))
    scene = Scene(before, after, SIZE)
    assert scene.shift == pytest.approx((4, -2.5), abs=0.3)
    assert scene.warnings()[0].startswith("date 2 lies +4")


def test_pixels_are_squares_of_the_resolution(before, ground, tmp_path):
    with rasterio.open(before) as file:
        assert read_grid(file).transform == file.transform == read_grid(file, 0.501).transform
        grid = read_grid(file, 0.8)
    assert grid.metres() == pytest.approx((0.8, 0.8), rel=1e-3)
    assert grid.width == pytest.approx(288 * 0.5 / 0.8, abs=1.1)
    rewarp(before, tmp_path / "degrees.tif", "EPSG:4326", 3e-6)  # at 45 degrees north far from square
    with rasterio.open(tmp_path / "degrees.tif") as file:
        across, down = read_grid(file).metres()
        assert across == pytest.approx(down, rel=1e-3)
    coarse = Scene(before, before, SIZE, resolution=1.0)
    assert (coarse.grid.width, len(coarse.tiling)) == (144, 4)
    reduced = ground[..., :3].reshape(144, 2, 144, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(coarse.read(20, 20, SIZE)[0] - coarse.stretch(reduced)[20:116, 20:116].astype(float)).mean() < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": None}, "has no coordinate reference system: nothing says where it is"),
        ({"transform": Affine.identity()}, "no transform from pixels to coordinates"),
        ({"transform": CORNER @ Affine.translation(288, 0)}, "no ground in common"),
        ({"transform": CORNER @ Affine.translation(287, 0)}, r"covers 0\.35% of date 1, at least 1% are needed"),
        ({"crs": 'LOCAL_CS["arbitrary",UNIT["metre",1]]'}, "cannot be brought together|outside of where"),
    ],
)
def test_what_cannot_be_brought_together_is_refused(options, message, before, ground, tmp_path):
    after = write_raster(tmp_path / "after.tif", ground, **{"transform": CORNER, "crs": UTM_33, **options})
    with pytest.raises(ValueError, match=message):
        Scene(before, after, SIZE)


def test_a_raster_of_the_whole_world_covers_date_1(before, tmp_path):
    world = np.full((90, 180, 3), 77, np.uint8)
    path = write_raster(tmp_path / "world.tif", world, Affine(2, 0, -180, 0, -2, 90), "EPSG:4326")
    before, after, valid = Scene(before, path, SIZE, stretch=(0, 255)).read(0, 0, SIZE)
    assert valid.all() and (after == 77).all()


def test_what_is_no_raster_is_refused(before, tmp_path):
    (tmp_path / "text.tif").write_text("no raster")
    for path in (tmp_path / "text.tif", tmp_path / "nowhere.tif"):
        with pytest.raises(ValueError, match=f"Cannot open '{path}' as a raster"):
            Scene(before, path, SIZE)


def test_the_ground_resolution_of_a_model(tmp_path):
    DeltaVLMConfig(ground_resolution=0.5).save_pretrained(tmp_path)
    assert DeltaVLMConfig.from_pretrained(tmp_path).ground_resolution == 0.5
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`ground_resolution` is .*, expected metres per pixel"):
            DeltaVLMConfig(ground_resolution=wrong)


def test_a_scene_smaller_than_a_tile(tmp_path):
    image = generate_scene(2, 40).before
    path = write_raster(tmp_path / "small.tif", image)
    scene = Scene(path, path, SIZE, min_valid=0.1)
    assert len(scene) == 1 and scene.tiling[0].core == (0, 0, 40, 40)
    before, after, valid = scene.read(0, 0, SIZE)
    assert (before[:40, :40] == image).all() and valid.sum() == 1600 and (before == after).all()
