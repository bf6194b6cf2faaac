"""
Image processor of DeltaVLM: pairs of images of one place, in any usual form, become `pixel_values`.

Shapes: B pairs, H height, W width, C channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    ChannelDimension,
    PILImageResampling,
)
from transformers.processing_utils import ImagesKwargs
from transformers.utils import logging

from .reading import check_image, loses_depth, read_pixels

logger = logging.get_logger(__name__)

CHANNEL_COUNTS = (1, 3, 4)
LARGEST_SIDE = 2**14  # pixels of what an image is resized, padded or cut to
ROUNDING = 1e-3  # how far a float image may leave [0, 1]: a quarter of a grey level is rounding, more is other data


class DeltaVLMImagesKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]
    """
    Args:
        stretch (`Sequence[float]`, *optional*): see [`DeltaVLMImageProcessor`].
    """

    stretch: list | tuple | None


class DeltaVLMImageProcessor(PilBackend):
    r"""
    Turns pairs of images (before, after) into `pixel_values` of shape `(B, 2, 3, H, W)`.

    `images` is one pair `(before, after)` or a list of pairs `[(before, after), ...]`; an array or tensor of shape
    `(2, 3, H, W)` or `(B, 2, 3, H, W)` is a pair or a batch of pairs. A tuple of two lists or tuples is refused: it
    could be two pairs, or all first and all second dates. The two dates may differ in size, mode and type.

    Each image is a PIL image, a numpy array, a torch tensor, or a file of PNG, JPEG, TIFF, WebP, GIF, BMP, JPEG 2000
    or PPM: a path, a URL (`file://` too), `data:image/...`, base64, bytes, an open file, or what
    `datasets.Image(decode=False)` gives. Resizing is PIL's bicubic, as in the authors' training.

    What a pixel becomes depends on the image's mode or dtype alone, never on its content, so that both dates are
    treated alike and no change is invented:

    | image | RGB, 8 bit |
    |---|---|
    | RGB; PIL YCbCr, HSV, LAB, CMYK | as it is; by PIL's conversion |
    | grey (PIL `L`, `1`; arrays of 1 channel or bool) | the one channel three times; false 0, true 255 |
    | with alpha (PIL `LA`, `RGBA`, `PA`; arrays of 4 channels) | alpha dropped, as by the authors' `convert("RGB")` |
    | palette (PIL `P`) | colours looked up; transparency dropped |
    | 16 bit (PIL `I;16`, `I`; uint16) | 0..65535 -> 0..255; give 11- or 12-bit data and reflectances a `stretch` |
    | float (PIL `F`; float arrays) | [0, 1] -> 0..255; values outside are an error |
    | more than 8 bits and floats, with `stretch=(low, high)` | low..high -> 0..255, clipped; the same for both dates |

    Of files that Pillow does not read right, such as a TIFF of four bands, or of three of 16 bits, GDAL gives red,
    green and blue (by colour interpretation, else the first three bands) in their own depth, where rasterio is
    installed (the extra `geo`). Without it they are refused, or, colours of 16 bits, taken as Pillow's upper 8, for
    which there is no `stretch`. Where 16-bit values fill less than a tenth of the range, a warning says so, once. A
    masked array that hides anything is refused. The EXIF orientation is applied, the first frame of a multi-frame file
    is taken.

    Arrays are `(H, W)`, `(H, W, C)` or `(C, H, W)`; where both of the latter fit, a tensor is read as `(C, H, W)` and
    a numpy array as `(H, W, C)`, unless `input_data_format` says.

    Args:
        do_resize (`bool`, *optional*, defaults to `True`):
            Resize to `size`. With `False` all images of a call must have the same size.
        size (`dict[str, int]`, *optional*, defaults to `{"height": 224, "width": 224}`):
            The size the model expects.
        resample (`PILImageResampling`, *optional*, defaults to `BICUBIC`):
            PIL's filter for resizing.
        do_rescale (`bool`, *optional*, defaults to `True`):
            Multiply by `rescale_factor` (1/255). Float images have been put on 0..255 by then: they need it too.
        do_normalize (`bool`, *optional*, defaults to `True`):
            Subtract `image_mean` and divide by `image_std` (CLIP's by default).
        do_convert_rgb (`bool`, *optional*, defaults to `True`):
            Has no effect: the model takes RGB only, so images are always converted.
        stretch (`Sequence[float]`, *optional*):
            What is black and what is white in images of more than 8 bits and floats, in their own values. 8-bit images
            stay as they are.

    Raises:
        `ValueError`: if the images don't come in pairs, or one cannot be used; the message names pair and date.
        `OSError`: (`FileNotFoundError`, `IsADirectoryError`, `PermissionError`) if a file cannot be opened.

    Example:

    ```python
    >>> image_processor = DeltaVLMImageProcessor()
    >>> image_processor(("2019.png", "2024.png"), return_tensors="pt")["pixel_values"].shape
    torch.Size([1, 2, 3, 224, 224])
    ```
    """

    resample = PILImageResampling.BICUBIC
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD
    size = {"height": 224, "width": 224}
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    stretch = None
    valid_kwargs = DeltaVLMImagesKwargs

    def fetch_images(self, images: Any) -> list[tuple[Any, Any]]:
        """
        Arranges `images` into pairs and loads those given as path, URL or base64.

        Args:
            images: one pair or a list of pairs, in any of the forms that the class describes.

        Returns:
            `list[tuple]`: pairs (before, after) of PIL images, arrays and tensors.
        """
        pairs = []
        for number, (before, after) in enumerate(_as_pairs(images), start=1):
            with _naming(number, "before"):
                before = _load(before)
            with _naming(number, "after"):
                after = _load(after)
            pairs.append((before, after))
        return pairs

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        do_rescale: bool | None = None,
        stretch: Sequence[float] | None = None,
        **kwargs,
    ) -> np.ndarray:
        """Converts one PIL image, array or tensor to an RGB `np.ndarray` of shape `(3, H, W)`, dtype uint8."""
        channel_axes: tuple[int, ...] = (-1, 0)
        if isinstance(image, Image.Image):
            if loses_depth(image):
                if stretch is not None:
                    raise ValueError(
                        "its colours have 16 bits, of which Pillow gives 8, too few to stretch; pass its path with "
                        "rasterio installed, or its red, green and blue as an array"
                    )
                _warn_if_flat(np.array(image), 2**8)
            image, channel_axes = _from_pil(image), (-1,)
        elif isinstance(image, torch.Tensor):
            image, channel_axes = _from_tensor(image), (0, -1)
        else:
            image = _from_array(image)
        if input_data_format is not None and len(channel_axes) == 2:
            channel_axes = (0,) if ChannelDimension(input_data_format) is ChannelDimension.FIRST else (-1,)

        if image.ndim not in (2, 3) or 0 in image.shape:
            raise ValueError(
                f"expected an image of shape (H, W), (H, W, C) or (C, H, W) without empty axes, got {image.shape}; "
                "a batch of pairs goes as one array (B, 2, C, H, W)"
            )
        if image.dtype.kind == "f" and do_rescale is False:
            raise ValueError("float images are put on 0..255 first and need do_rescale=True, got do_rescale=False")
        if image.ndim == 2:
            image = image[None]  # (1, H, W)
        else:
            image = np.moveaxis(image, _find_channels(image.shape, channel_axes), 0)  # (C, H, W)
        image = np.repeat(image, 3, axis=0) if len(image) == 1 else image[:3]  # (3, H, W)
        if stretch is not None and image.dtype.itemsize > 1:
            return _stretch(image, stretch)
        return _to_uint8(image)

    def _prepare_image_like_inputs(self, images: Any, *args, expected_ndims: int = 3, **kwargs) -> list[np.ndarray]:
        """As the parent's, except that an error names the pair and the date. Flat: before, after, before, ..."""
        prepared = []
        for number, pair in enumerate(self.fetch_images(images), start=1):
            for date, image in zip(("before", "after"), pair, strict=True):
                with _naming(number, date):
                    prepared.append(self.process_image(image, *args, **kwargs))
        return prepared

    def _preprocess(self, images: list[np.ndarray], *args, **kwargs) -> BatchFeature:
        for name in ("size", "crop_size", "pad_size"):
            sides = dict(kwargs.get(name) or {})
            if any(not 0 < side <= LARGEST_SIDE for key, side in sides.items() if not key.endswith("pixels")):
                raise ValueError(f"`{name}` is {sides}, expected sides of 1 to {LARGEST_SIDE} pixels.")
        processed = super()._preprocess(images, *args, **{**kwargs, "return_tensors": None})["pixel_values"]
        sizes = {image.shape[-2:] for image in processed}
        if len(sizes) > 1:
            raise ValueError(
                f"all images of a call must end up with one size, got {sorted(sizes)}; use do_resize=True"
            )
        pixel_values = np.stack(processed)  # (2B, 3, H, W)
        pixel_values = pixel_values.reshape(-1, 2, *pixel_values.shape[1:])  # (B, 2, 3, H, W)
        return BatchFeature({"pixel_values": pixel_values}, tensor_type=kwargs.get("return_tensors"))


def _is_array(item: Any) -> bool:
    return isinstance(item, (np.ndarray, torch.Tensor))


def _as_pairs(images: Any) -> list[list[Any] | tuple[Any, ...]]:
    """One pair or many, nested or stacked -> list of pairs, whatever the images are."""
    wanted = "pass one pair (before, after) or a list of pairs [(before, after), ...]"
    if _is_array(images) and images.ndim in (4, 5):
        images = [list(images)] if images.ndim == 4 else [list(pair) for pair in images]
    if not isinstance(images, (list, tuple)):
        raise ValueError(f"expected 2 images (before, after), got a single {type(images).__name__}: {wanted}")
    if len(images) == 0:
        raise ValueError(f"expected at least 1 pair of images, got none: {wanted}")
    if isinstance(images, tuple) and len(images) == 2 and all(isinstance(item, (list, tuple)) for item in images):
        raise ValueError(
            "a tuple of two lists could be (befores, afters) or two pairs: pass a list of pairs "
            "[(before, after), (before, after)]; of two lists, list(zip(befores, afters, strict=True)) makes one"
        )
    if not any(isinstance(item, (list, tuple)) for item in images):
        images = [images]

    for number, pair in enumerate(images, start=1):
        if not isinstance(pair, (list, tuple)):
            got = f"a single {type(pair).__name__}"
        elif len(pair) != 2:
            got = str(len(pair))
        else:
            continue
        raise ValueError(f"pair {number}: expected 2 images (before, after), got {got}: {wanted}")
    return list(images)


@contextmanager
def _naming(number: int, date: str) -> Iterator[None]:
    """Says in front of any error which image it is about. Pillow raises all kinds of errors on malformed files."""
    item = f"pair {number}, {date} image"
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # no such file, is a directory, no permission
            raise OSError(error.errno, f"{item}: {error.strerror}", error.filename) from error
        raise ValueError(f"{item}: {error}") from error


def _load(image: Any) -> Image.Image | np.ndarray | torch.Tensor:
    """Whatever holds a file -> PIL image; anything loaded already is returned as it is."""
    return image if isinstance(image, Image.Image) or _is_array(image) else read_pixels(image)


def _from_array(image: np.ndarray) -> np.ndarray:
    """A plain array; a masked one must show all of its values, which a model cannot be told to overlook."""
    if isinstance(image, np.ma.MaskedArray) and np.ma.getmaskarray(image).any():
        hidden = np.count_nonzero(np.ma.getmaskarray(image))
        raise ValueError(
            f"{hidden} of {image.size} values of the masked array are hidden, and nothing stands for the unknown: cut "
            "them off both dates, or choose what the model shall see, alike for both dates, with image.filled(value)"
        )
    return np.asarray(image)


def _from_tensor(image: torch.Tensor) -> np.ndarray:
    try:
        image = image.detach().cpu()
        return (image.float() if image.is_floating_point() else image).numpy()  # numpy has no bfloat16
    except (RuntimeError, TypeError) as error:  # sparse, quantised, masked, on the meta device
        raise ValueError(f"expected a plain tensor with values: {error}") from error


def _from_pil(image: Image.Image) -> np.ndarray:
    """PIL image of any mode -> (H, W) in its own depth if 16-bit or float, else RGB (H, W, 3)."""
    check_image(image)
    if 0 in image.size:
        raise ValueError(f"expected an image of at least 1 x 1 pixel, got {image.width} x {image.height}")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I;16"):
        return np.array(image)
    if image.mode == "I":  # 32 bit, in which Pillow keeps 16-bit files of some formats
        array = np.array(image)
        if array.min() < 0 or array.max() > 65535:
            raise ValueError(
                f"expected 16-bit values 0..65535 in mode I, got {array.min()}..{array.max()}: "
                "scale both dates alike to floats in [0, 1]"
            )
        return array.astype(np.uint16)
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparency
    return np.array(image.convert("RGB"))


def _find_channels(shape: tuple[int, ...], axes: tuple[int, ...]) -> int:
    """The first of `axes` whose length can be a number of channels."""
    for axis in axes:
        if shape[axis] in CHANNEL_COUNTS:
            return axis
    raise ValueError(
        f"expected 1 (grey), 3 (RGB) or 4 (RGBA) channels, got an array of shape {shape}: "
        "pick the red, green and blue bands, for example image[..., [2, 1, 0]]"
    )


def _stretch(image: np.ndarray, stretch: Sequence[float]) -> np.ndarray:
    """From low to high, both dates alike, to uint8."""
    if len(stretch) != 2 or not all(map(np.isfinite, stretch)) or not stretch[0] < stretch[1]:
        raise ValueError(f"`stretch` is {stretch!r}, expected two numbers: what is black, and, higher, what is white")
    if not np.isfinite(image).all():
        raise ValueError("found NaN or infinite values: fill them before, for instance with np.nan_to_num")
    low, high = stretch
    return np.round(((image.astype(np.float64) - low) / (high - low)).clip(0, 1) * 255).astype(np.uint8)


def _warn_if_flat(image: np.ndarray, levels: int) -> None:
    """Once, whatever the values: data of 11 or 12 bits, or reflectances, look alike everywhere in 16."""
    if int(image.max()) - int(image.min()) < levels / 10:
        logger.warning_once(
            "A 16-bit image fills less than a tenth of the range and is nearly of one colour to the model. Say what "
            "is black and white at both dates, in an array's own values: processor(images=..., stretch=(low, high)); "
            "of georeferenced files `deltavlm scan` finds it."
        )


def _to_uint8(image: np.ndarray) -> np.ndarray:
    """Any accepted dtype -> uint8, by a rule that depends on the dtype alone."""
    if image.dtype.kind == "f":
        if not np.isfinite(image).all():
            raise ValueError("found NaN or infinite values: fill them before, for instance with np.nan_to_num")
        low, high = image.min(), image.max()
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"float images must lie in [0, 1], got [{low:.4g}, {high:.4g}]: scale both dates alike, or cast "
                "0..255 data to uint8; values already normalised go to the model as `pixel_values`, without processor"
            )
        return np.round(image.clip(0, 1) * 255).astype(np.uint8)
    match image.dtype.name:
        case "uint8":
            return image
        case "bool":
            return image * np.uint8(255)
        case "uint16":
            _warn_if_flat(image, 2**16)
            return np.round(image / 257).astype(np.uint8)  # 65535 = 257 * 255
    raise ValueError(
        f"expected dtype uint8, uint16, bool or float, got {image.dtype}: "
        "cast 0..255 data to uint8, or scale both dates alike to floats in [0, 1]"
    )


__all__ = ["DeltaVLMImageProcessor"]
