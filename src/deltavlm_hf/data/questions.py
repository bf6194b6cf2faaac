"""
Questions and answers about a generated pair, in the style of ChangeChat-105k: its six tasks, its fixed instructions
and paraphrases of them.

The 3x3 grid is named row by row from the top left: `top-left` ... `center-center` ... `bottom-right`.
"""

import re
from dataclasses import dataclass

import numpy as np

from .scenes import BUILDING, ROAD, ScenePair

TASKS = ("caption", "binary", "count", "grid", "open", "dialogue")
CELLS = tuple(f"{row}-{column}" for row in ("top", "center", "bottom") for column in ("left", "center", "right"))
CELL_FRACTION = 0.01  # a cell counts when the class's change covers at least this part of it

INSTRUCTIONS = {
    "caption": "Please briefly describe the changes in these two images.",
    "binary": "Please judge whether these two images have changed. Please answer yes or no.",
    "count": "Please determine how many roads and buildings have changed?",
    "grid": "Please indicate the locations where changes have occurred in the buildings and roads, using a 3x3 grid "
    "(namely, 'top', 'center', and 'bottom' vertically and 'left', 'center', 'right' horizontally).",
}
FOLLOW_UPS = (
    "If changes have occurred, count the number of road and building changes separately.",
    "Based on the above analysis, please describe the changes of these two images in detail.",
)
PARAPHRASES = {
    "caption": ("What changed?", "What has changed between the two images?", "Describe the changes."),
    "binary": ("Has anything changed?", "Did anything change between the two images? Answer yes or no."),
    "count": ("How many roads and buildings are new?", "Count the new roads and buildings."),
    "grid": ("Where are the changes?", "In which cells of a 3x3 grid did roads and buildings change?"),
}
NO_CHANGE = (
    "there is no difference",
    "the two scenes seem identical",
    "the scene is the same as before",
    "no change has occurred",
    "almost nothing has changed",
)
NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


@dataclass(frozen=True)
class Record:
    """A conversation about one pair: `task`, and `turns` of (question, answer); one turn but for dialogues."""

    task: str
    turns: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Facts:
    """
    What answers are made of.

    Attributes:
        roads (`int`): new roads.
        buildings (`int`): new buildings.
        road_cells (`np.ndarray` of shape `(9,)`, bool): the grid cells with a new road, row by row from the top left.
        building_cells (`np.ndarray` of shape `(9,)`, bool): the same for new buildings.
        buildings_by_cell (`np.ndarray` of shape `(9,)`, int): how many new buildings have their centre there.
    """

    roads: int
    buildings: int
    road_cells: np.ndarray
    building_cells: np.ndarray
    buildings_by_cell: np.ndarray

    @property
    def changed(self) -> bool:
        return self.roads + self.buildings > 0


def read_facts(scene: ScenePair) -> Facts:
    """Reads off a pair's truth what the answers need."""
    size = len(scene.mask)
    by_cell = np.zeros(9, int)
    cells = np.clip((scene.buildings * 3 / size).astype(int), 0, 2)
    np.add.at(by_cell, cells[:, 0] * 3 + cells[:, 1], 1)
    return Facts(
        roads=scene.roads,
        buildings=len(scene.buildings),
        road_cells=grid_cells(scene.mask == ROAD),
        building_cells=grid_cells(scene.mask == BUILDING),
        buildings_by_cell=by_cell,
    )


def grid_cells(changed: np.ndarray, fraction: float = CELL_FRACTION) -> np.ndarray:
    """
    Which cells of the 3x3 grid a class's change covers enough of.

    Args:
        changed (`np.ndarray` of shape `(H, W)`, bool): the changed pixels.
        fraction (`float`, *optional*, defaults to 0.01): of a cell's area that must have changed.

    Returns:
        `np.ndarray` of shape `(9,)`, bool, row by row from the top left.
    """
    cells = [cell for row in np.array_split(changed, 3) for cell in np.array_split(row, 3, axis=1)]
    return np.array([cell.any() and cell.mean() >= fraction for cell in cells])


def format_count(facts: Facts) -> str:
    roads, buildings = facts.roads, facts.buildings
    return f"{roads or 'no'} new road{'s' * (roads != 1)}, {buildings or 'no'} new building{'s' * (buildings != 1)}"


def parse_count(answer: str) -> tuple[int, int] | None:
    """The numbers of new roads and buildings in an answer of [`format_count`]'s form, or None."""
    match = re.fullmatch(r"(no|\d+) new roads?, (no|\d+) new buildings?", answer.strip().lower())
    if match is None:
        return None
    roads, buildings = (0 if number == "no" else int(number) for number in match.groups())
    return roads, buildings


