"""What a scan says of one tile, and what it means."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import shapely

from ..data.asked import meaning_of, meanings
from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.masks import class_colours
from ..data.rules import CELLS
from .grid import Grid
from .tiles import Tile


@dataclass(frozen=True)
class FoundObject:
    """
    What a mask shows within one tile's core, in one piece.

    Attributes:
        kind (`str`): one of the model's `mask_classes`.
        shape (`shapely.Geometry`): along the edges of pixels, in columns and rows of the grid.
    """

    kind: str
    shape: shapely.Geometry


@dataclass(frozen=True)
class Source:
    """
    What all answers of a scan have in common.

    Attributes:
        grid ([`Grid`]): what pixels refer to.
        questions (`tuple[str, ...]`): asked about every tile; those of a dialogue one after another.
        kinds (`tuple[str, ...]`): the model's `mask_classes`; none if it makes no masks.
        facts (`dict`): the files, the model and its commit, the stretch, and what else tiles follow from.
        classes ([`Classes`], *optional*): what the model counts and places; by default roads and buildings.
    """

    grid: Grid
    questions: tuple[str, ...]
    kinds: tuple[str, ...]
    facts: dict[str, Any] = field(hash=False)
    classes: Classes = ROADS_AND_BUILDINGS

    @property
    def colours(self) -> dict[str, tuple[int, int, int]]:
        """Of what cells and objects can be: the classes that answers are about, and those of masks."""
        return class_colours([*dict.fromkeys((*self.classes.names, *self.kinds))], self.classes)


@dataclass(frozen=True)
class TileAnswer:
    """
    What is known of a tile.

    Attributes:
        source ([`Source`]): of the scan.
        tile ([`Tile`]): where it lies. Answers speak of all of it, objects lie in its core.
        answers (`tuple[str, ...]`): in the order of the questions; none where nothing is known.
        objects (`tuple[FoundObject, ...]`): what masks show in the core, where the ground is known.
        reason (`str`, *optional*): why nothing is known: too little valid ground, or an error.
        failed (`bool`): whether that was an error.
    """

    source: Source
    tile: Tile
    answers: tuple[str, ...] = ()
    objects: tuple[FoundObject, ...] = ()
    reason: str | None = None
    failed: bool = False

    @property
    def geometry(self) -> shapely.Polygon:
        """The core, in the coordinates of `source.grid.crs`."""
        return self.source.grid.to_ground(shapely.box(*self.tile.core))

    @property
    def meaning(self) -> dict[str, Any]:
        """What the answers say, see [`~deltavlm_hf.data.asked.meaning_of`]; of several the first that says it."""
        classes = self.source.classes
        found: dict[str, Any] = dict.fromkeys(meanings(classes))
        for question, answer in zip(self.source.questions, self.answers, strict=False):
            for name, value in meaning_of(question, answer, classes).items():
                found[name] = value if found[name] is None else found[name]
        return found

    @property
    def changed(self) -> bool | None:
        """Whether anything changed: by yes or no, else by counts, else by cells, else by objects; or unknown, None."""
        if self.reason is not None:
            return None
        said = self.meaning
        if said["changed"] is not None:
            return said["changed"]
        for columns in zip(*((each.count_column, each.cells_column) for each in self.source.classes), strict=True):
            if said[columns[0]] is not None:
                return any(said[column] for column in columns)
        return bool(self.objects) if self.source.kinds else None

    @property
    def cells(self) -> Iterator[tuple[str, str, shapely.Geometry]]:
        """Kind, name and shape of each cell that an answer lists, in columns and rows, as far as it is in the core."""
        said = self.meaning
        for each in self.source.classes:
            for name in said[each.cells_column] or ():
                shape = self.tile.cell(CELLS.index(name))
                if shape.area:
                    yield each.name, name, shape

    def to_entry(self) -> dict[str, Any]:
        """For a journal."""
        return {
            "tile": self.tile.index,
            "answers": list(self.answers),
            "objects": [[each.kind, each.shape.wkt] for each in self.objects],
            "reason": self.reason,
            "failed": self.failed,
        }

    @classmethod
    def from_entry(cls, entry: dict[str, Any], source: Source, tile: Tile) -> "TileAnswer":
        """What [`to_entry`] made."""
        objects = tuple(FoundObject(kind, shapely.from_wkt(shape)) for kind, shape in entry["objects"])
        return cls(source, tile, tuple(entry["answers"]), objects, entry["reason"], entry["failed"])
