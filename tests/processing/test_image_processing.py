"""`DeltaVLMImageProcessor`: parity with the authors, every mode and type, every error, on real files."""

import base64
import io
import logging
import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from PIL import Image
from safetensors.torch import load_file
from tiffs import tiff
from torch.masked import masked_tensor

from deltavlm_hf.processing.image_processing_deltavlm import DeltaVLMImageProcessor

FIXTURES = Path(__file__).parents[1] / "fixtures" / "preprocess"
PROCESSOR = DeltaVLMImageProcessor()
SMALL = DeltaVLMImageProcessor(size={"height": 16, "width": 16})
RAW = DeltaVLMImageProcessor(do_resize=False, rescale_factor=1, do_normalize=False)  # shows what became RGB

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def to_rgb(image, **kwargs) -> np.ndarray:
    """The (H, W, 3) levels that an image becomes, checked to be the same for either date."""
    before, after = RAW((image, image), return_tensors="np", **kwargs)["pixel_values"][0]
    np.testing.assert_array_equal(before, after)
    return np.moveaxis(before, 0, -1)


def saved(image: Image.Image, path: Path, **kwargs) -> Path:
    image.save(path, **kwargs)
    return path


@pytest.fixture
def png(tmp_path) -> Path:
    return saved(Image.fromarray(RGB), tmp_path / "rgb.png")


# Numbers


@pytest.mark.parametrize("name", ["0_before", "1_before", "2_before"])
def test_pixel_values_equal_the_authors(name):
    expected = load_file(FIXTURES / "pixel_values_224.safetensors")[name]
    path = FIXTURES / f"{name}.png"
    actual = PROCESSOR((path, Image.open(path)), return_tensors="pt")["pixel_values"]
    assert actual.shape == (1, 2, 3, 224, 224) and actual.dtype == torch.float32
    torch.testing.assert_close(actual[0], torch.stack([expected, expected]), rtol=0, atol=1e-6)


