"""
ChangeChat-105k's six tasks: its fixed instructions and paraphrases of them, the form of their answers, and how to read
such answers.
"""

import re
from collections.abc import Sequence

import numpy as np

from .rules import CELLS, Facts

TASKS = ("caption", "binary", "count", "grid", "open", "dialogue")

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
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

Turns = tuple[tuple[str, str], ...]  # questions with their answers

_WORDS = (*NUMBERS, *"eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split())
_VALUES = {"a": 1, "an": 1, "zero": 0, **{word: value for value, word in enumerate(_WORDS)}}
_DIGITS = rf"(\d{{1,3}}(?:,\d{{3}})+|\d+|{'|'.join(_VALUES)})"
_NUMBER = rf"(?<![\w.-])(?<!\d,)(?<!\d to )(?<!\d or ){_DIGITS}"  # neither part of a number nor the end of a range
_NEW = r"(?:new |newly built |newly constructed |additional |removed |demolished )?"
_COUNTED = {
    kind: (re.compile(rf"{_NUMBER} {_NEW}{kind}s?\b"), re.compile(rf"\b{kind}s? ?: ?{_DIGITS}\b"))
    for kind in ("road", "building")
}
_NONE_OF = {
    kind: re.compile(rf"\bno (?:{_NEW}|changes? (?:in|to) )(?:the )?(?:{other}s? (?:or|and) {_NEW})?{kind}s?\b")
    for kind, other in (("road", "building"), ("building", "road"))
}
_YES_NO = re.compile(r"\W*(yes|no)\b\W*(?:$|(?<=[,.;:!])\s)", re.ASCII)
_CELL_LISTS = re.compile(
    r"(?:- ?)?(road|building)s? ?:? *\[([^][]*)\][,;]? *(?:and |- ?)?(road|building)s? ?:? *\[([^][]*)\][.,]?"
)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in their usual order; ValueError if one is unknown or there is none."""
    if isinstance(tasks, str) or not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"`tasks` must list some of {', '.join(TASKS)}; got {tasks!r}.")
    return tuple(task for task in TASKS if task in tasks)


def format_count(facts: Facts) -> str:
    roads, buildings, kind = facts.roads, facts.buildings, "removed" if facts.removed else "new"
    return (
        f"{roads or 'no'} {kind} road{'s' * (roads != 1)}, {buildings or 'no'} {kind} building{'s' * (buildings != 1)}"
    )


def parse_count(answer: str) -> tuple[int, int] | None:
    """
    The numbers of changed roads and buildings in an answer, or None where one of them is not said.

    It reads [`format_count`]'s form, ChangeChat-105k's ("there are no changes in roads or buildings", "No roads has
    changed, and 2 buildings has changed.") and what lies between: numbers as words or digits, "new" or not, "Roads:
    2".
    """
    text = " ".join(answer.lower().split())
    roads, buildings = _read_number(text, "road"), _read_number(text, "building")
    return None if roads is None or buildings is None else (roads, buildings)


def _read_number(text: str, kind: str) -> int | None:
    for pattern in _COUNTED[kind]:
        match = pattern.search(text)
        if match:
            word = match[1].replace(",", "")
            if word in _VALUES:
                return _VALUES[word]
            return int(word) if len(word) < 10 else None  # a model that repeats a digit for ever has not counted
    return 0 if _NONE_OF[kind].search(text) else None


def format_grid(facts: Facts) -> str:
    return f"roads: [{_cell_list(facts.road_cells)}] buildings: [{_cell_list(facts.building_cells)}]"


def parse_grid(answer: str) -> tuple[np.ndarray, np.ndarray] | None:
    """
    The cells of roads and of buildings, `(9,)` bool each, in an answer of [`format_grid`]'s form, or None. Colons may
    be missing, names may be in quotes and in any order, buildings may come before roads; JSON and list marks are read,
    "top left", and "center" for the middle.
    """
    match = _CELL_LISTS.fullmatch(" ".join(re.sub(r"[{}\"'*`]", "", answer.lower()).split()))
    if match is None or match[1] == match[3]:
        return None
    named = {
        kind: [_cell(name) for name in names.split(",") if name.strip()]
        for kind, names in (match.group(1, 2), match.group(3, 4))
    }
    if not set(named["road"] + named["building"]) <= set(CELLS):
        return None
    roads, buildings = (np.array([cell in named[kind] for cell in CELLS]) for kind in ("road", "building"))
    return roads, buildings


def _cell(name: str) -> str:
    name = "-".join(name.split())
    return "center-center" if name == "center" else name


def parse_yes_no(answer: str) -> bool | None:
    """True for an answer that is "yes" or begins with it before a comma or stop, False for "no" alike; else None."""
    match = _YES_NO.match(answer.lower())
    return None if match is None else match[1] == "yes"


def says_change(captions: Sequence[str]) -> bool:
    """Whether captions of one pair speak of a change: not all are among LEVIR-CC's five stock sentences."""
    return not all(" ".join(caption.lower().split()).rstrip(" .") in NO_CHANGE for caption in captions)


def _cell_list(cells: np.ndarray) -> str:
    return ", ".join(cell for cell, listed in zip(CELLS, cells, strict=True) if listed)


def _in_words(number: int) -> str:
    return NUMBERS[number] if number < len(NUMBERS) else str(number)


def _quantity(number: int, noun: str) -> str:
    return f"{'a' if number == 1 else _in_words(number)} {noun}{'s' * (number != 1)}"


def captions_of(facts: Facts) -> tuple[str, ...]:
    """All captions that fit, in LEVIR-CC's style: its five stock sentences, or what is new or gone, worded twice."""
    if not facts.changed:
        return NO_CHANGE
    new = []
    if facts.roads:
        new.append(_quantity(facts.roads, "road"))
    if facts.buildings:
        new.append(_quantity(facts.buildings, "building"))
    verb = "is" if facts.roads + facts.buildings == 1 else "are"
    endings = ("removed", "gone from the scene") if facts.removed else ("built", "added to the scene")
    return tuple(f"{' and '.join(new)} {verb} {ending}" for ending in endings)


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
            place = f" in the {_cell_list(cells)}" if cells.any() else ""
            parts.append(f"{_quantity(number, noun)} {verb} {'removed' if facts.removed else 'built'}{place}")
    return ", and ".join(parts)


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _open_question(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    cell = int(rng.integers(9))
    questions: tuple[tuple[str, str], ...]
    if facts.removed:
        questions = (
            ("How many buildings were built?", "no"),
            ("Are there new buildings?", "no"),
            ("Where are the new buildings?", "nowhere"),
            ("How many buildings were removed?", _in_words(facts.buildings)),
            ("Have any buildings been removed?", _yes_no(facts.buildings > 0)),
            ("Where were buildings removed?", _cell_list(facts.building_cells) or "nowhere"),
            (f"Were buildings removed in the {CELLS[cell]}?", _yes_no(bool(facts.building_cells[cell]))),
        )
        return questions[rng.integers(len(questions))]
    questions = (
        ("How many buildings were built?", _in_words(facts.buildings)),
        ("How many new roads are there?", _in_words(facts.roads)),
        ("Have any roads been built?", _yes_no(facts.roads > 0)),
        ("Are there new buildings?", _yes_no(facts.buildings > 0)),
        ("Where are the new buildings?", _cell_list(facts.building_cells) or "nowhere"),
        ("Which part of the area has new roads?", _cell_list(facts.road_cells) or "none"),
        (f"Are there new buildings in the {CELLS[cell]}?", _yes_no(bool(facts.building_cells[cell]))),
        (f"Is there a new road in the {CELLS[cell]}?", _yes_no(bool(facts.road_cells[cell]))),
        ("Are there more new buildings than new roads?", _yes_no(facts.buildings > facts.roads)),
    )
    return questions[rng.integers(len(questions))]


def make_turns(
    task: str,
    facts: Facts | None,
    rng: np.random.Generator,
    captions: Sequence[str] = (),
    paraphrase: float = 0.0,
) -> Turns:
    """
    Questions of one task about a pair, with their answers.

    What people wrote goes before what is counted: captions decide whether the pair changed and end the dialogue.

    Args:
        task (`str`): one of [`TASKS`]. The open questions are those that facts answer.
        facts ([`Facts`], *optional*): what is known from masks. Captions alone are enough for `caption` and `binary`.
        rng (`np.random.Generator`): chooses wordings.
        captions (`Sequence[str]`, *optional*): the pair's captions.
        paraphrase (`float`, *optional*, defaults to 0): how often a fixed instruction is put in other words.

    Returns:
        `tuple[tuple[str, str], ...]`: three turns for a dialogue, else one.

    Raises:
        ValueError: if the task is unknown or needs facts that are not there.
    """
    if task not in TASKS:
        raise ValueError(f"Unknown task {task!r}, expected one of {', '.join(TASKS)}.")
    if task == "open":
        return (_open_question(_require_facts(facts, task), rng),)
    if task == "dialogue":
        facts = _require_facts(facts, task)
        details = max(captions, key=len) if captions else describe_in_detail(facts)
        answers = (_yes_no(_changed(facts, captions, task)), format_count(facts), details)
        return tuple(zip((INSTRUCTIONS["binary"], *FOLLOW_UPS), answers, strict=True))
    question = INSTRUCTIONS[task]
    if rng.random() < paraphrase:
        question = PARAPHRASES[task][rng.integers(len(PARAPHRASES[task]))]
    if task == "caption":
        captions = captions or captions_of(_require_facts(facts, task))
        answer = captions[int(rng.integers(len(captions)))]
    elif task == "binary":
        answer = _yes_no(_changed(facts, captions, task))
    elif task == "count":
        answer = format_count(_require_facts(facts, task))
    elif task == "grid":
        answer = format_grid(_require_facts(facts, task))
    else:
        raise NotImplementedError(f"`make_turns` knows no answer to the task {task!r}.")
    return ((question, answer),)


def _require_facts(facts: Facts | None, task: str) -> Facts:
    if facts is None:
        raise ValueError(f"Task {task!r} needs a change mask{' or captions' * (task in ('caption', 'binary'))}.")
    return facts


def _changed(facts: Facts | None, captions: Sequence[str], task: str) -> bool:
    return says_change(captions) if captions else _require_facts(facts, task).changed


def name_task(turns: Turns) -> str:
    """The task that turns belong to: `dialogue` for several, else by the question, see [`question_task`]."""
    return "dialogue" if len(turns) > 1 else question_task(turns[0][0])


def question_task(question: str) -> str:
    """
    The task of one question: of a fixed instruction, a paraphrase of it or a follow-up of the fixed dialogue (`count`
    and `caption`); else `open`. Case, white space and end marks do not matter.
    """
    return _TASK_OF.get(_plain(question), "open")


def _plain(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?. ")


_TASK_OF = {
    _plain(question): task
    for task, instruction in INSTRUCTIONS.items()
    for question in (instruction, *PARAPHRASES[task])
} | {_plain(FOLLOW_UPS[0]): "count", _plain(FOLLOW_UPS[1]): "caption"}
