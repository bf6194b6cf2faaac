"""A run's figures as pictures within a page."""

import html
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.rules import CELLS
from ..data.show import data_url


def make_plots(results: dict[str, dict], classes: Classes = ROADS_AND_BUILDINGS) -> Iterator[str]:
    """
    Pictures as HTML, of one system's figures by task, see [`evaluate_predictions`]: right and wrong yes and no, counts
    beside the right ones, missed cells, lengths and scores of texts.
    """
    if "accuracy" in results.get("binary", {}):
        yield _plot("Yes or no", _confusion, results["binary"])
    for kind in classes.plurals:
        pairs = [pair for pair in results.get("count", {}).get(kind, {}).get("pairs", ()) if pair[1] is not None]
        if pairs:
            yield _plot(f"Counts, {kind}", _scatter, pairs)
        misses = results.get("grid", {}).get(kind, {}).get("misses")
        if misses:
            yield _plot(f"Cells missed, {kind}", _heat, misses)
    for task in ("caption", "open"):
        if task in results:
            for title, key in (("length in words", "lengths"), ("ROUGE-L", "each_rouge_l")):
                yield _plot(f"{task}: {title}", _histogram, results[task][key])


def _plot(title: str, draw: Callable[[Any, Any], None], values: Any) -> str:
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(3.6, 3.2), layout="constrained")
    axes = canvas.subplots()
    draw(axes, values)
    axes.set_title(title, fontsize=10)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", dpi=110)
    return f'<img src="{data_url(buffer.getvalue())}" alt="{html.escape(title)}">'


def _confusion(axes, figures: dict) -> None:
    truths = ("true_negatives", "false_positives"), ("false_negatives", "true_positives")
    matrix = np.array([[figures[name] for name in row] for row in truths])
    axes.imshow(matrix, cmap="Blues")
    for (row, column), value in np.ndenumerate(matrix):
        colour = "white" if value > matrix.max() / 2 else "black"
        axes.text(column, row, str(value), ha="center", va="center", color=colour)
    axes.set_xticks((0, 1), ("no", "yes"))
    axes.set_yticks((0, 1), ("unchanged", "changed"))
    axes.set_xlabel("answer")


def _scatter(axes, pairs: list) -> None:
    points, counts = np.unique(np.array(pairs), axis=0, return_counts=True)
    axes.scatter(points[:, 0], points[:, 1], s=12 + 200 * counts / counts.max(), alpha=0.6)
    limit = max(points.max(), 1)
    axes.plot((0, limit), (0, limit), color="grey", linewidth=1)
    axes.set_xlabel("right number")
    axes.set_ylabel("answer")


def _heat(axes, misses: list) -> None:
    axes.imshow(np.array(misses).reshape(3, 3), cmap="Reds", vmin=0)
    for cell, (name, value) in enumerate(zip(CELLS, misses, strict=True)):
        axes.text(cell % 3, cell // 3, f"{name}\n{value}", ha="center", va="center", fontsize=7)
    axes.set_xticks(())
    axes.set_yticks(())


def _histogram(axes, values: list) -> None:
    axes.hist(values, bins=20)
    axes.set_ylabel("answers")
