"""What can change: the classes of a data set, with their names, their values in masks and their colours."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import ImageColor

from ..files import write_text

FILE = "classes.yaml"  # beside a data set's annotations, and in the folder of pairs that it is built from
ROAD, BUILDING = 128, 255
NEW, REMOVED, STATED = "new", "removed", ""  # how an object of a class changed; stated: its name says so itself

_NAME = re.compile(r"[^\W_]+(?:[ -][^\W_]+)*")
_KEYS = ("name", "plural", "mask", "colour", "removed", "new")
# Columns and figures that stand beside those of classes.
_TAKEN = {
    *"changed cell tile kind geometry geom fid area_m2 question task answer reason error model commit stretch".split(),
    *"before after name id all samples failed intervals unparsed unreadable_truths".split(),
}


@dataclass(frozen=True)
class ChangeClass:
    """
    One kind of object that can change.

    Args:
        name (`str`): of one object, as within a sentence: words in lower case, between them a space or a hyphen.
        plural (`str`): of several.
        mask (`int`): its value in change masks, 1 to 255.
        colour (`str`, *optional*): in pictures and on maps: `#ff0000`, or a name that CSS has.
        how (`str`, *optional*, defaults to `"new"`): what answers say before the name: `"new"`, `"removed"` where
            masks mark what went, or nothing where the name itself says what happened, such as "destroyed building".

    Raises:
        ValueError: if one of them cannot be.
    """

    name: str
    plural: str
    mask: int
    colour: str | None = None
    how: str = NEW

    def __post_init__(self):
        for text in (self.name, self.plural):
            if not (isinstance(text, str) and text == text.lower() and _NAME.fullmatch(text) and len(text) <= 100):
                raise ValueError(
                    f"{text!r:.60} is no name of a class: expected words in lower case, letters and digits, with a "
                    "space or a hyphen between them."
                )
        if isinstance(self.mask, bool) or not isinstance(self.mask, int) or not 1 <= self.mask <= 255:
            raise ValueError(f"`mask` of the class {self.name} is {self.mask!r:.60}, expected a number from 1 to 255.")
        if self.how not in (NEW, REMOVED, STATED):
            raise ValueError(f"`how` of the class {self.name} is {self.how!r:.60}, expected 'new', 'removed' or ''.")
        if self.colour is not None:
            try:
                parts = len(ImageColor.getrgb(self.colour))
            except (ValueError, AttributeError):
                parts = 0
            if parts != 3:
                raise ValueError(
                    f"`colour` of the class {self.name} is {self.colour!r:.60}, expected one such as '#ff0000' (in "
                    "quotes) or red."
                )

    @property
    def count_column(self) -> str:
        """What its number is called among results: `roads`."""
        return _column(self.plural)

    @property
    def cells_column(self) -> str:
        """What its cells are called among results: `road_cells`."""
        return f"{_column(self.name)}_cells"


def _column(name: str) -> str:
    return re.sub("[ -]", "_", name)


@dataclass(frozen=True)
class Classes:
    """
    The classes of a data set, in the order in which answers name them.

    Args:
        each (`tuple[ChangeClass, ...]`): at least one; names, plurals and values differ.
        unchanged (`tuple[int, ...]`, *optional*): values in masks, beside 0, that mark no change, such as those of
            buildings without damage.

    Raises:
        ValueError: if they cannot be told apart.
    """

    each: tuple[ChangeClass, ...]
    unchanged: tuple[int, ...] = ()

    def __post_init__(self):
        if not self.each:
            raise ValueError("There are no classes: expected at least one.")
        words = [word for each in self for word in dict.fromkeys((each.name, each.plural))]
        columns = [name for each in self for name in (each.count_column, each.cells_column)]
        for what, found in (("name", words), ("column of results", columns)):
            if twice := sorted({name for name in found if found.count(name) > 1}):
                raise ValueError(f"Two classes have the same {what}: {', '.join(twice)}.")
        if taken := sorted(_TAKEN & {*words, *columns}):
            raise ValueError(f"A class cannot be called {', '.join(taken)}: results have a column or figure of it.")
        values = [*(each.mask for each in self), *self.unchanged]
        if not all(isinstance(value, int) and 0 <= value <= 255 for value in values):
            raise ValueError(f"`unchanged` is {list(self.unchanged)!r:.60}, expected numbers from 0 to 255.")
        if twice := sorted({str(value) for value in values if values.count(value) > 1}):
            raise ValueError(f"A value in masks stands for several things: {', '.join(twice)}.")

    def __iter__(self) -> Iterator[ChangeClass]:
        return iter(self.each)

    def __len__(self) -> int:
        return len(self.each)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self)

    @property
    def plurals(self) -> tuple[str, ...]:
        return tuple(each.plural for each in self)

    @property
    def values(self) -> dict[str, int]:
        """Of each name its value in masks."""
        return {each.name: each.mask for each in self}

    @property
    def columns(self) -> tuple[str, ...]:
        """What their numbers and then their cells are called among results."""
        return (*(each.count_column for each in self), *(each.cells_column for each in self))

    def to_dict(self) -> dict[str, Any]:
        """What a file says of them, see [`from_dict`]."""
        items = []
        for each in self:
            item: dict[str, Any] = {"name": each.name, "plural": each.plural, "mask": each.mask}
            item |= {} if each.colour is None else {"colour": each.colour}
            items.append(item | {REMOVED: {"removed": True}, STATED: {"new": False}}.get(each.how, {}))
        return {"classes": items, **({"unchanged": list(self.unchanged)} if self.unchanged else {})}

    @classmethod
    def from_dict(cls, content: Any) -> "Classes":
        """
        Reads what a file says: `classes`, a list of `name`, `plural` (by default the name and an s), `mask`, and if
        need be `colour`, `removed: true` or `new: false`; and perhaps `unchanged`, a list of further values in masks.

        Raises:
            ValueError: if it says anything else.
        """
        if not isinstance(content, Mapping) or not isinstance(content.get("classes"), list):
            raise ValueError("expected `classes: [{name: building, plural: buildings, mask: 255}, ...]`.")
        _refuse_unknown("beside `classes`", content, ("classes", "unchanged"))
        unchanged = content.get("unchanged") or []
        if not isinstance(unchanged, list):
            raise ValueError(f"`unchanged` is {unchanged!r:.60}, expected a list of values in masks.")
        return cls(tuple(map(_read_class, content["classes"])), tuple(unchanged))


ROADS_AND_BUILDINGS = Classes(
    (ChangeClass("road", "roads", ROAD, "#ffc400"), ChangeClass("building", "buildings", BUILDING, "#00aeff"))
)


def _read_class(item: Any) -> ChangeClass:
    if not isinstance(item, Mapping) or not {"name", "mask"} <= item.keys():
        raise ValueError(
            f"A class is {item!r:.80}, expected one like {{name: building, plural: buildings, mask: 255}}."
        )
    _refuse_unknown(f"of the class {item['name']!r:.60}", item, _KEYS)
    removed, new = item.get("removed", False), item.get("new", not item.get("removed"))
    if not isinstance(removed, bool) or not isinstance(new, bool) or (removed and new):
        raise ValueError(
            f"`removed` and `new` of the class {item['name']!r:.60} are true or false, and not both true."
        )
    how = REMOVED if removed else NEW if new else STATED
    return ChangeClass(item["name"], item.get("plural", f"{item['name']}s"), item["mask"], item.get("colour"), how)


def _refuse_unknown(where: str, content: Mapping, known: tuple[str, ...]) -> None:
    if unknown := [str(key) for key in content if key not in known]:
        raise ValueError(f"Unknown {where}: {', '.join(unknown)}; expected some of {', '.join(known)}.")


def read_classes(path: str | Path) -> Classes:
    """
    The classes of a YAML file, see [`Classes.from_dict`].

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of another form; the message names it.
    """
    try:
        return Classes.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error


def classes_in(folder: str | Path) -> Classes:
    """The classes that the file [`FILE`] in a folder names; without it roads and buildings."""
    path = Path(folder) / FILE
    return read_classes(path) if path.is_file() else ROADS_AND_BUILDINGS


def write_classes(folder: str | Path, classes: Classes) -> None:
    """Writes [`FILE`], unless the folder has these classes already; roads and buildings need none."""
    if classes_in(folder) != classes:
        content = yaml.safe_dump(classes.to_dict(), sort_keys=False, allow_unicode=True)
        write_text(Path(folder) / FILE, content)


def classes_of(config: Any) -> Classes:
    """
    The classes that a model learnt, by its configuration; roads and buildings where it does not say.

    Raises:
        ValueError: if what it says are no classes.
    """
    if config.change_classes is None:
        return ROADS_AND_BUILDINGS
    try:
        return Classes.from_dict(config.change_classes)
    except ValueError as error:
        raise ValueError(f"`change_classes` of the configuration: {error}") from error
