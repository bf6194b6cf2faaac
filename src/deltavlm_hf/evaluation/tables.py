"""A run's figures as the paper's tables, where they compare beside the published ones."""

import html
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from . import published

HERE = "measured here"

Results = dict[str, dict]  # figures by task, of one system

_PROTOCOL_NOTE = (
    "The published captioning figures count GPT-2 ids or word ids (protocols gpt2-ids, levir-words), not words as the "
    "protocol coco does: compare only what was measured by the same."
)
_CIDER_NOTE = (
    "Where all pairs have the same references, as LEVIR-CC's unchanged ones do, CIDEr is 0 whatever is answered."
)
_LEVIR_CD_NOTE = (
    "The published F1 are of pixels of changed buildings on LEVIR-CD's official test split (tiles of 1024 pixels at "
    "0.5 m, cut to 256), by systems trained on its training split. Figures of other data do not compare with them."
)
_ALL_CLASSES_NOTE = (
    "Hits, misses and false alarms of all classes added up, over all pairs. miou: the mean IoU of unchanged pixels "
    "and of each class that the data mark; without unchanged: of these classes alone. accuracy: the share of all "
    "pixels that are right."
)
_AGREEMENT_NOTE = (
    "How often the model's words say what the rules read off its own masks, whether right or wrong. Rows of other "
    "tables that are read off its masks are of the same questions and right answers as those of its words."
)


@dataclass
class Table:
    """
    Rows of figures under named columns.

    Attributes:
        title (`str`).
        columns (`Sequence[str]`).
        rows (`list[tuple[str, Sequence, str]]`): system, figures (None where there is none) and where they come from.
        notes (`list[str]`).
    """

    title: str
    columns: Sequence[str]
    rows: list[tuple[str, Sequence[float | None], str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def cells(self) -> Iterator[list[str]]:
        for name, figures, source in self.rows:
            yield [name, *map(_show, figures), source]

    def markdown(self) -> str:
        lines = [f"### {self.title}", "", f"| system | {' | '.join(self.columns)} | source |"]
        lines.append(f"|---|{'---:|' * len(self.columns)}---|")
        lines += [f"| {' | '.join(cells)} |" for cells in self.cells()]
        return "\n".join([*lines, "", *(f"{note}\n" for note in self.notes)])

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in ("system", *self.columns, "source"))
        rows = "".join(
            f"<tr{' class=here' if cells[-1] == HERE else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for cells in self.cells()
        )
        notes = "".join(f'<p class="note">{note_in_html(note)}</p>' for note in self.notes)
        return f"<h3>{html.escape(self.title)}</h3><table><tr>{head}</tr>{rows}</table>{notes}"


def note_in_html(text: str) -> str:
    """A note's only Markdown are backticks."""
    return re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))


