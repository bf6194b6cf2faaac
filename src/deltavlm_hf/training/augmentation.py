"""The same turn or flip for both dates, with their mask and the places that texts name turned along."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ..data.questions import GRID
from ..data.rules import CELLS

TURNS = 8  # quarter turns to the left, 0 to 3; 4 to 7 the same, then flipped left to right

_QUARTERS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
_CELL = "|".join(CELLS)
_CELL_LIST = re.compile(rf"(?<![\w-])(?:{_CELL})(?:, (?:{_CELL}))*(?![\w-])")
_GRID = re.compile(re.escape(GRID), re.IGNORECASE)
_DIRECTION = re.compile(
    r"\b(?:left|right|top|bottom|upper|lower|above|below|north\w*|south\w*|east\w*|west\w*|vertical\w*|horizontal\w*)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class PairAugmentation:
    """
    Turns and flips pairs at random.

    Cells of the 3x3 grid are renamed wherever a question or an answer names them, lists of them put in order again. A
    pair about which a text says a direction in other words ("a road on the left") stays as it is. The same pair, epoch
    and seed give the same turn.

    Args:
        turns (`bool`, *optional*, defaults to `True`): quarter turns and flips, all eight alike.
        crop (`float`, *optional*, defaults to 0): how much of each side may be cut away, at most, before pairs are
            brought back to their size; 0.1 is a tenth. For captions and yes/no questions only, as the others count or
            place what a crop might cut off. A change at the very edge can be lost.

    Raises:
        ValueError: if `crop` is not in [0, 0.5).
    """

    turns: bool = True
    crop: float = 0.0

    def __post_init__(self):
        if not 0 <= self.crop < 0.5:
            raise ValueError(f"`crop` must be at least 0 and less than 0.5, got {self.crop}.")

    def __call__(self, row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """
        Args:
            row (`dict`): with PIL images `before` and `after`, perhaps a `mask`, and `turns`; see
                [`load_changechat`].
            rng (`np.random.Generator`): decides.

        Returns:
            `dict`: a new row.
        """
        turn = int(rng.integers(TURNS)) if self.turns else 0
        edges = rng.uniform(0, self.crop, 4) if self.crop else np.zeros(4)
        row = dict(row)
        images = [name for name in ("before", "after", "mask") if row.get(name) is not None]
        texts = [text for each in row["turns"] for text in (each["question"], each["answer"])]
        if turn and not any(map(names_direction, texts)):
            row["turns"] = [{key: turn_text(text, turn) for key, text in each.items()} for each in row["turns"]]
            row |= {name: turn_image(row[name], turn) for name in images}
        if edges.any() and row["task"] in ("caption", "binary"):
            row |= {name: _crop(row[name], edges, name == "mask") for name in images}
        return row


def turn_image(image: Image.Image, turn: int) -> Image.Image:
    """An image after one of the eight turns."""
    if turn % 4:
        image = image.transpose(_QUARTERS[turn % 4 - 1])
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if turn >= 4 else image


def turn_text(text: str, turn: int) -> str:
    """A text with the cells that it names where they are after one of the eight turns."""

    def rename(match: re.Match) -> str:
        cells = sorted(_NEW_CELL[turn][CELLS.index(name)] for name in match[0].split(", "))
        return ", ".join(CELLS[cell] for cell in cells)

    return _CELL_LIST.sub(rename, text)


def names_direction(text: str) -> bool:
    """Whether a text says where something is in other words than cells. The grid instruction's do not count."""
    return _DIRECTION.search(_CELL_LIST.sub("", _GRID.sub("", " ".join(text.split())))) is not None


def _new_cells(turn: int) -> list[int]:
    """Where each cell is after a turn."""
    turned = np.rot90(np.arange(9).reshape(3, 3), turn % 4)
    turned = turned[:, ::-1] if turn >= 4 else turned
    return [int(np.flatnonzero(turned.ravel() == cell)[0]) for cell in range(9)]


_NEW_CELL = [_new_cells(turn) for turn in range(TURNS)]


def _crop(image: Image.Image, edges: np.ndarray, is_mask: bool) -> Image.Image:
    """Cuts shares of the left, top, right and bottom away."""
    left, top, right, bottom = edges
    width, height = image.size
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    how = Image.Resampling.NEAREST if is_mask else Image.Resampling.BICUBIC
    return image.resize(image.size, how, box=box)
