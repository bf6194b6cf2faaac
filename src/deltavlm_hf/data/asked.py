"""What is asked under a task's name, and what the answer means."""

from typing import Any

from .classes import ROADS_AND_BUILDINGS, Classes
from .questions import TASKS, parse_count, parse_grid, parse_yes_no, question_task, wording
from .rules import CELLS


def meanings(classes: Classes = ROADS_AND_BUILDINGS) -> tuple[str, ...]:
    """What [`meaning_of`] may say: whether a pair changed, and of each class its number and its cells."""
    return ("changed", *classes.columns)


def questions_of(text: str, classes: Classes = ROADS_AND_BUILDINGS) -> tuple[str, ...]:
    """
    The turns that a text stands for: a task's name for its fixed instruction, `dialogue` for the fixed dialogue of
    three turns; any other text for itself.

    Args:
        text (`str`): what is to be asked.
        classes ([`Classes`], *optional*): that the model knows, see [`classes_of`]; by default roads and buildings.

    Raises:
        ValueError: if there is no text, or for `open`, which has no fixed question.
    """
    text = text.strip()
    if not text:
        raise ValueError("A question is empty: write one, or the name of a task.")
    if text == "open":
        raise ValueError("The task `open` has no fixed question: write one of your own.")
    words = wording(classes)
    if text == "dialogue":
        return (words.instructions["binary"], *words.follow_ups)
    return (words.instructions[text],) if text in TASKS else (text,)


def meaning_of(question: str, answer: str, classes: Classes = ROADS_AND_BUILDINGS) -> dict[str, Any]:
    """
    What an answer says, by the parsers of the question's task: `changed` of yes or no, the number of each class, such
    as `roads` and `buildings`, and its cells of the 3x3 grid, `road_cells` and `building_cells`. What was not asked
    for, or cannot be read, is None.
    """
    found: dict[str, Any] = dict.fromkeys(meanings(classes))
    task = question_task(question, classes)
    if task == "binary":
        found["changed"] = parse_yes_no(answer)
    elif task == "count" and (numbers := parse_count(answer, classes)):
        found |= {each.count_column: number for each, number in zip(classes, numbers, strict=True)}
    elif task == "grid" and (grids := parse_grid(answer, classes)):
        for each, grid in zip(classes, grids, strict=True):
            found[each.cells_column] = [cell for cell, listed in zip(CELLS, grid, strict=True) if listed]
    return found
