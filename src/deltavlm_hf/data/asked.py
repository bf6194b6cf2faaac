"""What is asked under a task's name, and what the answer means."""

from typing import Any

from .questions import FOLLOW_UPS, INSTRUCTIONS, TASKS, parse_count, parse_grid, parse_yes_no, question_task
from .rules import CELLS

MEANINGS = ("changed", "roads", "buildings", "road_cells", "building_cells")


def questions_of(text: str) -> tuple[str, ...]:
    """
    The turns that a text stands for: a task's name for its fixed instruction, `dialogue` for the fixed dialogue of
    three turns; any other text for itself.

    Raises:
        ValueError: if there is no text, or for `open`, which has no fixed question.
    """
    text = text.strip()
    if not text:
        raise ValueError("A question is empty: write one, or the name of a task.")
    if text == "open":
        raise ValueError("The task `open` has no fixed question: write one of your own.")
    if text == "dialogue":
        return (INSTRUCTIONS["binary"], *FOLLOW_UPS)
    return (INSTRUCTIONS[text],) if text in TASKS else (text,)


def meaning_of(question: str, answer: str) -> dict[str, Any]:
    """
    What an answer says, by the parsers of the question's task: `changed` of yes or no, `roads` and `buildings` of
    counts, `road_cells` and `building_cells` of the 3x3 grid. What was not asked for, or cannot be read, is None.
    """
    found: dict[str, Any] = dict.fromkeys(MEANINGS)
    task = question_task(question)
    if task == "binary":
        found["changed"] = parse_yes_no(answer)
    elif task == "count" and (numbers := parse_count(answer)):
        found["roads"], found["buildings"] = numbers
    elif task == "grid" and (grids := parse_grid(answer)):
        roads, buildings = ([cell for cell, listed in zip(CELLS, grid, strict=True) if listed] for grid in grids)
        found["road_cells"], found["building_cells"] = roads, buildings
    return found
