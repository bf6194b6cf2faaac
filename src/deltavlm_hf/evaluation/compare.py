"""Systems beside each other: each figure, its difference to the first system's, and how sure that is."""

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import write_text
from .metrics import CONFIDENCE, RESAMPLES, figure_of
from .records import RECORDS, Entry
from .report import PAGE

_METEOR = "METEOR"
_NO_INTERVAL = "no interval"
_AS_THEY_ARE = ("mae", "rmse")  # not shares
NOTES = (
    "In percent (CIDEr times 100), but for errors of counts (mae, rmse). A difference is that to the first system, "
    "with its 95 % interval: a paired bootstrap over pairs of images, both systems on the same 1,000 draws. One whose "
    "interval does not hold 0 is in bold; among many figures, one in twenty is by chance.",
    "METEOR has no interval: its sums are made in Java, not kept by pair. CIDEr's word weights are held fixed.",
)


@dataclass
class System:
    """
    One system of a report.

    Attributes:
        name (`str`): what it is called in the comparison.
        figures (`dict`): its figures in the report, by task.
        entries (`list[Entry]`): what each of its records adds to them.
    """

    name: str
    figures: dict[str, dict]
    entries: list[Entry]


@dataclass
class Comparison:
    """
    Attributes:
        systems (`list[str]`).
        pairs (`int`): of images.
        rows (`list[tuple[str, list[float | None], list[tuple[float, float, float] | None]]]`): a figure's name, its
            value for each system (None: not measured), and for each but the first the difference with the ends of its
            interval (NaN where there is none).
    """

    systems: list[str]
    pairs: int
    rows: list[tuple[str, list[float | None], list[tuple[float, float, float] | None]]] = field(default_factory=list)

    def markdown(self) -> str:
        head, *lines = self._cells()
        table = [head, ["---", *["---:"] * (len(head) - 1)], *lines]
        return "\n".join([*(f"| {' | '.join(cells)} |" for cells in table), "", *(f"{note}\n" for note in NOTES)])

    def html(self) -> str:
        head, *lines = self._cells()
        rows = [f"<tr>{''.join(f'<th>{html.escape(name)}</th>' for name in head)}</tr>"]
        for cells in lines:
            marked = [
                f"<b>{html.escape(cell.strip('*'))}</b>" if cell.startswith("**") else html.escape(cell)
                for cell in cells
            ]
            rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in marked)}</tr>")
        notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in NOTES)
        return PAGE.substitute(title=html.escape(self.title), body=f"<table>{''.join(rows)}</table>{notes}")

    @property
    def title(self) -> str:
        return f"{', '.join(self.systems)}: {self.pairs} pairs"

    def _cells(self) -> list[list[str]]:
        first, *others = self.systems
        found = [["figure", first, *(cell for name in others for cell in (name, "difference"))]]
        for name, values, differences in self.rows:
            cells = [name, _show(name, values[0])]
            for value, difference in zip(values[1:], differences, strict=True):
                cells += [_show(name, value), _show_difference(name, difference)]
            found.append(cells)
        return found


def compare(reports: Sequence[str | Path], resamples: int = RESAMPLES) -> Comparison:
    """
    Sets the first systems of several reports beside each other, or all systems of one.

    Args:
        reports (`Sequence[str | Path]`): each `report.json`, or the folder of it.
        resamples (`int`, *optional*, defaults to 1000): draws of the bootstrap.

    Raises:
        FileNotFoundError: if there is no report, or its `records.json` is missing.
        ValueError: if one is damaged, or they are not of the same questions with the same right answers.
    """
    read = [_read(Path(report)) for report in reports]
    systems = read[0] if len(read) == 1 else [found[0] for found in read]
    if len(systems) < 2:
        raise ValueError(f"{reports[0]} has one system, {systems[0].name}: name another report to compare it with.")
    names = [system.name for system in systems]
    if len({*names}) < len(names):
        names = [f"{system.name} ({report})" for system, report in zip(systems, reports, strict=True)]
    first = systems[0]
    found = Comparison(names, len({pair for _, pair, _, _ in first.entries}))
    draws = np.random.default_rng(0).multinomial(found.pairs, np.full(found.pairs, 1 / found.pairs), size=resamples)
    for task in dict.fromkeys(task for system in systems for task, *_ in system.entries):
        having = [system for system in systems if any(entry[0] == task for entry in system.entries)]
        pairs = _pairs_of(having, task, first)
        total = max(found.pairs, 1 + max(pairs))
        for name in dict.fromkeys(name for system in having for entry in _of(system, task) for name in entry[3]):
            sums = [_sums(_of(system, task), name, pairs, total) for system in systems]
            values = [None if each is None else float(figure_of(name, each.sum(0))) for each in sums]
            differences = [_difference(name, sums[0], each, draws) for each in sums[1:]]
            found.rows.append((f"{task}: {name}", values, differences))
            if name == "all ROUGE-L":
                found.rows += _meteor(task, systems)
    return found