def format_grid(facts: Facts) -> str:
    return f"roads: [{_cell_list(facts.road_cells)}] buildings: [{_cell_list(facts.building_cells)}]"


def parse_grid(answer: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The cells of roads and of buildings, `(9,)` bool each, in an answer of [`format_grid`]'s form, or None."""
    match = re.fullmatch(r"roads: \[([^]]*)\] buildings: \[([^]]*)\]", answer.strip().lower())
    if match is None:
        return None
    named = [[name.strip() for name in group.split(",") if name.strip()] for group in match.groups()]
    if not {name for group in named for name in group} <= set(CELLS):
        return None
    roads, buildings = (np.array([cell in group for cell in CELLS]) for group in named)
    return roads, buildings


def _cell_list(cells: np.ndarray) -> str:
    return ", ".join(cell for cell, listed in zip(CELLS, cells, strict=True) if listed)


def _quantity(number: int, noun: str) -> str:
    return f"{'a' if number == 1 else NUMBERS[number]} {noun}{'s' * (number != 1)}"


def describe(facts: Facts, rng: np.random.Generator | None = None) -> str:
    """A caption in LEVIR-CC's style; with `rng` its wording varies."""
    if not facts.changed:
        return NO_CHANGE[0 if rng is None else rng.integers(len(NO_CHANGE))]
    new = []
    if facts.roads:
        new.append(_quantity(facts.roads, "road"))
    if facts.buildings:
        new.append(_quantity(facts.buildings, "building"))
    verb = "is" if facts.roads + facts.buildings == 1 else "are"
    ending = ("built", "added to the scene")[0 if rng is None else rng.integers(2)]
    return f"{' and '.join(new)} {verb} {ending}"


def describe_in_detail(facts: Facts) -> str:
    """The long caption that ends the fixed dialogue: how many of what, and where."""
    if not facts.changed:
        return NO_CHANGE[0]
    parts = []
    for number, noun, cells in (
        (facts.roads, "road", facts.road_cells),
        (facts.buildings, "building", facts.building_cells),
    ):
        if number:
            verb = "is" if number == 1 else "are"
            parts.append(f"{_quantity(number, noun)} {verb} built in the {_cell_list(cells)}")
    return ", and ".join(parts)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _open_question(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    cell = int(rng.integers(9))
    questions = (
        ("How many buildings were built?", NUMBERS[facts.buildings]),
        ("How many new roads are there?", NUMBERS[facts.roads]),
        ("Have any roads been built?", _yes_no(facts.roads > 0)),
        ("Are there new buildings?", _yes_no(facts.buildings > 0)),
        ("Where are the new buildings?", _cell_list(facts.building_cells) or "nowhere"),
        ("Which part of the area has new roads?", _cell_list(facts.road_cells) or "none"),
        (f"Are there new buildings in the {CELLS[cell]}?", _yes_no(bool(facts.building_cells[cell]))),
        (f"Is there a new road in the {CELLS[cell]}?", _yes_no(bool(facts.road_cells[cell]))),
        ("Are there more new buildings than new roads?", _yes_no(facts.buildings > facts.roads)),
    )
    return questions[rng.integers(len(questions))]


def make_record(facts: Facts, task: str, rng: np.random.Generator, paraphrase: float = 0.0) -> Record:
    """
    Makes a record of one task about a pair.

    Args:
        facts ([`Facts`]): the truth.
        task (`str`): one of [`TASKS`].
        rng (`np.random.Generator`): chooses wordings.
        paraphrase (`float`, *optional*, defaults to 0): how often a fixed instruction is put in other words.

    Raises:
        ValueError: if the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}, expected one of {', '.join(TASKS)}.")
    if task == "open":
        return Record(task, (_open_question(facts, rng),))
    if task == "dialogue":
        answers = (_yes_no(facts.changed), format_count(facts), describe_in_detail(facts))
        return Record(task, tuple(zip((INSTRUCTIONS["binary"], *FOLLOW_UPS), answers, strict=True)))
    question = INSTRUCTIONS[task]
    if rng.random() < paraphrase:
        question = PARAPHRASES[task][rng.integers(len(PARAPHRASES[task]))]
    if task == "caption":
        answer = describe(facts, rng)
    elif task == "binary":
        answer = _yes_no(facts.changed)
    else:
        answer = format_count(facts) if task == "count" else format_grid(facts)
    return Record(task, ((question, answer),))
