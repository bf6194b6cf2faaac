"""A run's figures, where they compare beside the published ones: JSON, Markdown and a page that opens offline."""

import base64
import html
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import datasets
import numpy as np

from ..data.rows import undecoded
from ..data.rules import CELLS
from ..data.show import figure
from ..files import write_text
from . import published
from .score import Case, unreadable

WORST = 8  # cases shown for each task
HERE = "measured here"

_PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1.5rem auto; max-width: 70rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .5rem 0 1rem; font-variant-numeric: tabular-nums }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, td:last-child { text-align: left }
tr.here { background: #e8f1fb; font-weight: 600 }
.plots, .images { display: flex; flex-wrap: wrap; gap: 1rem }
.plots img { max-width: 100% }
article { border-top: 1px solid #ddd; padding: .5rem 0 }
figure { margin: 0 } figcaption { font-size: .8rem; color: #666 }
.said { color: #b00020 } .right { color: #0b5394 } .note { color: #555 }
</style>
<h1>$title</h1>
$body
</html>
""")


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
        notes = "".join(f'<p class="note">{_in_html(note)}</p>' for note in self.notes)
        return f"<h3>{html.escape(self.title)}</h3><table><tr>{head}</tr>{rows}</table>{notes}"


def _in_html(text: str) -> str:
    """A note's only Markdown are backticks."""
    return re.sub("`(.+?)`", r"<code>\1</code>", html.escape(text))


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _list_in_html(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _setting(value: Any) -> str:
    if isinstance(value, Mapping):
        value = [f"{name}={each}" for name, each in value.items()]
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def _show(value: float | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def make_tables(systems: dict[str, dict[str, dict]], published_tasks: Collection[str] = ()) -> list[Table]:
    """
    Args:
        systems (`dict[str, dict[str, dict]]`): figures by task, see [`evaluate_predictions`], by name of the system:
            the model first, baselines after it.
        published_tasks (`Collection[str]`, *optional*): the tasks beside whose figures the paper's stand, see
            [`published_tasks`]; by default none.

    Returns:
        `list[Table]`: one for each of the paper's tables that there are figures for. In percent, but for counts.
    """
    (first, *_) = systems.values()
    tables = []
    for task, title, rows in (
        ("caption", "Captioning", published.CAPTION),
        ("open", "Open questions", published.OPEN),
    ):
        if task not in first:
            continue
        protocol = first[task]["protocol"]
        for subset in ("all", "changed", "unchanged"):
            if subset not in first[task]:
                continue
            table = Table(f"{title}, {subset} pairs ({protocol})", published.CAPTION_COLUMNS)
            for name, figures in _having(systems, task, subset):
                table.rows.append((name, [_percent(figures[column]) for column in table.columns], HERE))
            if subset == "all" and task in published_tasks:
                table.rows += _published(rows)
                table.notes.append(_PROTOCOL_NOTE)
            if subset == "unchanged":
                table.notes.append(_CIDER_NOTE)
            tables.append(table)
    if "open" in first:
        table = Table("Open questions, word for word", ("exact",))
        table.rows = [(name, [100 * results["open"]["exact"]], HERE) for name, results in systems.items()]
        tables.append(table)
    for key, title in (
        (("binary",), "Yes or no, asked"),
        (("caption", "yes_no_from_captions"), "Yes or no, read off the caption"),
    ):
        table = Table(title, (*published.YES_NO_COLUMNS, "f0.5", "unparsed"))
        for name, figures in _having(systems, *key):
            if "accuracy" in figures:
                shown = [100 * figures[column] for column in table.columns[:-1]]
                table.rows.append((name, [*shown, figures["unparsed"]], HERE))
        if table.rows:
            if key == ("caption", "yes_no_from_captions") and "caption" in published_tasks:
                table.rows += _published(published.YES_NO, empty=2)
                table.notes.append("The published figures were read off captions, by the authors' notebook.")
            tables.append(table)
    table = Table("Counting", (*published.COUNT_COLUMNS, "roads exact %", "buildings exact %", "unparsed"))
    for name, figures in _having(systems, "count"):
        if "roads" in figures:
            errors = [figures[kind][figure] for kind in ("roads", "buildings") for figure in ("mae", "rmse")]
            exact = [100 * figures[kind]["exact"] for kind in ("roads", "buildings")]
            table.rows.append((name, [*errors, *exact, figures["roads"]["unparsed"]], HERE))
    if table.rows:
        if "count" in published_tasks:
            table.rows += _published(published.COUNT, empty=3)
        tables.append(table)
    for kind in ("roads", "buildings"):
        table = Table(f"3x3 grid, {kind}", (*published.GRID_COLUMNS, "jaccard_empty_is_1", "hamming", "unparsed"))
        for name, figures in _having(systems, "grid"):
            if kind in figures:
                shown = [100 * figures[kind][column] for column in table.columns[:-1]]
                table.rows.append((name, [*shown, figures[kind]["unparsed"]], HERE))
        if table.rows:
            if "grid" in published_tasks:
                table.rows += _published(published.GRID[kind], empty=3)
            table.notes.append("`jaccard` counts 0 for a pair with nothing in truth and answer, as the paper's does.")
            tables.append(table)
    if "dialogue" in first:
        longest = max(len(results["dialogue"]["by_turn"]) for _, results in _all(systems, "dialogue"))
        names = [f"turn {number + 1}" for number in range(longest)]
        table = Table("Dialogues", (*names, "all turns", "whole dialogue", "consistent", "unparsed"))
        for name, results in _all(systems, "dialogue"):
            figures = results["dialogue"]
            turns = [100 * value for value in figures["by_turn"]] + [None] * (longest - len(figures["by_turn"]))
            rest = [100 * figures["turns"], 100 * figures["whole"], _percent(figures.get("consistent"))]
            table.rows.append((name, [*turns, *rest, figures["unparsed"]], HERE))
        table.notes.append(
            "Share of turns answered right: as read by the grammar of their task, else word for word. Consistent: yes "
            "or no agrees with the same dialogue's counts. The paper has no figures for dialogues."
        )
        tables.append(table)
    return tables


_UNITS_NOTE = "In percent, but for errors of counts."
_PUBLISHED_NOTE = "Published rows are the paper's, of the same test split; nobody here has reproduced them."
_UNPUBLISHED_NOTE = "The paper's figures are those of ChangeChat-105k's whole test split, and stand beside no others."
_PROTOCOL_NOTE = (
    "The published captioning figures count GPT-2 ids or word ids (protocols gpt2-ids, levir-words), not words as the "
    "protocol coco does: compare only what was measured by the same."
)
_CIDER_NOTE = (
    "Where all pairs have the same references, as LEVIR-CC's unchanged ones do, CIDEr is 0 whatever is answered."
)


def _having(systems: dict[str, dict], *keys: str) -> Iterator[tuple[str, dict]]:
    for name, results in systems.items():
        figures: Any = results
        for key in keys:
            figures = figures.get(key, {})
        if figures:
            yield name, figures


def _all(systems: dict[str, dict], task: str) -> list[tuple[str, dict]]:
    return [(name, results) for name, results in systems.items() if task in results]


def _published(rows: Mapping[str, Sequence[float]], empty: int = 0) -> list[tuple[str, Sequence[float | None], str]]:
    return [(name, [*figures, *[None] * empty], published.SOURCE) for name, figures in rows.items()]


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def write_report(
    folder: str | Path,
    systems: dict[str, dict[str, dict]],
    cases: list[Case],
    rows: datasets.Dataset,
    *,
    title: str,
    settings: dict[str, Any],
    published_tasks: Collection[str] = (),
) -> list[Path]:
    """
    Writes `report.json`, `report.md` and `report.html`.

    Args:
        folder (`str` or `Path`): where they go.
        systems (`dict`): see [`make_tables`].
        cases (`list[Case]`): of the first system.
        rows (`Dataset`): with images, for the worst cases.
        title (`str`).
        settings (`dict`): how the run was made, for the report's head.
        published_tasks (`Collection[str]`, *optional*): see [`make_tables`].

    Returns:
        `list[Path]`: the three files.
    """
    folder = Path(folder)
    tables = make_tables(systems, published_tasks)
    head = [f"{name}: {_setting(value)}" for name, value in settings.items()]
    (name, results), *_ = systems.items()
    sizes = [_size(task, figures) for task, figures in results.items()]
    intervals = list(_intervals(results))
    note = f"{_UNITS_NOTE} {_PUBLISHED_NOTE if published_tasks else _UNPUBLISHED_NOTE}"
    markdown = [f"# {title}", _list(head), "## Samples", _list(sizes), "## Figures", note]
    markdown += [table.markdown() for table in tables]
    if intervals:
        markdown += [f"## 95 % bootstrap confidence intervals, {name}", _list(intervals)]
    body = [f"{_list_in_html(head)}<h2>Samples</h2>{_list_in_html(sizes)}<h2>Figures</h2><p>{_in_html(note)}</p>"]
    body += [table.html() for table in tables]
    if intervals:
        body.append(f"<h2>95 % bootstrap confidence intervals, {html.escape(name)}</h2>{_list_in_html(intervals)}")
    body.append(f'<h2>Plots</h2><div class="plots">{"".join(_plots(results))}</div>')
    body += _worst(cases, undecoded(rows))
    files = {
        "report.json": json.dumps(
            {"settings": settings, "published_tasks": list(published_tasks), "systems": systems},
            indent=1,
            ensure_ascii=False,
        ),
        "report.md": "\n\n".join(markdown) + "\n",
        "report.html": _PAGE.substitute(title=html.escape(title), body="\n".join(body)),
    }
    for file, content in files.items():
        write_text(folder / file, content)
    return [folder / file for file in files]


def _size(task: str, figures: dict) -> str:
    parts = [f"{figures['samples']} samples"]
    if figures["failed"]:
        parts.append(f"{figures['failed']} without an answer, counted as wrong")
    if figures["unreadable_truths"]:
        parts.append(f"{figures['unreadable_truths']} left out: their right answer cannot be read")
    return f"{task}: {'; '.join(parts)}"


def _intervals(figures: dict, name: str = "") -> Iterator[str]:
    for key, value in figures.items():
        if key == "intervals":
            for figure_name, (low, high) in value.items():
                yield f"{name} {figure_name}: {low:.3f} to {high:.3f}".strip()
        elif isinstance(value, dict):
            yield from _intervals(value, f"{name} {key}".strip())


def _plots(results: dict[str, dict]) -> Iterator[str]:
    from matplotlib.figure import Figure

    def plot(title: str, draw, width: float = 3.6) -> str:
        canvas = Figure(figsize=(width, 3.2), layout="constrained")
        axes = canvas.subplots()
        draw(axes)
        axes.set_title(title, fontsize=10)
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=110)
        data = base64.b64encode(buffer.getvalue()).decode("ascii")
        return f'<img src="data:image/png;base64,{data}" alt="{html.escape(title)}">'

    if "accuracy" in results.get("binary", {}):
        figures = results["binary"]
        matrix = np.array(
            [
                [figures["true_negatives"], figures["false_positives"]],
                [figures["false_negatives"], figures["true_positives"]],
            ]
        )

        def confusion(axes) -> None:
            axes.imshow(matrix, cmap="Blues")
            for (row, column), value in np.ndenumerate(matrix):
                colour = "white" if value > matrix.max() / 2 else "black"
                axes.text(column, row, str(value), ha="center", va="center", color=colour)
            axes.set_xticks((0, 1), ("no", "yes"))
            axes.set_yticks((0, 1), ("unchanged", "changed"))
            axes.set_xlabel("answer")

        yield plot("Yes or no", confusion)
    for kind in ("roads", "buildings"):
        pairs = [pair for pair in results.get("count", {}).get(kind, {}).get("pairs", ()) if pair[1] is not None]
        if pairs:

            def scatter(axes, pairs=pairs) -> None:
                points, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
                axes.scatter(points[:, 0], points[:, 1], s=12 + 200 * counts / counts.max(), alpha=0.6)
                limit = max(points.max(), 1)
                axes.plot((0, limit), (0, limit), color="grey", linewidth=1)
                axes.set_xlabel("right number")
                axes.set_ylabel("answer")

            yield plot(f"Counts, {kind}", scatter)
        misses = results.get("grid", {}).get(kind, {}).get("misses")
        if misses:

            def heat(axes, misses=misses) -> None:
                axes.imshow(np.array(misses).reshape(3, 3), cmap="Reds", vmin=0)
                for cell, (name, value) in enumerate(zip(CELLS, misses, strict=True)):
                    axes.text(cell % 3, cell // 3, f"{name}\n{value}", ha="center", va="center", fontsize=7)
                axes.set_xticks(())
                axes.set_yticks(())

            yield plot(f"Cells missed, {kind}", heat)
    for task in ("caption", "open"):
        if task in results:
            for title, key in (("length in words", "lengths"), ("ROUGE-L", "each_rouge_l")):

                def histogram(axes, values=results[task][key]) -> None:
                    axes.hist(values, bins=20)
                    axes.set_ylabel("answers")

                yield plot(f"{task}: {title}", histogram)


def _worst(cases: list[Case], rows: datasets.Dataset) -> Iterator[str]:
    for task in dict.fromkeys(case.row["task"] for case in cases):
        of_task = [case for case in cases if case.row["task"] == task and not unreadable(case)]
        yield f"<h2>Worst cases: {task}</h2>"
        for case in sorted(of_task, key=lambda case: case.score)[:WORST]:
            yield _article(case, rows)


def _article(case: Case, rows: datasets.Dataset) -> str:
    row = rows[case.index]
    images = f'<div class="images">{figure("before", row["before"])}{figure("after", row["after"])}</div>'
    if case.error is not None:
        images += f"<p>No answer: {html.escape(case.error)}</p>"
    lines = []
    for number, turn in enumerate(case.row["turns"]):
        last = number == len(case.row["turns"]) - 1
        right = " / ".join(case.references) if last else turn["answer"]
        lines.append(
            f'<p>{html.escape(turn["question"])}<br><span class="said">{html.escape(case.answers[number])}</span><br>'
            f'<span class="right">{html.escape(right)}</span></p>'
        )
    heading = f"{html.escape(case.row['id'])} · score {case.score:.2f}"
    return f"<article><b>{heading}</b>{images}{''.join(lines)}</article>"