def write_comparison(found: Comparison, folder: str | Path) -> list[Path]:
    """Writes `comparison.md` and `comparison.html`."""
    folder = Path(folder)
    write_text(folder / "comparison.md", f"# {found.title}\n\n{found.markdown()}")
    write_text(folder / "comparison.html", found.html())
    return [folder / "comparison.md", folder / "comparison.html"]


def _read(path: Path) -> list[System]:
    report = path / "report.json" if path.is_dir() else path
    if not report.exists():
        raise FileNotFoundError(f"{report} does not exist; `deltavlm evaluate` writes it.")
    records = report.with_name(RECORDS)
    if not records.exists():
        raise FileNotFoundError(
            f"{records} is missing, which says what each pair adds: the report is of an earlier version, or was moved "
            "without it. Run the same `deltavlm evaluate` again: its answers are kept, nothing is asked again."
        )
    try:
        figures = json.loads(report.read_text(encoding="utf-8"))["systems"]
        entries = json.loads(records.read_text(encoding="utf-8"))
        systems = [System(name, figures[name], list(map(_entry, each))) for name, each in entries.items()]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{report} or {records.name} beside it is damaged: {error!r:.200}") from error
    if not systems or not all(system.entries for system in systems):
        raise ValueError(f"{records} has no records.")
    return systems


def _entry(stored: Sequence) -> Entry:
    task, pair, asked, parts = stored
    return str(task), int(pair), str(asked), {name: list(map(float, numbers)) for name, numbers in parts.items()}


def _of(system: System, task: str) -> list[Entry]:
    return [entry for entry in system.entries if entry[0] == task]


def _pairs_of(systems: Sequence[System], task: str, first: System) -> list[int]:
    """
    The pair of each record of a task, numbered from 0 among all pairs of the first system, after a look at whether the
    same was asked of all systems that have the task, and held against the same right answers.
    """
    known, *others = systems
    asked = [entry[2] for entry in _of(known, task)]
    for other in others:
        theirs = [entry[2] for entry in _of(other, task)]
        if theirs != asked:
            raise ValueError(
                f"{known.name} and {other.name} are not measured on the same: {len(asked)} and {len(theirs)} records "
                f"of the task {task}, {len({*asked} & {*theirs})} of them alike in question and right answer. "
                "Evaluate both with the same data, split and limit."
            )
    everything = first.entries if known is first else known.entries
    number_of = {pair: number for number, pair in enumerate(dict.fromkeys(entry[1] for entry in everything))}
    return [number_of[entry[1]] for entry in _of(known, task)]


def _sums(entries: Sequence[Entry], name: str, pairs: Sequence[int], total: int) -> np.ndarray | None:
    """`(total, n)`: what each pair of images adds to the sums of a figure."""
    # There are no entries of a system that lacks the task.
    added = [(pair, entry[3][name]) for entry, pair in zip(entries, pairs, strict=False) if name in entry[3]]
    if not added:
        return None
    sums = np.zeros((total, len(added[0][1])))
    np.add.at(sums, [pair for pair, _ in added], np.array([parts for _, parts in added], float))
    return sums


def _difference(
    name: str, first: np.ndarray | None, other: np.ndarray | None, draws: np.ndarray
) -> tuple[float, float, float] | None:
    if first is None or other is None:
        return None
    drawn = figure_of(name, draws @ other) - figure_of(name, draws @ first)
    low, high = np.quantile(drawn, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(figure_of(name, other.sum(0)) - figure_of(name, first.sum(0))), float(low), float(high)


def _meteor(task: str, systems: Sequence[System]) -> list[tuple[str, list, list]]:
    values = [system.figures.get(task, {}).get("all", {}).get(_METEOR) for system in systems]
    if values[0] is None:
        return []
    nan = float("nan")
    differences = [None if value is None else (value - values[0], nan, nan) for value in values[1:]]
    return [(f"{task}: all {_METEOR}", values, differences)]


def _show(name: str, value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    return f"{value:{sign}.3f}" if name.endswith(_AS_THEY_ARE) else f"{100 * value:{sign}.2f}"


def _show_difference(name: str, difference: tuple[float, float, float] | None) -> str:
    if difference is None:
        return "–"
    value, low, high = (_show(name, each, "+") for each in difference)
    if np.isnan(difference[1]):
        return f"{value} ({_NO_INTERVAL})"
    shown = f"{value} ({low} to {high})"
    return f"**{shown}**" if difference[1] > 0 or difference[2] < 0 else shown
