"""Which pixels are known, which bands are red, green and blue, and one stretch for both dates."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from geo_rasters import CORNER, as_reflectance, lay_out, write_raster
from rasterio.enums import ColorInterp

from deltavlm_hf.scenes import Scene
from deltavlm_hf.scenes.scene import TooLittleGround

SIZE, STRIP = 96, 40


@pytest.fixture(scope="module")
def images():
    """Both dates of four scenes, 8 bits."""
    return lay_out(range(4), 2)[:2]


def nodata(path, image):
    image[:, :STRIP] = 0
    write_raster(path, image, nodata=0)


def not_a_number(path, image):
    image = image.astype(np.float32)
    image[:, :STRIP] = np.nan
    write_raster(path, image)


def nodata_that_is_no_number(path, image):
    image = image.astype(np.float32)
    image[:, :STRIP] = np.nan
    write_raster(path, image, nodata=np.nan)


def alpha(path, image):
    opaque = np.full((*image.shape[:2], 1), np.iinfo(image.dtype).max, image.dtype)
    opaque[:, :STRIP] = 0
    write_raster(path, np.concatenate([image[..., :3], opaque], axis=2), photometric="RGB", alpha="yes")


def mask(path, image):
    write_raster(path, image)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as file:
        file.write_mask(np.broadcast_to(np.arange(image.shape[1]) >= STRIP, image.shape[:2]))


def beyond_the_raster(path, image):
    write_raster(path, image[:, STRIP:], CORNER @ Affine.translation(STRIP, 0))


UNKNOWN = (nodata, not_a_number, nodata_that_is_no_number, alpha, mask, beyond_the_raster)


@pytest.mark.parametrize("at", [0, 1], ids=["before", "after"])
@pytest.mark.parametrize("way", UNKNOWN, ids=lambda way: way.__name__)
def test_what_is_unknown_at_one_date_is_the_same_at_both(way, at, images, tmp_path):
    dates = [as_reflectance(image) for image in images]
    paths = [write_raster(tmp_path / f"{number}.tif", date) for number, date in enumerate(dates)]
    way(paths[at], dates[at].copy())
    if way is beyond_the_raster and at == 0:
        paths.reverse()  # the grid is that of date 1: there is nothing beyond it
    scene = Scene(*paths, SIZE, overlap=0)
    before, after, valid = scene.read(0, 0, SIZE)
    assert (valid == (np.arange(SIZE) >= STRIP)).all()
    assert (before[~valid] == after[~valid]).all() and len(np.unique(before[~valid], axis=0)) == 1
    assert (before[valid] != after[valid]).any() and 60 < before[~valid].mean() < 200
    whole = Scene(*paths, SIZE, overlap=0, min_valid=0.6)  # 56 of 96 columns are known
    assert (scene[0][0] == before).all() and whole[1][0].shape == (SIZE, SIZE, 3)
    with pytest.raises(TooLittleGround, match="0.58 of the ground is known at both dates, 0.6 is needed"):
        whole[0]


def test_black_is_known(images, tmp_path):
    black = write_raster(tmp_path / "black.tif", np.zeros_like(images[0]))
    scene = Scene(black, write_raster(tmp_path / "after.tif", images[1]), SIZE)
    before, after, valid = scene.read(0, 0, SIZE)
    assert valid.all() and not before.any() and (after == images[1][:SIZE, :SIZE]).all()


def test_without_any_ground_in_common(images, tmp_path):
    dates = [image.copy() for image in images]
    dates[0][:, :100], dates[1][:, 90:] = 0, 0
    paths = [write_raster(tmp_path / f"{number}.tif", date, nodata=0) for number, date in enumerate(dates)]
    with pytest.raises(ValueError, match="No pixel of .* is known at both dates"):
        Scene(*paths, SIZE)


def test_one_stretch_for_both_dates(images, tmp_path):
    dates = [as_reflectance(images[0], 300, 2000), as_reflectance(images[0], 300, 2850)]
    before, after = (write_raster(tmp_path / f"{number}.tif", date) for number, date in enumerate(dates))
    scene = Scene(before, after, SIZE)
    together = np.concatenate([date[..., :3].reshape(-1, 3) for date in dates])
    assert scene.stretch.low == pytest.approx(np.percentile(together, 2, axis=0), rel=0.02)
    assert scene.stretch.high == pytest.approx(np.percentile(together, 98, axis=0), rel=0.02)
    one, other, _ = scene.read(0, 0, SIZE)
    assert other.mean() > one.mean() + 20, "a brighter date stays brighter"
    assert scene.facts()["stretch"].count("..") == 3
    # its own way back
    read = Scene(before, before, SIZE, stretch=(300, 2000)).read(0, 0, SIZE)[0]
    assert np.abs(read - images[0][:SIZE, :SIZE].astype(int)).max() <= 1
    read = Scene(before, before, SIZE, stretch="none").read(0, 0, SIZE)[0]
    assert (read == np.rint(dates[0][:SIZE, :SIZE, :3] / 257)).all()


def test_one_saturated_pixel_moves_nothing(images, tmp_path):
    date = as_reflectance(images[0])
    before = write_raster(tmp_path / "before.tif", date)
    date[20, 30] = 65535
    scene = Scene(before, write_raster(tmp_path / "after.tif", date), SIZE)
    one, other, _ = scene.read(0, 0, SIZE)
    assert np.argwhere((one != other).any(2)).tolist() == [[20, 30]]


def test_8_bits_stay_as_they_are(images, tmp_path):
    paths = [write_raster(tmp_path / f"{number}.tif", image) for number, image in enumerate(images)]
    for options in ({}, {"stretch": "none"}, {"stretch": (0, 255)}):
        before, after, _ = Scene(*paths, SIZE, **options).read(0, 0, SIZE)
        assert (before == images[0][:SIZE, :SIZE]).all() and (after == images[1][:SIZE, :SIZE]).all()


@pytest.mark.parametrize("stretch", ["all", (5, 5), (9, 1), (1, 2, 3)])
def test_a_stretch_that_is_none(stretch, images, tmp_path):
    path = write_raster(tmp_path / "image.tif", images[0])
    with pytest.raises(ValueError, match="expected two numbers, the lower one first, or 'none'"):
        Scene(path, path, SIZE, stretch=stretch)


def test_values_of_different_kinds_need_a_word(images, tmp_path):
    before = write_raster(tmp_path / "before.tif", images[0])
    after = write_raster(tmp_path / "after.tif", as_reflectance(images[1]))
    with pytest.raises(ValueError, match="One date has values of type uint8 and the other of type uint16"):
        Scene(before, after, SIZE)
    assert Scene(before, after, SIZE, stretch=(0, 2850)).stretch.high == (2850, 2850, 2850)


def test_histograms_are_matched_on_request(images, tmp_path):
    before = write_raster(tmp_path / "before.tif", as_reflectance(images[0]))
    after = write_raster(tmp_path / "after.tif", as_reflectance(images[0], 900, 1500))  # another light
    one, other, _ = Scene(before, after, SIZE).read(0, 0, SIZE)
    assert np.abs(one - other.astype(int)).mean() > 20
    one, other, _ = Scene(before, after, SIZE, match_histograms=True).read(0, 0, SIZE)
    assert np.abs(one - other.astype(int)).mean() < 2


def test_bands(images, tmp_path):
    image = images[0]
    grey = write_raster(tmp_path / "grey.tif", image[..., :1])
    assert (Scene(grey, grey, SIZE).read(0, 0, SIZE)[0] == image[:SIZE, :SIZE, :1]).all()
    infrared = write_raster(tmp_path / "infrared.tif", image[..., [0, 2, 1, 0]])
    assert (Scene(infrared, infrared, SIZE).read(0, 0, SIZE)[0] == image[:SIZE, :SIZE, [0, 2, 1]]).all()
    assert (Scene(infrared, infrared, SIZE, bands=(1, 3, 2)).read(0, 0, SIZE)[0] == image[:SIZE, :SIZE]).all()
    with rasterio.open(infrared, "r+") as file:
        colours = ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red
        file.colorinterp = colours
    assert (Scene(infrared, infrared, SIZE).read(0, 0, SIZE)[0] == image[:SIZE, :SIZE]).all()
    for bands in ((1, 2, 5), (0, 1, 2), (1, 2)):
        with pytest.raises(ValueError, match="expected three of 1 to 4, which .*infrared.tif has"):
            Scene(infrared, infrared, SIZE, bands=bands)
