"""What the page says beside a model's own words: what answers mean, what the model learnt from, how programs ask."""

import os
import re
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import hf_hub_download

from ..data.classes import ROADS_AND_BUILDINGS, STATED, ChangeClass, Classes
from ..data.questions import classes_named, parse_count, parse_grid, parse_yes_no, question_task
from ..data.rules import CELLS
from ..data.words import join_words
from ..inference.loading import SHIPPED, name_model
from .overlay import css_colours

_TRAINED = re.compile(r"^##+ [^\n]*\btrain[^\n]*\n(.*?)(?=^##? |\Z)", re.IGNORECASE | re.MULTILINE | re.DOTALL)
_MARKS = re.compile(r"\*\*|`|\[([^]]*)\]\([^)]*\)")
_MOST_POINTS, _SHORT = 6, 90


def trained_on(model_path: str, revision: str | None = None) -> tuple[str, list[str]]:
    """
    What a model was trained on, as its card says, in plain text.

    Args:
        model_path (`str`): a folder or Hub id.
        revision (`str`, *optional*): of a Hub id.

    Returns:
        `tuple[str, list[str]]`: in short, which is what the card has in bold or begins with, and its points or
        paragraphs; both empty if there is no card, or nothing in it.
    """
    try:
        card = Path(model_path, "README.md")
        if not os.path.isdir(model_path):
            card = Path(hf_hub_download(model_path, "README.md", revision=revision))
        found = _TRAINED.search(card.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no card, no network, a name that is none
        found = None
    if found is None:
        return "", []
    parts = re.split(r"\n\s*\n|^- ", found[1], flags=re.MULTILINE)
    points = [
        " ".join(_MARKS.sub(r"\1", part).split()) for part in parts if not part.lstrip().startswith(("|", "```"))
    ]
    points = [point for point in points if point][:_MOST_POINTS]
    bold = [text.strip(". ") for text in re.findall(r"\*\*(.+?)\*\*", found[1])]
    return textwrap.shorten("; ".join(bold or points[:1]), _SHORT, placeholder=" …"), points


def cells_so_far(answer: str, classes: Classes = ROADS_AND_BUILDINGS) -> tuple[np.ndarray, ...] | None:
    """The cells that an answer has named, though it may not be whole yet, see [`parse_grid`]."""
    whole = answer[: max(map(answer.rfind, ",[]")) + 1].rstrip(",")
    if whole.count("[") > whole.count("]"):
        whole += "]"
    if "[" in whole:
        named = classes_named(whole, classes)
        whole += "".join(f" {each.plural}: []" for each in classes if each not in named)
    return parse_grid(whole, classes)


def cells_to_draw(grid: Sequence[np.ndarray], classes: Classes = ROADS_AND_BUILDINGS) -> list[dict[str, Any]]:
    """For the page: numbers of cells, row by row, of each class."""
    colours = css_colours(classes.names, classes)
    return [
        {"kind": kind, "colour": colours[kind], "cells": np.flatnonzero(cells).tolist()}
        for kind, cells in zip(classes.names, grid, strict=True)
    ]


def explain_answer(question: str, answer: str, classes: Classes = ROADS_AND_BUILDINGS) -> str:
    """What a whole answer to one of the fixed questions means; nothing for one in the model's own words."""
    task = question_task(question, classes)
    if (grid := parse_grid(answer, classes)) is not None:
        named = [
            f"{kind} in the {_names(cells)}" for kind, cells in zip(classes.plurals, grid, strict=True) if cells.any()
        ]
        if not named:
            return "No cell of the 3 x 3 grid has a change."
        return f"Framed in the image: {join_words(named)}."
    if task == "binary" and (changed := parse_yes_no(answer)) is not None:
        if changed:
            return "The model sees a change. Ask “How many?” or “Where?” for more."
        return "The model sees no change of the kinds it knows."
    if task == "count" and (counts := parse_count(answer, classes)) is not None:
        if not any(counts):
            return f"The model counts {join_words([f'no {_changed(each)}{each.name}' for each in classes])}."
        counted = [
            f"{number} {_changed(each)}{each.name if number == 1 else each.plural}"
            for number, each in zip(counts, classes, strict=True)
        ]
        return f"The model counts {join_words(counted)}."
    if task in ("binary", "count", "grid"):
        return "This answer is not in the form that was asked for; take it as a sign that the model is lost here."
    return ""


def _changed(each: ChangeClass) -> str:
    return "" if each.how == STATED else "changed "


def _names(cells: np.ndarray) -> str:
    names = [
        CELLS[number].replace("center-center", "middle").replace("center", "middle").replace("-", " ")
        for number in np.flatnonzero(cells)
    ]
    return join_words(names)


def explain_scan(
    grids: Sequence[Sequence[np.ndarray] | None], tiles: int, classes: Classes = ROADS_AND_BUILDINGS
) -> str:
    """What came of the tiles so far."""
    read = [grid for grid in grids if grid is not None]
    parts = [f"{len(grids)} of {tiles} tiles asked"]
    for number, kind in enumerate(classes.plurals):
        parts.append(f"{kind} changed in {sum(bool(grid[number].any()) for grid in read)}")
    if len(read) < len(grids):
        parts.append(f"{len(grids) - len(read)} gave no answer that can be drawn")
    return ", ".join(parts) + "."


def join_grids(
    grids: Sequence[Sequence[np.ndarray] | None], across: int, classes: Classes = ROADS_AND_BUILDINGS
) -> list[np.ndarray]:
    """The cells of all tiles, row by row, as those of one grid `(3 * across)` cells wide."""
    # Class, row of tiles, of cells, column of tiles, of cells.
    joined = np.zeros((len(classes), across, 3, across, 3), bool)
    for number, grid in enumerate(grids):
        if grid is not None:
            joined[:, number // across, :, number % across] = np.stack(grid).reshape(-1, 3, 3)
    return [*joined.reshape(len(classes), -1)]


def snippets(model_path: str, before: str, after: str, question: str, seed: int | None = None) -> dict[str, str]:
    """
    How to ask the same by program. In place of the page's own address stands `ADDRESS`.

    Args:
        model_path (`str`): a folder or Hub id.
        before, after (`str`): names of the files.
        question (`str`): the question.
        seed (`int`, *optional*): of a generated pair, which is written to the files first.
    """
    name = name_model(model_path)
    if name in SHIPPED:
        source, option = f"deltavlm_hf.{name}()", name
    else:
        source, option = repr(name), shlex.quote(name)
    made = command_made = ""
    if seed is not None:
        made = (
            "from PIL import Image\n"
            "from deltavlm_hf.data.scenes import generate_scene\n\n"
            f"scene = generate_scene({seed}, 256)\n"
            f"Image.fromarray(scene.before).save({before!r})\n"
            f"Image.fromarray(scene.after).save({after!r})\n\n"
        )
        command_made = "# the files: see Python\n"
    return {
        "Python": "import deltavlm_hf\n"
        "from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        f"{made or chr(10)}"
        f"model = AutoModelForImageTextToText.from_pretrained({source})\n"
        f"processor = AutoProcessor.from_pretrained({source})\n"
        f"session = deltavlm_hf.ChangeSession(model, processor, {before!r}, {after!r})\n"
        f"print(session.ask({question!r}))",
        "API": "from gradio_client import Client, handle_file\n"
        f"{made or chr(10)}"
        'client = Client("ADDRESS")\n'
        f"pair = handle_file({before!r}), handle_file({after!r})\n"
        f'print(client.predict(*pair, {question!r}, api_name="/ask"))',
        "Command line": f"{command_made}deltavlm ask {shlex.join([before, after, question])} --model {option}",
    }
