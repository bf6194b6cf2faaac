"""What a scan says of one tile, and what it means."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import shapely

from ..data.questions import parse_count, parse_grid, parse_yes_no, question_task
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
        questions (`tuple[str, ...]`): asked about every tile.
        kinds (`tuple[str, ...]`): the model's `mask_classes`; none if it makes no masks.
        facts (`dict`): the files, the model and its commit, the stretch, and what else tiles follow from.
    """

    grid: Grid
    questions: tuple[str, ...]
    kinds: tuple[str, ...]
    facts: dict[str, Any] = field(hash=False)


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
    def changed(self) -> bool | None:
        """Whether anything changed: by yes or no, else by counts, else by cells, else by objects; or unknown, None."""
        if self.reason is not None:
            return None
        said = self._said("binary")
        if said is not None:
            return parse_yes_no(said)
        counts, cells = self.counts, self.cells
        if counts is not None:
            return any(counts.values())
        if cells is not None:
            return any(cells.values())
        return bool(self.objects) if self.source.kinds else None

    @property
    def counts(self) -> dict[str, int] | None:
        """Roads and buildings, as an answer numbers them; None if none does."""
        found = parse_count(self._said("count") or "")
        return None if found is None else dict(zip(("road", "building"), found, strict=True))

    @property
    def cells(self) -> dict[str, tuple[int, ...]] | None:
        """Cells of the 3x3 grid, numbered row by row, with roads and with buildings, as an answer lists them."""
        found = parse_grid(self._said("grid") or "")
        if found is None:
            return None
        numbers = [tuple(each.nonzero()[0].tolist()) for each in found]
        return dict(zip(("road", "building"), numbers, strict=True))

    @property
    def cell_names(self) -> str:
        """As `road: top-left; building: center-center, center-right`; empty where there are none."""
        listed = {kind: ", ".join(CELLS[each] for each in cells) for kind, cells in (self.cells or {}).items()}
        return "; ".join(f"{kind}: {names}" for kind, names in listed.items() if names)

    def _said(self, task: str) -> str | None:
        """The answer to the first question of a task."""
        for question, answer in zip(self.source.questions, self.answers, strict=False):
            if question_task(question) == task:
                return answer
        return None

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


def default_questions() -> Sequence[str]:
    """Yes or no, how many, and where: ChangeChat-105k's own words."""
    from ..data.questions import INSTRUCTIONS

    return tuple(INSTRUCTIONS[task] for task in ("binary", "count", "grid"))
