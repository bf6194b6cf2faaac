"""Evidence as pictures to lay over images: nothing covers what it says nothing about."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.masks import class_colours, class_values

MOST = 0.75  # how much of the image the strongest heat covers, and a mask all over
_RAMP = np.array(
    [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float32
)  # dark to light


def heat_layer(heat: np.ndarray, top: float | None = None) -> Image.Image:
    """
    A heat map, the stronger the more it covers.

    Args:
        heat (`np.ndarray` of shape `(H, W)`): not negative.
        top (`float`, *optional*): the value that is drawn strongest; by default the map's own greatest. Give maps that
            are to be compared the same.

    Returns:
        `PIL.Image.Image`: RGBA, of the map's size.

    Raises:
        ValueError: if the map has another number of dimensions.
    """
    if heat.ndim != 2:
        raise ValueError(f"A heat map has shape (H, W), got {heat.shape}.")
    top = float(heat.max()) if top is None else top
    strength = np.clip(heat.astype(np.float32) / (top or 1.0), 0, 1)[..., None]
    at = strength * (len(_RAMP) - 1)
    low = np.minimum(at.astype(int), len(_RAMP) - 2)
    colours = _RAMP[low[..., 0]] * (1 - (at - low)) + _RAMP[low[..., 0] + 1] * (at - low)
    return Image.fromarray(np.rint(np.concatenate([colours, 255 * MOST * strength], -1)).astype(np.uint8))


def mask_layer(
    mask: np.ndarray, names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS
) -> tuple[Image.Image, dict[str, str]]:
    """
    A mask, each class in its colour.

    Args:
        mask (`np.ndarray` of shape `(H, W)`, uint8): see [`predict_mask`].
        names (`Sequence[str]`): the `mask_classes` of the model that made it.
        classes ([`Classes`], *optional*): whose values and colours they have; by default roads and buildings.

    Returns:
        `tuple[PIL.Image.Image, dict[str, str]]`: RGBA, of the mask's size; and for each class the CSS colour.
    """
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    colours = class_colours(names, classes)
    for kind, value in class_values(names, classes).items():
        pixels[mask == value] = (*colours[kind], round(255 * MOST))
    return Image.fromarray(pixels), css_colours(names, classes)


def css_colours(names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS) -> dict[str, str]:
    """For each class its colour, as a page has it."""
    return {kind: "#{:02x}{:02x}{:02x}".format(*colour) for kind, colour in class_colours(names, classes).items()}


def embed(image: Image.Image, kind: str = "png") -> str:
    """An image as a URL that holds it."""
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=90)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
