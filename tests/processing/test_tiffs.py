"""
TIFF files of every layout, written by hand: each comes out as it went in, or is refused with the real reason. Pillow
alone gives a grey picture of the first band for some, and mixes up bands, bytes or signs of others; GDAL reads these.
"""

import io
import itertools
import sys

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp
from tiffs import tiff

from deltavlm_hf.processing.image_processing_deltavlm import DeltaVLMImageProcessor
from deltavlm_hf.processing.reading import image_size, read_image

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data:UserWarning")

RAW = DeltaVLMImageProcessor(do_resize=False, rescale_factor=1, do_normalize=False)  # shows what became RGB
HEIGHT, WIDTH = 20, 30
# What is said of files that GDAL would read, and of those that it would not read right either.
INSTALL = "; install rasterio to have it read, or read it with rasterio or tifffile and pass its red, green and blue"
REFUSED = f"a TIFF of .*{INSTALL} as an array$"


def scene(bands: int, kind: str = "u1") -> np.ndarray:
    """Bands that differ, `(bands, H, W)`: levels of 8 bits in whatever type."""
    levels = np.random.default_rng(bands).integers(0, 120, (bands, HEIGHT, WIDTH))
    kind = np.dtype(kind)
    if kind.kind == "f":
        return (levels / 255).astype(kind)
    return (levels * (257 if kind.itemsize > 1 else 1)).astype(kind)


def seen(source) -> np.ndarray:
    """The levels `(3, H, W)` that an image becomes."""
    return RAW((source, source), return_tensors="np")["pixel_values"][0, 0]


def as_rgb(bands: np.ndarray) -> np.ndarray:
    """The levels that [`scene`]'s bands should become."""
    shown = np.repeat(bands[:1], 3, axis=0) if len(bands) < 3 else bands[:3]
    if shown.dtype.kind == "f":
        return np.round(shown * 255)
    return shown // 257 if shown.dtype.itemsize > 1 else shown


@pytest.fixture
def without_rasterio(monkeypatch):
    monkeypatch.setitem(sys.modules, "rasterio", None)


@pytest.mark.parametrize("kind", ["u1", "u2", "u4", "i1", "i2", "i4", "f4"])
@pytest.mark.parametrize("gdal", [True, False], ids=["with rasterio", "without"])
def test_every_layout_is_read_right_or_refused(kind, gdal, request):
    if not gdal:
        request.getfixturevalue("without_rasterio")
    flags = (False, True)
    for bands, planar, deflate, order, big, tiles in itertools.product(range(1, 6), flags, flags, "<>", flags, flags):
        pixels = scene(bands, kind)
        options = {"compression": "deflate" if deflate else "raw", "tiles": 16 if tiles else None}
        data = tiff(pixels, planar=planar, order=order, big=big, **options)
        usual = kind in ("u1", "u2") and (gdal or (bands in (1, 3) and not planar)) or (gdal and kind == "f4")
        try:
            levels = seen(data)
        except ValueError as error:
            assert (not usual or (big and order == ">")) and "replace the file" not in str(error)
            assert "rasterio" in str(error) or (gdal and "expected dtype uint8, uint16, bool or float" in str(error))
        else:
            np.testing.assert_array_equal(levels, as_rgb(pixels), f"{bands} {planar} {order} {big} {options}")


@pytest.mark.parametrize("compression", ["raw", "deflate", "lzw", "packbits", "jpeg"])
@pytest.mark.parametrize("bands", [2, 3, 4, 5])
def test_grey_bands_one_after_the_other(tmp_path, compression, bands, monkeypatch):
    """As GDAL writes several bands that are not said to be colours."""
    path = tmp_path / "planar.tif"
    path.write_bytes(tiff(scene(bands), planar=True, compression=compression, photometric=1))
    sources = (path, str(path), path.read_bytes(), {"bytes": None, "path": str(path)}, io.BytesIO(path.read_bytes()))
    expected = as_rgb(scene(bands))
    for source in sources:
        np.testing.assert_allclose(seen(source), expected, atol=8 if compression == "jpeg" else 0)
        assert image_size(source) == read_image(source).size == (WIDTH, HEIGHT)
        np.testing.assert_array_equal(read_image(source), np.moveaxis(seen(source), 0, -1))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for source in sources:
        with pytest.raises(ValueError, match=f"^pair 1, after image: .*a TIFF of {bands} bands of 8-bit.*rasterio"):
            RAW((np.zeros((4, 4), np.uint8), source))
        with pytest.raises(ValueError, match=REFUSED):
            image_size(source)


