"""A run's figures, where they compare beside the published ones: JSON, Markdown and a page that opens offline."""

import html
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import datasets

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.rows import undecoded
from ..data.show import figure
from ..files import write_text
from .plots import make_plots
from .records import RECORDS, Entry
from .score import Case, unreadable
from .tables import make_tables, note_in_html

WORST = 8  # cases shown for each task

PAGE = Template("""<!doctype html>
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
.answer { color: #b00020 } .right { color: #0b5394 } .note { color: #555 }
</style>
<h1>$title</h1>
$body
</html>
""")


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


_UNITS_NOTE = "In percent, but for errors of counts."
_PUBLISHED_NOTE = "Published rows are the paper's, of the same test split; nobody here has reproduced them."
_UNPUBLISHED_NOTE = "The paper's figures are those of ChangeChat-105k's whole test split, and stand beside no others."


def write_report(
    folder: str | Path,
    systems: dict[str, dict[str, dict]],
    cases: list[Case],
    rows: datasets.Dataset,
    *,
    title: str,
    settings: dict[str, Any],
    models: Mapping[str, str] | None = None,
    records: Mapping[str, Sequence[Entry]] | None = None,
    published_tasks: Collection[str] = (),
    classes: Classes = ROADS_AND_BUILDINGS,
) -> list[Path]:
    """
    Writes `report.json`, `report.md` and `report.html`, and with `records` their file beside them.

    Args:
        folder (`str` or `Path`): where they go.
        systems (`dict`): see [`make_tables`].
        cases (`list[Case]`): of the first system.
        rows (`Dataset`): with images, for the worst cases.
        title (`str`).
        settings (`dict`): how the run was made, for the report's head.
        models (`dict`, *optional*): of each system that is a model its [`fingerprint`], by which `deltavlm publish`
            knows whose figures these are.
        records (`dict`, *optional*): of each system what its rows add to its figures, see [`make_records`]; for
            `records.json`, of which `deltavlm compare` makes differences.
        published_tasks (`Collection[str]`, *optional*), classes ([`Classes`], *optional*): see [`make_tables`].

    Returns:
        `list[Path]`: the three files.
    """
    folder = Path(folder)
    tables = make_tables(systems, published_tasks, classes)
    head = [f"{name}: {_setting(value)}" for name, value in settings.items()]
    (name, results), *_ = systems.items()
    sizes = [_size(task, figures) for task, figures in results.items() if "samples" in figures]
    intervals = list(_intervals(results))
    note = f"{_UNITS_NOTE} {_PUBLISHED_NOTE if published_tasks else _UNPUBLISHED_NOTE}"
    markdown = [f"# {title}", _list(head), "## Samples", _list(sizes), "## Figures", note]
    markdown += [table.markdown() for table in tables]
    if intervals:
        markdown += [f"## 95 % bootstrap confidence intervals, {name}", _list(intervals)]
    body = [f"{_list_in_html(head)}<h2>Samples</h2>{_list_in_html(sizes)}<h2>Figures</h2><p>{note_in_html(note)}</p>"]
    body += [table.html() for table in tables]
    if intervals:
        body.append(f"<h2>95 % bootstrap confidence intervals, {html.escape(name)}</h2>{_list_in_html(intervals)}")
    body.append(f'<h2>Plots</h2><div class="plots">{"".join(make_plots(results, classes))}</div>')
    body += _worst(cases, undecoded(rows))
    files = {
        "report.json": json.dumps(
            {
                "settings": settings,
                "published_tasks": list(published_tasks),
                "models": dict(models or {}),
                "systems": systems,
            },
            indent=1,
            ensure_ascii=False,
        ),
        "report.md": "\n\n".join(markdown) + "\n",
        "report.html": PAGE.substitute(title=html.escape(title), body="\n".join(body)),
    }
    if records is not None:
        write_text(folder / RECORDS, json.dumps(records))
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
    for number, (turn, answer) in enumerate(zip(row["turns"], case.answers, strict=True), start=1):
        right = " / ".join(case.references) if number == len(row["turns"]) else turn["answer"]
        question, answer, right = map(html.escape, (turn["question"], answer, right))
        lines.append(
            f'<p>{question}<br><span class="answer">{answer}</span><br><span class="right">{right}</span></p>'
        )
    heading = f"{html.escape(case.row['id'])} · score {case.score:.2f}"
    return f"<article><b>{heading}</b>{images}{''.join(lines)}</article>"
