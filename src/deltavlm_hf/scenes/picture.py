"""A scene as a picture: what was found over date 2, with a legend and a scale bar."""

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import shapely
from PIL import Image, ImageDraw, ImageFont

from ..files import placing
from .answers import TileAnswer
from .layers import WORDS
from .objects import join_scene
from .scene import Scene
from .styles import CHANGES

MOST = 1600  # pixels of the longer side
_UNKNOWN = (40, 40, 40)
_MARGIN, _LINE, _LEAST_WIDTH = 12, 22, 420


@dataclass(frozen=True)
class Finding:
    """
    What is drawn.

    Attributes:
        layer (`str`): `tiles`, `cells` or `objects`.
        label (`str`): its name in the legend.
        colour (`tuple[int, int, int]`): red, green and blue.
        cover (`int`): how much its inside covers, of 255.
        shape (`shapely.Geometry`): in columns and rows of the scene's grid.
        text (`str`): what is to be said of it.
    """

    layer: str
    label: str
    colour: tuple[int, int, int]
    cover: int
    shape: shapely.Geometry
    text: str


def findings(answers: Sequence[TileAnswer]) -> Iterator[Finding]:
    """Tiles first, then the cells that answers name, or objects where there are masks."""
    kinds = answers[0].source.kinds
    colours = answers[0].source.colours
    for answer in answers:
        label, colour, cover = CHANGES[WORDS[answer.changed]]
        text = answer.reason or " / ".join(answer.answers) or label
        yield Finding("tiles", label, colour, cover, shapely.box(*answer.tile.core), f"{answer.tile.name}: {text}")
    if kinds:
        for item in join_scene(answers):
            yield Finding("objects", item.kind, colours[item.kind], 150, item.shape, f"{item.kind}, {item.tile.name}")
        return
    for answer in answers:
        for kind, name, shape in answer.cells:
            yield Finding("cells", kind, colours[kind], 90, shape, f"{kind}, {answer.tile.name}, {name}")


def show_dates(scene: Scene, most: int = MOST) -> tuple[Image.Image, Image.Image, float]:
    """Both dates, reduced, with what is unknown in grey; and pixels of theirs for one of the grid."""
    before, after, valid = scene.reduced(most)
    for image in (before, after):
        image[~valid] = _UNKNOWN
    return Image.fromarray(before), Image.fromarray(after), before.shape[1] / scene.grid.width


def draw_scene(path: str | os.PathLike, scene: Scene, answers: Sequence[TileAnswer]) -> None:
    """
    Draws what was found.

    Args:
        path (`str` or `Path`): a PNG or JPEG, by its suffix, written whole or not at all.
        scene ([`Scene`]): what was scanned.
        answers (`Sequence[TileAnswer]`): what came of it.
    """
    _, after, scale = show_dates(scene)
    layer = Image.new("RGBA", after.size)
    canvas = ImageDraw.Draw(layer)
    legend: dict[str, tuple[int, int, int]] = {}
    for found in findings(answers):
        legend[found.label] = found.colour
        for part in shapely.get_parts(found.shape):
            points = [(column * scale, row * scale) for column, row in part.exterior.coords]
            canvas.polygon(points, fill=(*found.colour, found.cover), outline=(*found.colour, 255))
    picture = Image.alpha_composite(after.convert("RGBA"), layer).convert("RGB")
    width = max(picture.width, _LEAST_WIDTH)
    keys = _lay_out_legend(legend, width)
    framed = Image.new("RGB", (width, picture.height + 2 * _LINE + keys[-1][1] + 3 * _MARGIN), "white")
    framed.paste(picture)
    canvas = ImageDraw.Draw(framed)
    for left, down, label in keys:
        top = picture.height + _MARGIN + down
        canvas.rectangle([left, top, left + 14, top + 14], fill=legend[label], outline="black")
        canvas.text((left + 20, top - 1), label, fill="black", font=_font())
    pixels, length = scale_bar(scene, scale, picture.width)
    top = framed.height - _LINE - _MARGIN
    canvas.rectangle([_MARGIN, top + 4, _MARGIN + pixels, top + 9], fill="black")
    canvas.text((_MARGIN + pixels + 8, top - 2), length, fill="black", font=_font())
    with placing(Path(path)) as new:
        framed.save(new)


def _lay_out_legend(labels: Iterable[str], width: int) -> list[tuple[int, int, str]]:
    """For each label how far right and down it goes; what does not fit into a line begins the next."""
    places, left, down = [], _MARGIN, 0
    for label in labels:
        length = 36 + round(_font().getlength(label))
        if left + length > width and left > _MARGIN:
            left, down = _MARGIN, down + _LINE
        places.append((left, down, label))
        left += length
    return places


def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=14)


def scale_bar(scene: Scene, scale: float, width: int) -> tuple[float, str]:
    """A round length that takes up to a quarter of the picture's width: in pixels, and its name."""
    metres = scene.grid.metres()[0] / scale  # of a pixel of the picture
    longest = max(width, 4) / 4 * metres
    power = 10.0 ** math.floor(math.log10(longest))
    length = next(factor * power for factor in (5, 2, 1) if factor * power <= longest)
    return length / metres, f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
