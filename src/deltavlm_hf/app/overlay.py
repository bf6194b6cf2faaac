"""Evidence and answers drawn over images."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ..data.masks import class_colours, class_values
from ..data.rules import CELLS

MOST = 0.75  # how much of the image the strongest heat covers
_RAMP = np.array(
    [[0, 0, 4], [81, 18, 124], [183, 55, 121], [252, 137, 97], [252, 253, 191]], np.float32
)  # dark to light


def overlay_heat(image: Image.Image, heat: np.ndarray, top: float | None = None) -> Image.Image:
    """
    Lays a heat map over an image, the stronger the more of it shows.

    Args:
        image (`PIL.Image.Image`): of any size and mode.
        heat (`np.ndarray` of shape `(H, W)`): not negative; stretched to the image.
        top (`float`, *optional*): the value that is drawn strongest; by default the map's own greatest. Give maps that
            are to be compared the same.

    Returns:
        `PIL.Image.Image`: RGB, of the image's size.

    Raises:
        ValueError: if the map has another number of dimensions.
    """
    if heat.ndim != 2:
        raise ValueError(f"A heat map has shape (H, W), got {heat.shape}.")
    top = float(heat.max()) if top is None else top
    strength = np.clip(heat.astype(np.float32) / (top or 1.0), 0, 1)
    strength = np.asarray(Image.fromarray(strength).resize(image.size, Image.Resampling.BILINEAR))[..., None]
    at = strength * (len(_RAMP) - 1)
    low = np.minimum(at.astype(int), len(_RAMP) - 2)
    colours = _RAMP[low[..., 0]] * (1 - (at - low)) + _RAMP[low[..., 0] + 1] * (at - low)
    mixed = np.asarray(image.convert("RGB")) * (1 - MOST * strength) + colours * MOST * strength
    return Image.fromarray(np.rint(mixed).astype(np.uint8))


def overlay_mask(image: Image.Image, mask: np.ndarray, classes: Sequence[str]) -> tuple[Image.Image, str]:
    """
    Lays a mask over an image, each class in its colour: roads yellow and buildings blue, as [`draw_cells`] has them.

    Args:
        image (`PIL.Image.Image`): of any size and mode.
        mask (`np.ndarray` of shape `(H, W)`, uint8): see [`predict_mask`]; brought to the image's size.
        classes (`Sequence[str]`): of the model that made it.

    Returns:
        `tuple[PIL.Image.Image, str]`: RGB, of the image's size; and what the colours mean.
    """
    found = np.asarray(Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST))
    pixels = np.array(image.convert("RGB"))
    colours, legend = class_colours(classes), []
    for kind, value in class_values(classes).items():
        name, colour = colours[kind]
        pixels[found == value] = (1 - MOST) * pixels[found == value] + MOST * np.array(colour)
        legend.append(f"{kind} {name}")
    return Image.fromarray(pixels), ", ".join(legend)


def draw_cells(image: Image.Image, roads: np.ndarray, buildings: np.ndarray) -> Image.Image:
    """
    Draws a grid answer: the cells of roads framed in yellow, those of buildings in blue.

    Args:
        image (`PIL.Image.Image`): of any size and mode.
        roads (`np.ndarray` of shape `(9,)`): bool, in the order of [`~deltavlm_hf.data.rules.CELLS`].
        buildings (`np.ndarray` of shape `(9,)`): bool.
    """
    picture = image.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    width, height = picture.size
    line = max(2, round(min(picture.size) / 100))
    for part in (1, 2):
        canvas.line([(width * part / 3, 0), (width * part / 3, height)], "white", max(1, line // 2))
        canvas.line([(0, height * part / 3), (width, height * part / 3)], "white", max(1, line // 2))
    (_, road), (_, building) = class_colours(("road", "building")).values()
    for cells, colour, inset in ((roads, road, line), (buildings, building, 3 * line)):
        for index in np.flatnonzero(cells[: len(CELLS)]):
            row, column = divmod(int(index), 3)
            left, top = width * column / 3 + inset, height * row / 3 + inset
            right, bottom = width * (column + 1) / 3 - inset, height * (row + 1) / 3 - inset
            canvas.rectangle([left, top, right, bottom], outline=colour, width=line)
    return picture