def test_size_and_steps_can_be_chosen():
    assert PROCESSOR((RGB, RGB), size={"height": 32, "width": 48})["pixel_values"].shape == (1, 2, 3, 32, 48)
    np.testing.assert_array_equal(to_rgb(RGB), RGB)
    np.testing.assert_array_equal(to_rgb(RGB, do_rescale=False), RGB)
    rescaled = RAW((RGB, RGB), rescale_factor=1 / 255, return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(rescaled[0, 0], np.moveaxis(RGB, -1, 0) / 255, atol=1e-7)


def test_save_and_load_keep_everything(tmp_path):
    processor = DeltaVLMImageProcessor(size={"height": 20, "width": 30}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path)
    loaded = DeltaVLMImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert loaded.to_dict()["image_processor_type"] == "DeltaVLMImageProcessor"
    np.testing.assert_array_equal(loaded((RGB, RGB))["pixel_values"], processor((RGB, RGB))["pixel_values"])


# Forms of pairs


def test_every_form_of_pairs_gives_the_same(png):
    image = Image.fromarray(RGB)
    chw = np.moveaxis(RGB, -1, 0).copy()
    expected = SMALL((image, image), return_tensors="pt")["pixel_values"]
    pairs = [
        [image, image],
        [(image, image)],
        [[image, image]],
        (str(png), png),
        (RGB, torch.from_numpy(chw)),
        np.stack([RGB, RGB]),
        torch.from_numpy(np.stack([chw, chw])),
        np.stack([chw, chw])[None],
    ]
    for pair in pairs:
        torch.testing.assert_close(SMALL(pair, return_tensors="pt")["pixel_values"], expected, rtol=0, atol=0)
    batch = SMALL([(image, image), [png, RGB]], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch, expected.expand(2, -1, -1, -1, -1), rtol=0, atol=0)


def test_pairs_in_a_list_are_pairs(png):
    """However a pair is written, as in chats and data sets, and as the message for two lists says."""
    images = [np.full((4, 4), level, np.uint8) for level in (0, 80, 160, 240)]
    first, second, third, fourth = images
    expected = RAW([(first, second), (third, fourth)], return_tensors="np")["pixel_values"]
    assert expected[:, :, 0, 0, 0].tolist() == [[0, 80], [160, 240]]
    for pairs in (
        [[first, second], [third, fourth]],
        [(first, second), [third, fourth]],
        list(zip([first, third], [second, fourth], strict=True)),
    ):
        np.testing.assert_array_equal(RAW(pairs, return_tensors="np")["pixel_values"], expected)


def test_fetched_pairs_can_be_passed_on(png):
    pairs = SMALL.fetch_images([(png, RGB), (str(png), png)])
    assert [len(pair) for pair in pairs] == [2, 2] and isinstance(pairs[0][0], Image.Image)
    np.testing.assert_array_equal(SMALL(pairs)["pixel_values"], SMALL([(png, RGB), (png, png)])["pixel_values"])


def test_dates_may_differ_in_size_mode_and_type(png):
    pixel_values = SMALL((Image.new("L", (300, 20)), png), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 2, 3, 16, 16) and pixel_values.isfinite().all()


def test_base64_is_read(png):
    text = base64.b64encode(png.read_bytes()).decode()
    np.testing.assert_array_equal(to_rgb(text), RGB)
    np.testing.assert_array_equal(to_rgb("data:image/png;base64," + text), RGB)


# Modes


@pytest.mark.parametrize("mode", ["RGB", "RGBX", "YCbCr", "HSV", "LAB", "CMYK", "L", "1", "P"])
def test_modes_without_alpha_are_converted_by_pillow(mode):
    image = Image.fromarray(RGB).convert("RGB" if mode == "LAB" else mode)
    if mode == "LAB":
        image = Image.frombytes("LAB", image.size, image.tobytes())
    np.testing.assert_array_equal(to_rgb(image), np.array(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_alpha_is_dropped(mode, level):
    image = Image.fromarray(RGB).convert({"LA": "L", "PA": "P"}.get(mode, "RGB"))
    expected = np.array(image.convert("RGB"))
    if mode == "PA":
        image = image.convert("PA")
    image.putalpha(level)
    assert image.mode == mode
    np.testing.assert_array_equal(to_rgb(image), expected)


@pytest.mark.parametrize("transparency", [0, bytes(range(200))])
def test_palette_with_transparency_gives_its_colours(tmp_path, transparency):
    image = Image.fromarray(RGB).convert("P")
    path = saved(image, tmp_path / "palette.png", transparency=transparency)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(to_rgb(path), np.array(image.convert("RGB")))


def test_modes_survive_real_files(tmp_path):
    cmyk = Image.fromarray(RGB).convert("CMYK")
    for path in [
        saved(cmyk, tmp_path / "cmyk.jpg"),
        saved(cmyk, tmp_path / "cmyk.tif"),
        saved(Image.fromarray(GREY), tmp_path / "grey.jpg"),
        saved(Image.fromarray(GREY > 100), tmp_path / "bilevel.png"),
        saved(Image.fromarray(RGB).convert("P"), tmp_path / "palette.gif"),
        saved(Image.fromarray(RGB), tmp_path / "rgb.webp"),
        saved(Image.fromarray(RGB), tmp_path / "rgb.bmp"),
    ]:
        np.testing.assert_array_equal(to_rgb(path), np.array(Image.open(path).convert("RGB")))


def test_16_bit_is_scaled_and_not_clipped(tmp_path):
    deep = GREY.astype(np.uint16) * 257  # 8-bit levels on 0..65535
    expected = np.repeat(GREY[..., None], 3, axis=-1)
    image = Image.fromarray(deep)
    assert image.mode == "I;16"
    sources = [saved(image, tmp_path / "deep.png"), saved(image, tmp_path / "deep.tif"), image, deep]
    sources += [deep.astype(">u2"), torch.from_numpy(deep), Image.fromarray(deep.astype(np.int32))]
    for source in sources:
        np.testing.assert_array_equal(to_rgb(source), expected)


REFLECTANCE = (300 + 10 * RGB.astype(np.int64)).astype(np.uint16)  # 300 to 2,850, as a satellite's


@pytest.mark.parametrize("kind", ["u2", "i2", "i4", "f4", "f8"])
def test_one_stretch_for_both_dates(kind):
    values = REFLECTANCE.astype(kind)
    np.testing.assert_array_equal(to_rgb(values, stretch=(300, 2850)), RGB)
    np.testing.assert_array_equal(to_rgb(torch.from_numpy(values), stretch=(300, 2850)), RGB)
    darker, brighter = RAW((values, values + values), stretch=[300, 2850], return_tensors="np")["pixel_values"][0]
    assert brighter.mean() > darker.mean() + 50 and brighter.max() == 255, "neither is stretched by itself"
    clipped = to_rgb(values, stretch=(1000, 2000))
    assert (clipped[values <= 1000] == 0).all() and (clipped[values >= 2000] == 255).all()


def test_a_stretch_leaves_8_bits_as_they_are(png):
    for source in (RGB, png, Image.fromarray(RGB)):
        np.testing.assert_array_equal(to_rgb(source, stretch=(300, 2850)), RGB)
    np.testing.assert_array_equal(to_rgb(RGB > 100, stretch=(300, 2850)), (RGB > 100) * 255)


def test_a_stretch_is_saved_with_the_processor(tmp_path):
    DeltaVLMImageProcessor(stretch=(300, 2850)).save_pretrained(tmp_path)
    assert list(DeltaVLMImageProcessor.from_pretrained(tmp_path).stretch) == [300, 2850]
    assert "stretch" not in PROCESSOR.to_dict()


@pytest.mark.parametrize("wrong", [(5, 5), (9, 1), (1,), (1, 2, 3), (0, float("nan"))])
def test_a_stretch_that_is_none_is_refused(wrong):
    with pytest.raises(ValueError, match="pair 1, before image: `stretch` is .*, expected two numbers"):
        to_rgb(REFLECTANCE, stretch=wrong)
    with pytest.raises(ValueError, match="found NaN"):
        to_rgb(np.full((4, 4), np.nan), stretch=(0, 1))


def deep_colours(kind: str) -> bytes:
    """Colours of 16 bits in a file, of which Pillow gives 8."""
    bands = np.moveaxis(REFLECTANCE, -1, 0)
    if kind == "png":  # which Pillow cannot write
        rows = b"".join(b"\0" + row.tobytes() for row in REFLECTANCE.astype(">u2"))
        parts = {b"IHDR": struct.pack(">IIBBBBB", 8, 6, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
        chunks = (name + content for name, content in parts.items())
        checked = (struct.pack(">I", len(each) - 4) + each + struct.pack(">I", zlib.crc32(each)) for each in chunks)
        return b"\x89PNG\r\n\x1a\n" + b"".join(checked)
    return tiff(bands, compression=kind)


@pytest.mark.parametrize("kind", ["raw", "deflate", "png"])
def test_16_bit_colours_of_which_pillow_gives_8_are_not_stretched(kind, monkeypatch):
    data = deep_colours(kind)
    monkeypatch.setitem(sys.modules, "rasterio", None)
    for source in (data, Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(to_rgb(source), REFLECTANCE >> 8)
        with pytest.raises(ValueError, match="before image: its colours have 16 bits, of which Pillow gives 8"):
            RAW((data, RGB), stretch=(300, 2850))


@pytest.mark.parametrize("kind", ["raw", "deflate", "png"])
def test_16_bit_colours_are_stretched_with_rasterio(kind):
    np.testing.assert_array_equal(to_rgb(deep_colours(kind)), to_rgb(REFLECTANCE))
    np.testing.assert_array_equal(to_rgb(deep_colours(kind), stretch=(300, 2850)), RGB)


def test_16_bits_that_are_hardly_used_are_told_once():
    for dark in (REFLECTANCE, REFLECTANCE[..., 0], deep_colours("raw"), deep_colours("png")):
        assert len(warned(dark, dark)) == 1
    for plain in (REFLECTANCE * np.uint16(20), RGB, RGB[..., :1]):
        assert not warned(plain)


def warned(*sources) -> list[str]:
    """What is logged of 16 bits when these images are read one after another."""
    logger = logging.getLogger("deltavlm_hf.processing.image_processing_deltavlm")
    transformers.utils.logging.warning_once.cache_clear()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    try:
        for source in sources:
            to_rgb(source)
    finally:
        logger.removeHandler(handler)
    return [record for record in records if "16-bit image" in record]


def test_float_is_scaled_and_not_clipped(tmp_path):
    unit = GREY.astype(np.float32) / 255
    expected = np.repeat(GREY[..., None], 3, axis=-1)
    image = Image.fromarray(unit)
    assert image.mode == "F"
    tensor = torch.from_numpy(unit)
    for source in [saved(image, tmp_path / "unit.tif"), image, unit, unit.astype(np.float64), tensor.requires_grad_()]:
        np.testing.assert_array_equal(to_rgb(source), expected)
    np.testing.assert_allclose(to_rgb(tensor.bfloat16()), expected, atol=1)
    np.testing.assert_array_equal(to_rgb(np.full((2, 2), 1 + 1e-6)), 255)  # rounding is forgiven


@pytest.mark.filterwarnings("ignore:the matrix subclass")
def test_arrays_in_any_memory_are_read():
    """Views, other byte orders and subclasses hold the same values; what is passed is not written to."""
    grey = np.repeat(GREY[..., None], 3, axis=-1)
    frozen = RGB.copy()
    frozen.flags.writeable = False
    for array, expected in [
        (RGB[::-1, ::-1], RGB[::-1, ::-1]),
        (np.asfortranarray(RGB), RGB),
        (frozen, RGB),
        (np.repeat(RGB, 2, axis=1)[:, ::2], RGB),
        ((GREY.astype(np.uint16) * 257).astype(">u2"), grey),
        ((GREY / 255).astype(">f4"), grey),
        (GREY.view(np.recarray), grey),
        (np.matrix(GREY), grey),
        (np.ma.array(RGB), RGB),
        (np.ma.array(RGB, mask=np.zeros_like(RGB, bool)), RGB),
        (np.ma.array(GREY / 255, mask=False), grey),
        (torch.from_numpy(RGB).permute(2, 0, 1), RGB),
    ]:
        np.testing.assert_array_equal(to_rgb(array), expected)
    stack = np.ma.array([RGB, RGB], mask=np.zeros((2, *RGB.shape), bool))
    np.testing.assert_array_equal(RAW(stack)["pixel_values"], RAW((RGB, RGB))["pixel_values"])
    stack[1, 0, 0] = np.ma.masked
    with pytest.raises(ValueError, match="^pair 1, after image: 3 of 144 values of the masked array are hidden"):
        RAW(stack)


def test_array_channels():
    rgba = np.concatenate([RGB, np.zeros((6, 8, 1), np.uint8)], axis=-1)
    grey = np.repeat(GREY[..., None], 3, axis=-1)
    for array, expected in [
        (GREY, grey),
        (GREY[..., None], grey),
        (GREY[None], grey),
        (GREY > 100, (grey > 100) * 255),
        (rgba, RGB),
        (np.moveaxis(rgba, -1, 0), RGB),
        (torch.from_numpy(rgba), RGB),
    ]:
        np.testing.assert_array_equal(to_rgb(array), expected)


def test_ambiguous_layout_follows_the_library_unless_told():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    channels_first = np.moveaxis(cube, 0, -1)
    np.testing.assert_array_equal(to_rgb(cube), cube)
    np.testing.assert_array_equal(to_rgb(torch.from_numpy(cube)), channels_first)
    np.testing.assert_array_equal(to_rgb(cube, input_data_format="channels_first"), channels_first)
    np.testing.assert_array_equal(to_rgb(torch.from_numpy(cube), input_data_format="channels_last"), cube)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees, clockwise
    path = saved(Image.fromarray(GREY), tmp_path / f"turned.{suffix}", exif=exif)
    # not Image.open(path): Pillow 13 maps uncompressed files into memory and then garbles a turned TIFF
    for source in (path, Image.open(io.BytesIO(path.read_bytes()))):
        np.testing.assert_allclose(to_rgb(source)[..., 0], np.rot90(GREY, k=-1), atol=6)  # JPEG is lossy


def test_first_frame_is_taken(tmp_path):
    frames = [Image.fromarray(RGB), Image.new("RGB", (8, 6))]
    np.testing.assert_array_equal(
        to_rgb(saved(frames[0], tmp_path / "stack.tif", save_all=True, append_images=frames[1:])), RGB
    )


# Errors: the message names the item, what was got and expected, and the way out

IMAGE = Image.fromarray(RGB)
AMBIGUOUS = r"could be \(befores, afters\) or two pairs: pass a list of pairs .*list\(zip\(befores, afters"
NOT_PAIRS = {
    "single image": (IMAGE, "expected 2 images .* got a single Image: pass one pair"),
    "single path": ("a.png", "got a single str"),
    "single array": (RGB, "got a single ndarray"),
    "one in a list": ([IMAGE], "pair 1: expected 2 images .* got 1"),
    "three": ((IMAGE,) * 3, "pair 1: expected 2 images .* got 3: pass one pair .* or a list of pairs"),
    "flat list of four": ([IMAGE] * 4, "got 4: .* list of pairs"),
    "three in the second": ([(IMAGE, IMAGE), (IMAGE,) * 3], "pair 2: expected 2 images .* got 3"),
    "none in the second": ([(IMAGE, IMAGE), []], "pair 2: expected 2 images .* got 0"),
    "mixed": ([(IMAGE, IMAGE), IMAGE], "pair 2: .* got a single Image"),
    "empty": ([], "expected at least 1 pair of images, got none"),
    "empty array": (np.zeros((0, 2, 3, 4, 4), np.uint8), "expected at least 1 pair of images, got none"),
    "none": (None, "got a single NoneType"),
    "dict": ({"before": IMAGE, "after": IMAGE}, "got a single dict"),
    "stack of three": (np.zeros((3, 3, 4, 4), np.uint8), "pair 1: expected 2 images .* got 3"),
    "stack of stacks": (np.zeros((1, 1, 2, 3, 4, 4), np.uint8), "got a single ndarray"),
    "a batch for each date": (
        [torch.zeros(2, 3, 4, 4)] * 2,
        r"pair 1, .* \(2, 3, 4, 4\); a batch .* \(B, 2, C, H, W\)",
    ),
    "two lists": (([IMAGE, IMAGE], [IMAGE, IMAGE]), AMBIGUOUS),
    "two lists of one": (([IMAGE], [IMAGE]), AMBIGUOUS),
    "two lists of three": (([IMAGE] * 3, [IMAGE] * 3), AMBIGUOUS),
    "two lists of paths": ((["a.png", "b.png"], ["c.png", "d.png"]), AMBIGUOUS),
    "two tuples": (((IMAGE, IMAGE), (IMAGE, IMAGE)), AMBIGUOUS),
    "a list and a tuple": (([IMAGE, IMAGE], (IMAGE, IMAGE)), AMBIGUOUS),
    "two stacks": ((np.zeros((2, 4, 4, 3), np.uint8),) * 2, r"a batch .* \(B, 2, C, H, W\)"),
    "two stacks in a list": ([np.zeros((5, 4, 4, 3), np.uint8)] * 2, r"a batch .* \(B, 2, C, H, W\)"),
    "too deep": ([[(IMAGE, IMAGE), (IMAGE, IMAGE)]], "pair 1, before image: expected a PIL image.* got tuple"),
    "missing date": ((IMAGE, None), "pair 1, after image: expected .* got NoneType"),
    "missing date in a batch": ([(IMAGE, IMAGE), (IMAGE, None)], "pair 2, after image: expected .* got NoneType"),
}


@pytest.mark.parametrize(("images", "message"), NOT_PAIRS.values(), ids=NOT_PAIRS)
def test_what_is_no_pair_is_refused(images, message):
    with pytest.raises(ValueError, match=message):
        SMALL(images)


HIDDEN = "2 of 4 values of the masked array are hidden, .*image.filled"
UNUSABLE = {
    "hidden values": (np.ma.array([[0, 1], [2, 3]], np.uint8, mask=[[0, 1], [0, 1]]), HIDDEN),
    "hidden floats": (np.ma.masked_greater(np.array([[0.1, 0.9], [0.2, 0.8]]), 0.5), HIDDEN),
    "hidden for good": (np.ma.array([[0, 1], [2, 3]], np.uint16, mask=[[0, 1], [0, 1]], hard_mask=True), HIDDEN),
    "all hidden": (np.ma.masked_all((4, 4, 3), np.uint8), "48 of 48 values of the masked array are hidden"),
    "hidden in one band": (np.ma.array(RGB, mask=RGB == RGB.max()), "values of the masked array are hidden"),
    "sparse tensor": (torch.rand(4, 4).to_sparse(), "expected a plain tensor with values: .*dense"),
    "tensor without values": (torch.rand(4, 4, device="meta"), "expected a plain tensor with values: .*meta"),
    "objects": (RGB.astype(object), "got object"),
    "structured": (np.zeros((4, 4), [("red", "u1"), ("green", "u1")]), "expected dtype uint8"),
    "int8": (GREY.astype(np.int8), "got int8"),
    "int16": (GREY.astype(np.int16), "got int16"),
    "uint32": (GREY.astype(np.uint32), "got uint32"),
    "dates": (GREY.astype("M8[s]"), "expected dtype uint8"),
    "lists of lists": (GREY.tolist(), "got list"),
    "five bands": (np.zeros((5, 6, 7), np.uint8), r"1 \(grey\), 3 \(RGB\) or 4 \(RGBA\) .* \(5, 6, 7\): pick the red"),
    "two bands": (np.zeros((6, 7, 2), np.uint8), r"\(6, 7, 2\): pick"),
    "vector": (np.zeros(5, np.uint8), r"expected an image of shape .* got \(5,\)"),
    "no rows": (np.zeros((0, 5, 3), np.uint8), r"without empty axes, got \(0, 5, 3\)"),
    "no columns": (torch.zeros(3, 5, 0), r"without empty axes, got \(3, 5, 0\)"),
    "empty PIL image": (Image.new("RGB", (0, 5)), "at least 1 x 1 pixel, got 0 x 5"),
    "NaN": (np.array([[0.5, np.nan]]), "NaN or infinite .*nan_to_num"),
    "infinite tensor": (torch.tensor([[0.5, torch.inf]]), "NaN or infinite"),
    "NaN in mode F": (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN or infinite"),
    "normalised": (torch.tensor([[-1.7, 2.1]]), r"\[0, 1\], got \[-1.7, 2.1\].* `pixel_values`"),
    "0..255 as float": (RGB.astype(np.float32), r"\[0, 1\], got .*cast 0..255 data to uint8"),
    "int64": (RGB.astype(np.int64), "got int64: cast 0..255 data to uint8"),
    "complex": (RGB.astype(np.complex64), "expected dtype uint8, uint16, bool or float, got complex64"),
    "mode I beyond 16 bit": (Image.fromarray(np.full((2, 2), 70000, np.int32)), r"0..65535 in mode I, got 70000"),
    "number": (3, "got int"),
}


@pytest.mark.parametrize(("image", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_image_is_named(image, message):
    with pytest.raises(ValueError, match=f"^pair 2, after image: .*{message}"):
        SMALL([(RGB, RGB), (RGB, image)])
    with pytest.raises(ValueError, match=f"^pair 1, before image: .*{message}"):
        SMALL([(image, RGB)])


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_masked_tensor_is_named():
    hidden = masked_tensor(torch.rand(4, 4), torch.rand(4, 4) > 0.5)
    with pytest.raises(ValueError, match="^pair 1, after image: expected a plain tensor with values"):
        SMALL((RGB, hidden))


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("share", [0, 0.1, 0.5])
def test_truncated_file_is_named(tmp_path, suffix, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = saved(Image.fromarray(noise), tmp_path / f"cut.{suffix}")
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(
        ValueError, match=f"^pair 1, after image: cannot read '.*cut.{suffix}' as an image .*; replace"
    ):
        SMALL((RGB, path))


def test_lazily_opened_truncated_image_is_named(tmp_path):
    path = saved(Image.fromarray(np.zeros((64, 64, 3), np.uint8)), tmp_path / "cut.bmp")
    path.write_bytes(path.read_bytes()[:500])
    with Image.open(path) as image, pytest.raises(ValueError, match="^pair 1, before image: .*truncated"):
        SMALL((image, RGB))


def test_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("no image")
    with pytest.raises(ValueError, match="^pair 1, before image: cannot read '.*notes.png' as an image"):
        SMALL((path, RGB))


@pytest.mark.parametrize("as_type", [str, Path])
def test_missing_file_is_named(tmp_path, as_type):
    with pytest.raises(FileNotFoundError, match="pair 1, after image: .*absent.png"):
        SMALL((RGB, as_type(tmp_path / "absent.png")))


def test_folder_is_named(tmp_path):
    with pytest.raises(IsADirectoryError, match="pair 1, before image: "):
        SMALL((tmp_path, RGB))


def test_broken_base64_is_named():
    with pytest.raises(ValueError, match="^pair 1, before image: cannot load 'data:image/png;base64,AAAA' .*check it"):
        SMALL(("data:image/png;base64,AAAA", RGB))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("times", [1.5, 3])
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, times):
    path = saved(Image.new("L", (100, 100)), tmp_path / "bomb.png")
    text = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    opened = Image.open(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(10_000 / times))
    for source in (path, opened, text):
        with pytest.raises(ValueError, match="^pair 1, before image: .*pixels.*bomb"):
            SMALL((source, RGB))
    assert Image.MAX_IMAGE_PIXELS == int(10_000 / times)


def test_image_at_the_bound_is_read(tmp_path, monkeypatch):
    path = saved(Image.new("L", (100, 100)), tmp_path / "large.png")
    for bound in (10_000, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", bound)
        assert SMALL((path, RGB))["pixel_values"].shape == (1, 2, 3, 16, 16)


def test_different_sizes_need_resizing():
    with pytest.raises(ValueError, match=r"one size, got \[\(4, 5\), \(6, 8\)\]; use do_resize=True"):
        RAW((RGB, RGB[:4, :5]))


def test_float_needs_rescaling():
    with pytest.raises(ValueError, match="^pair 1, before image: float .* do_rescale=True"):
        RAW((np.zeros((4, 4)), RGB), do_rescale=False)


# Properties

uint8_images = npst.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))


@settings(max_examples=50, deadline=None)
@given(before=uint8_images, after=uint8_images)
def test_any_pair_of_any_size(before, after):
    pixel_values = SMALL((before, after), return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 2, 3, 16, 16) and pixel_values.isfinite().all()
    swapped = SMALL((after, before), return_tensors="pt")["pixel_values"]
    assert torch.equal(swapped, pixel_values.flip(1))
    batch = SMALL([(before, after), (after, before)], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch, torch.cat([pixel_values, swapped]))


MODES = st.sampled_from(["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "I;16", "I", "F"])
SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=100)
@given(pairs=st.lists(st.tuples(MODES, SIZES, MODES, SIZES), min_size=1, max_size=4))
def test_any_modes_go_together(pairs):
    images = [(Image.new(one, size), Image.new(other, other_size)) for one, size, other, other_size in pairs]
    pixel_values = SMALL(images, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (len(pairs), 2, 3, 16, 16) and pixel_values.isfinite().all()
    singles = [SMALL(pair, return_tensors="pt")["pixel_values"] for pair in images]
    assert pixel_values.equal(torch.cat(singles))


@settings(max_examples=100, deadline=None)
@given(kind=st.sampled_from(["PNG", "JPEG", "TIFF", "GIF", "BMP"]), data=st.data())
def test_damaged_file_is_read_or_refused(tmp_path_factory, kind, data):
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, kind)
    damaged = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(damaged)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixel_values = SMALL((path, RGB), return_tensors="pt")["pixel_values"]
    except ValueError as error:
        assert str(error).startswith("pair 1, before image: ")
    else:
        assert pixel_values.isfinite().all()