def test_an_image_that_was_opened_by_others():
    data = tiff(scene(4), planar=True, compression="deflate", photometric=1)
    try:
        opened = Image.open(io.BytesIO(data))
    except OSError:  # by newer versions of Pillow
        return
    with pytest.raises(ValueError, match=f"4 bands .*of which Pillow would take 1{INSTALL}"):
        seen(opened)


COLOURS = {
    "red, green, blue": (3, {}),
    "with alpha": (4, {"extra": [2]}),
    "with a fourth band that is not named": (4, {"extra": []}),
}


@pytest.mark.parametrize("compression", ["raw", "deflate", "lzw"])
@pytest.mark.parametrize(("bands", "options"), COLOURS.values(), ids=COLOURS)
def test_what_is_meant_as_colours_is_read(compression, bands, options):
    pixels = scene(bands)
    np.testing.assert_array_equal(seen(tiff(pixels, compression=compression, **options)), pixels[:3])


def test_colours_one_after_the_other_are_read():
    for compression, tiles in itertools.product(("raw", "deflate", "lzw", "packbits"), (None, 16)):
        np.testing.assert_array_equal(
            seen(tiff(scene(3), planar=True, compression=compression, tiles=tiles)), scene(3)
        )
    np.testing.assert_allclose(seen(tiff(scene(3), planar=True, compression="jpeg")), scene(3), atol=8)


MISREAD = {
    "near infrared": tiff(scene(4), extra=[0]),
    "six bands": tiff(scene(6), photometric=2),
    "alpha and more": tiff(scene(5), photometric=2, extra=[2, 0]),
    "premultiplied alpha and more": tiff(scene(5), photometric=2, extra=[1, 0]),
    "a palette and more": tiff(scene(2), photometric=3, extra=[0], tags={320: list(range(0, 65536, 256)) * 3}),
    "two bands of which none is named": tiff(scene(2), extra=[]),
    "grey and alpha, band after band": tiff(scene(2), extra=[2], planar=True, compression="deflate"),
    "three bands that are counted once": tiff(scene(3), photometric=1, extra=[], tags={277: [1]}),
    "three bands that are not counted": tiff(scene(3), photometric=1, extra=[], tags={277: None}),
    "16 bits, band after band": tiff(scene(3, "u2"), planar=True),
    "a fourth band that is not named, band after band": tiff(scene(4), planar=True, compression="lzw", extra=[]),
    "L*a*b*, band after band": tiff(scene(3), photometric=8, planar=True),
    "YCbCr": tiff(scene(3), photometric=6, planar=True),
    "bits turned round, band after band": tiff(scene(3), planar=True, tags={266: [2]}),
    "signed 8 bits": tiff(-scene(1).astype("i1")),
    "signed 16 bits of another byte order": tiff(scene(1, "i2"), order=">", compression="deflate"),
    "signed 32 bits of another byte order": tiff(scene(1, "i4"), order=">", compression="lzw"),
    "floats of another byte order": tiff(scene(1, "f4"), order=">", compression="packbits"),
    "one band of floats, band after band": tiff(scene(1, "f4"), order=">", planar=True),
    "16 bits, the more the darker": tiff(scene(1, "u2"), photometric=0),
    "floats, the more the darker": tiff(scene(1, "f4"), photometric=0),
    "8 bits, the more the darker, band after band": tiff(scene(1), photometric=0, planar=True),
    "a thumbnail first": tiff(scene(3), tags={254: [1]}),
    "a mask first": tiff(scene(1), tags={254: [4]}),
    "a compression of others": tiff(scene(3), compression="lerc"),
    "three bands of floats": tiff(scene(3, "f4")),
    "bands of signed 16 bits": tiff(scene(4, "i2")),
    "complex numbers": tiff(scene(1, "c8")),
    "64 bits": tiff(scene(1, "f8")),
    "a large big-endian file": tiff(scene(3), order=">", big=True),
}


@pytest.mark.parametrize("data", MISREAD.values(), ids=MISREAD)
def test_what_pillow_misreads_is_refused_with_the_reason(data, without_rasterio):
    with pytest.raises(
        ValueError, match="^pair 1, before image: cannot read .* as an image: .*read it with rasterio or tifffile"
    ) as told:
        seen(data)
    assert "replace the file" not in str(told.value)
    for read in (read_image, image_size):
        with pytest.raises(ValueError, match="read it with rasterio or tifffile"):
            read(data)