def _show(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def make_tables(
    systems: dict[str, Results], published_tasks: Collection[str] = (), classes: Classes = ROADS_AND_BUILDINGS
) -> list[Table]:
    """
    Args:
        systems (`dict[str, dict[str, dict]]`): figures by task, see [`evaluate_predictions`], by name of the system:
            the model first, baselines after it.
        published_tasks (`Collection[str]`, *optional*): the tasks beside whose figures the paper's stand, see
            [`published_tasks`]; by default none.
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.

    Returns:
        `list[Table]`: one for each of the paper's tables that there are figures for. In percent, but for counts.
    """
    tables = [
        *_text_tables(systems, "caption", "Captioning", published.CAPTION, published_tasks),
        *_text_tables(systems, "open", "Open questions", published.OPEN, published_tasks),
        *_exact_table(systems),
        *_yes_no_tables(systems, published_tasks),
        *_count_table(systems, published_tasks, classes.plurals),
        *_grid_tables(systems, published_tasks, classes.plurals),
        *_dialogue_table(systems),
        *_mask_tables(systems),
        *_agreement_table(systems, classes.plurals),
    ]
    return [table for table in tables if table.rows]


def _text_tables(
    systems: dict[str, Results], task: str, title: str, rows: Mapping[str, Sequence], published_tasks: Collection[str]
) -> Iterator[Table]:
    first = next(iter(systems.values())).get(task, {})
    for subset in ("all", "changed", "unchanged"):
        if subset not in first:
            continue
        table = Table(f"{title}, {subset} pairs ({first['protocol']})", published.CAPTION_COLUMNS)
        for name, figures in _having(systems, task, subset):
            table.rows.append((name, [_percent(figures[column]) for column in table.columns], HERE))
        if subset == "all" and task in published_tasks:
            table.rows += _published(rows)
            table.notes.append(_PROTOCOL_NOTE)
        if subset == "unchanged":
            table.notes.append(_CIDER_NOTE)
        yield table


def _exact_table(systems: dict[str, Results]) -> Iterator[Table]:
    table = Table("Open questions, word for word", ("exact",))
    table.rows = [(name, [100 * figures["exact"]], HERE) for name, figures in _having(systems, "open")]
    yield table


def _yes_no_tables(systems: dict[str, Results], published_tasks: Collection[str]) -> Iterator[Table]:
    columns = (*published.YES_NO_COLUMNS, "f0.5", "unparsed")
    asked = Table("Yes or no, asked", columns)
    read = Table("Yes or no, read off the caption", columns)
    for table, keys in ((asked, ("binary",)), (read, ("caption", "yes_no_from_captions"))):
        for name, figures in _having(systems, *keys):
            if "accuracy" in figures:
                shown = [100 * figures[column] for column in columns[:-1]]
                table.rows.append((name, [*shown, figures["unparsed"]], HERE))
    if read.rows and "caption" in published_tasks:
        read.rows += _published(published.YES_NO, empty=2)
        read.notes.append("The published figures were read off captions, by the authors' notebook.")
    yield from (asked, read)


def _count_table(
    systems: dict[str, Results], published_tasks: Collection[str], kinds: Sequence[str]
) -> Iterator[Table]:
    errors = [f"{kind} {figure}" for kind in kinds for figure in ("mae", "rmse")]
    table = Table("Counting", (*errors, *(f"{kind} exact %" for kind in kinds), "unparsed"))
    for name, figures in _having(systems, "count"):
        if kinds[0] in figures:
            shown = [figures[kind][figure] for kind in kinds for figure in ("mae", "rmse")]
            exact = [100 * figures[kind]["exact"] for kind in kinds]
            table.rows.append((name, [*shown, *exact, figures[kinds[0]]["unparsed"]], HERE))
    if table.rows and "count" in published_tasks:
        table.rows += _published(published.COUNT, empty=3)
    yield table


def _grid_tables(
    systems: dict[str, Results], published_tasks: Collection[str], kinds: Sequence[str]
) -> Iterator[Table]:
    for kind in kinds:
        table = Table(f"3x3 grid, {kind}", (*published.GRID_COLUMNS, "jaccard_empty_is_1", "hamming", "unparsed"))
        for name, figures in _having(systems, "grid", kind):
            shown = [100 * figures[column] for column in table.columns[:-1]]
            table.rows.append((name, [*shown, figures["unparsed"]], HERE))
            if not figures["recall"] and not any(figures["misses"]):
                table.notes = [f"No pair has {kind}: precision, recall, F1 and `jaccard` can be nothing but 0."]
        if table.rows and "grid" in published_tasks:
            table.rows += _published(published.GRID[kind], empty=3)
        table.notes.append("`jaccard` counts 0 for a pair with nothing in truth and answer, as the paper's does.")
        yield table


def _dialogue_table(systems: dict[str, Results]) -> Iterator[Table]:
    of_systems = list(_having(systems, "dialogue"))
    longest = max((len(figures["by_turn"]) for _, figures in of_systems), default=0)
    names = [f"turn {number + 1}" for number in range(longest)]
    table = Table("Dialogues", (*names, "all turns", "whole dialogue", "consistent", "unparsed"))
    for name, figures in of_systems:
        turns = [100 * value for value in figures["by_turn"]] + [None] * (longest - len(figures["by_turn"]))
        rest = [100 * figures["turns"], 100 * figures["whole"], _percent(figures.get("consistent"))]
        table.rows.append((name, [*turns, *rest, figures["unparsed"]], HERE))
    table.notes.append(
        "Share of turns answered right: as read by the grammar of their task, else word for word. Consistent: yes "
        "or no agrees with the same dialogue's counts. The paper has no figures for dialogues."
    )
    yield table


def _mask_tables(systems: dict[str, Results]) -> Iterator[Table]:
    of_systems = list(_having(systems, "masks"))
    columns = ("precision", "recall", "f1", "iou")
    for kind in dict.fromkeys(kind for _, figures in of_systems for kind in figures["classes"]):
        table = Table(f"Masks, pixels of class {kind}", columns)
        for name, figures in _having(systems, "masks", "classes", kind):
            table.rows.append((name, [_percent(figures[column]) for column in columns], HERE))
            if not figures["pixels"]:
                table.notes = ["The data mark no pixel of this class: all that was found of it is a false alarm."]
        if kind == "building":
            rows = published.LEVIR_CD.items()
            table.rows += [(name, [None, None, f1, None], source) for name, (f1, source) in rows]
            table.notes.append(_LEVIR_CD_NOTE)
        yield table
    table = Table("Masks, all classes", (*columns, "miou", "miou without unchanged", "accuracy"))
    for name, figures in of_systems:
        shown = [figures["all"][column] for column in columns]
        shown += [figures[column] for column in ("miou", "miou_of_classes", "accuracy")]
        table.rows.append((name, list(map(_percent, shown)), HERE))
    table.notes.append(_ALL_CLASSES_NOTE)
    yield table


def _agreement_table(systems: dict[str, Results], kinds: Sequence[str]) -> Iterator[Table]:
    wanted = [("binary", "all"), *((task, kind) for task in ("count", "grid") for kind in (*kinds, "all"))]
    names = ("yes or no", *(f"{task}, {kind}" for task, kind in wanted[1:]))
    table = Table("Words and masks of one model agree", names, notes=[_AGREEMENT_NOTE])
    for name, figures in _having(systems, "agreement"):
        table.rows.append((name, [_percent(figures.get(task, {}).get(kind)) for task, kind in wanted], HERE))
    yield table


def _having(systems: dict[str, dict], *keys: str) -> Iterator[tuple[str, dict]]:
    for name, results in systems.items():
        figures: Any = results
        for key in keys:
            figures = figures.get(key, {})
        if figures:
            yield name, figures


def _published(rows: Mapping[str, Sequence[float]], empty: int = 0) -> list[tuple[str, Sequence[float | None], str]]:
    return [(name, [*figures, *[None] * empty], published.SOURCE) for name, figures in rows.items()]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