# Of these the bands that are shown; all others of the above are read wrongly by GDAL too, or hold no values to show.
READ = {
    "near infrared": scene(4),
    "six bands": scene(6),
    "alpha and more": scene(5),
    "premultiplied alpha and more": scene(5),
    "two bands of which none is named": scene(2)[[0, 0, 0]],
    "grey and alpha, band after band": scene(2)[[0, 0, 0]],
    "16 bits, band after band": scene(3, "u2"),
    "a fourth band that is not named, band after band": scene(4),
    "floats of another byte order": scene(1, "f4"),
    "one band of floats, band after band": scene(1, "f4"),
    "three bands of floats": scene(3, "f4"),
    "64 bits": scene(1, "f8"),
}
SIGNED = ("signed 8 bits", "signed 16 bits of another byte order", "signed 32 bits of another byte order")
BROKEN = ("a compression of others",)  # no LERC in truth


@pytest.mark.parametrize("name", MISREAD)
def test_what_pillow_misreads_is_read_by_gdal(name):
    if name in READ:
        np.testing.assert_array_equal(seen(MISREAD[name]), as_rgb(READ[name]))
        assert image_size(MISREAD[name]) == (WIDTH, HEIGHT)
        return
    reason = "expected dtype" if name in (*SIGNED, "bands of signed 16 bits") else "read it with rasterio or tifffile"
    with pytest.raises(ValueError, match="Read failed" if name in BROKEN else reason):
        seen(MISREAD[name])


def test_values_keep_their_depth_for_a_stretch():
    reflectances = np.random.default_rng(5).integers(300, 2851, (4, HEIGHT, WIDTH)).astype("u2")
    expected = np.round((reflectances[:3] - 300.0) / 2550 * 255)
    for bands, planar in itertools.product((reflectances, reflectances[:3], reflectances.astype("i2")), (True, False)):
        data = tiff(bands, planar=planar)
        found = RAW((data, data), stretch=(300, 2850), return_tensors="np")["pixel_values"][0, 1]
        np.testing.assert_array_equal(found, expected)


def test_colours_by_what_the_file_says_they_are(tmp_path):
    path = tmp_path / "named.tif"
    pixels = scene(4, "u2")
    with rasterio.open(path, "w", driver="GTiff", width=WIDTH, height=HEIGHT, count=4, dtype="uint16") as file:
        file.write(pixels)
        file.colorinterp = [ColorInterp.undefined, ColorInterp.blue, ColorInterp.green, ColorInterp.red]
    np.testing.assert_array_equal(seen(path), as_rgb(pixels[[3, 2, 1]]))


def test_no_other_formats_of_gdal_are_read(tmp_path):
    """Some of them name further files, or addresses."""
    path = tmp_path / "inner.tif"
    path.write_bytes(tiff(scene(4)))
    inner = f"<SourceFilename>{path}</SourceFilename><SourceBand>1</SourceBand>"
    band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{inner}</SimpleSource></VRTRasterBand>'
    mosaic = tmp_path / "outer.vrt"
    mosaic.write_text(f'<VRTDataset rasterXSize="{WIDTH}" rasterYSize="{HEIGHT}">{band}</VRTDataset>')
    with rasterio.open(mosaic) as opened:
        assert opened.count == 1
    for source in (mosaic, mosaic.read_bytes()):
        with pytest.raises(ValueError, match="cannot identify image file"):
            seen(source)


def test_the_bound_of_pixels_holds_for_gdal_too(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", WIDTH * HEIGHT - 1)
    for data in (tiff(scene(4)), tiff(scene(3, "f4")), tiff(scene(3, "u2"))):
        for read in (seen, image_size):
            with pytest.raises(ValueError, match=f"pixels, at most {WIDTH * HEIGHT - 1} in all are allowed"):
                read(data)


def test_the_more_the_darker_is_turned_in_8_bits():
    np.testing.assert_array_equal(seen(tiff(scene(1), photometric=0)), 255 - as_rgb(scene(1)))


def test_jpeg_2000_has_alpha_only_where_it_says_so(monkeypatch):
    pixels = np.moveaxis(scene(4), 0, -1)
    said, unsaid = io.BytesIO(), io.BytesIO()
    Image.fromarray(pixels).save(said, "JPEG2000")
    np.testing.assert_array_equal(seen(said), scene(4)[:3])
    Image.fromarray(pixels).save(unsaid, "JPEG2000", no_jp2=True)  # such as near infrared
    np.testing.assert_array_equal(seen(unsaid.getvalue()), scene(4)[:3])
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for data in (unsaid.getvalue(), said.getvalue().replace(b"\x00\x03\x00\x01\x00\x00", b"\x00\x03\xff\xff\xff\xff")):
        with pytest.raises(
            ValueError, match="a JPEG 2000 of 4 bands, of which Pillow would take the last for alpha; install"
        ):
            seen(data)
