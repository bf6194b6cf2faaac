"""
ChangeChat-105k's six tasks: its fixed instructions and paraphrases of them, the form of their answers, and how to read
such answers. Classes are those of a data set, by default roads and buildings.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from .classes import NEW, REMOVED, ROADS_AND_BUILDINGS, STATED, ChangeClass, Classes
from .rules import CELLS, Facts
from .words import join_words

TASKS = ("caption", "binary", "count", "grid", "open", "dialogue")

GRID = "using a 3x3 grid (namely, 'top', 'center', and 'bottom' vertically and 'left', 'center', 'right' horizontally)"


@dataclass(frozen=True)
class Wording:
    """
    What is asked about the classes of a data set.

    Attributes:
        instructions (`dict[str, str]`): of each task that has one its fixed instruction.
        paraphrases (`dict[str, tuple[str, ...]]`): the same in other words.
        follow_ups (`tuple[str, ...]`): of the fixed dialogue, after the instruction of `binary`.
        task_of (`dict[str, str]`): of each of these, in its plain form, the task.
    """

    instructions: dict[str, str]
    paraphrases: dict[str, tuple[str, ...]]
    follow_ups: tuple[str, ...]
    task_of: dict[str, str]


@cache
def wording(classes: Classes) -> Wording:
    """The questions about some classes. Where a name says itself what happened, it is not said to have changed."""
    things, hows = join_words(classes.plurals), {each.how for each in classes}
    (how,) = hows if len(hows) == 1 else (STATED,)
    if STATED in hows:
        count, separately = f"how many {things} there are", things
        locations, cells = f"locations of the {things}", f"are {things}"
    else:
        count, separately = f"how many {things} have changed", f"number of {join_words(classes.names)} changes"
        locations = f"locations where changes have occurred in the {join_words(classes.plurals[::-1])}"
        cells = f"did {things} change"
    are = {NEW: "new", REMOVED: "gone", STATED: "there"}[how]
    instructions = {
        "caption": "Please briefly describe the changes in these two images.",
        "binary": "Please judge whether these two images have changed. Please answer yes or no.",
        "count": f"Please determine {count}?",
        "grid": f"Please indicate the {locations}, {GRID}.",
    }
    paraphrases = {
        "caption": ("What changed?", "What has changed between the two images?", "Describe the changes."),
        "binary": ("Has anything changed?", "Did anything change between the two images? Answer yes or no."),
        "count": (f"How many {things} are {are}?", f"Count the {_named(how, things)}."),
        "grid": ("Where are the changes?", f"In which cells of a 3x3 grid {cells}?"),
    }
    follow_ups = (
        f"If changes have occurred, count the {separately} separately.",
        "Based on the above analysis, please describe the changes of these two images in detail.",
    )
    task_of = {
        _plain(question): task for task in instructions for question in (instructions[task], *paraphrases[task])
    }
    task_of |= {_plain(follow_ups[0]): "count", _plain(follow_ups[1]): "caption"}
    return Wording(instructions, paraphrases, follow_ups, task_of)


def _named(how: str, noun: str) -> str:
    return f"{how} {noun}".lstrip()


def _plain(question: str) -> str:
    return " ".join(question.lower().split()).rstrip("?. ")


# Those about roads and buildings.
INSTRUCTIONS = wording(ROADS_AND_BUILDINGS).instructions
PARAPHRASES = wording(ROADS_AND_BUILDINGS).paraphrases
FOLLOW_UPS = wording(ROADS_AND_BUILDINGS).follow_ups

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
_DIGITS = rf"(?P<number>\d{{1,3}}(?:,\d{{3}})+|\d+|{'|'.join(_VALUES)})"
_NUMBER = rf"(?<![\w.-])(?<!\d,)(?<!\d to )(?<!\d or ){_DIGITS}"  # neither part of a number nor the end of a range
_NEW = r"(?:new |newly built |newly constructed |additional |removed |demolished )?"
_YES_NO = re.compile(r"\W*(yes|no)\b\W*(?:$|(?<=[,.;:!])\s)", re.ASCII)


class _Patterns:
    """What answers about some classes look like. A longer name goes before one that it has within it."""

    def __init__(self, classes: Classes):
        self.number_of = {word: number for number, each in enumerate(classes) for word in (each.plural, each.name)}
        words = sorted(self.number_of, key=len, reverse=True)
        self.name = rf"(?:{'|'.join(map(re.escape, words))})"
        self.counted = (
            re.compile(rf"{_NUMBER} {_NEW}(?P<name>{self.name})\b"),
            re.compile(rf"\b(?P<name>{self.name}) ?: ?{_DIGITS}\b"),
        )
        joint = " (?:or|and)" if len(classes) < 3 else "(?:,|,? or|,? and)"
        others = f"(?:{joint} {_NEW}{self.name}){{0,{len(classes) - 1}}}"
        self.none = re.compile(rf"\bno (?:{_NEW}|changes? (?:in|to) )(?:the )?({self.name}{others})\b")
        cells = rf"({self.name}) ?:? *\[([^][]*)\]"
        self.cell_lists = re.compile(rf"(?:- ?)?{'[,;]? *(?:and |- ?)?'.join([cells] * len(classes))}[.,]?")


_patterns = cache(_Patterns)


def check_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks in their usual order; ValueError if one is unknown or there is none."""
    if isinstance(tasks, str) or not tasks or set(tasks) - set(TASKS):
        raise ValueError(f"`tasks` must list some of {', '.join(TASKS)}; got {tasks!r}.")
    return tuple(task for task in TASKS if task in tasks)


def format_count(facts: Facts) -> str:
    return ", ".join(
        f"{number or 'no'} {_named(facts.how(each), each.name if number == 1 else each.plural)}"
        for number, each in zip(facts.counts, facts.classes, strict=True)
    )


def parse_count(answer: str, classes: Classes = ROADS_AND_BUILDINGS) -> tuple[int, ...] | None:
    """
    The numbers of changed objects of each class in an answer, such as roads and buildings, or None where one of them
    is not said.

    It reads [`format_count`]'s form, ChangeChat-105k's ("there are no changes in roads or buildings", "No roads has
    changed, and 2 buildings has changed.") and what lies between: numbers as words or digits, "new" or not, "Roads:
    2".
    """
    text, patterns = " ".join(answer.lower().split()), _patterns(classes)
    found: dict[int, int | None] = {}
    for pattern in patterns.counted:
        for match in pattern.finditer(text):
            found.setdefault(patterns.number_of[match["name"]], _read_number(match["number"]))
    for match in patterns.none.finditer(text):
        for name in re.findall(patterns.name, match[1]):
            found.setdefault(patterns.number_of[name], 0)
    numbers = [value for number in range(len(classes)) if (value := found.get(number)) is not None]
    return tuple(numbers) if len(numbers) == len(classes) else None


def _read_number(word: str) -> int | None:
    word = word.replace(",", "")
    if word in _VALUES:
        return _VALUES[word]
    return int(word) if len(word) < 10 else None  # a model that repeats a digit for ever has not counted


def format_grid(facts: Facts) -> str:
    return " ".join(
        f"{each.plural}: [{_cell_list(cells)}]" for each, cells in zip(facts.classes, facts.cells, strict=True)
    )


def parse_grid(answer: str, classes: Classes = ROADS_AND_BUILDINGS) -> tuple[np.ndarray, ...] | None:
    """
    The cells of each class, such as roads and buildings, `(9,)` bool each, in an answer of [`format_grid`]'s form, or
    None. Colons may be missing, names may be in quotes and in any order, classes too; JSON and list marks are read,
    "top left", and "center" for the middle.
    """
    patterns = _patterns(classes)
    match = patterns.cell_lists.fullmatch(" ".join(re.sub(r"[{}\"'*`]", "", answer.lower()).split()))
    if match is None:
        return None
    named = {
        patterns.number_of[name]: [_cell(cell) for cell in cells.split(",") if cell.strip()]
        for name, cells in zip(match.groups()[::2], match.groups()[1::2], strict=True)
    }
    if len(named) < len(classes) or not {cell for cells in named.values() for cell in cells} <= set(CELLS):
        return None
    return tuple(np.array([cell in named[number] for cell in CELLS]) for number in range(len(classes)))


def classes_named(text: str, classes: Classes = ROADS_AND_BUILDINGS) -> set[ChangeClass]:
    """Those classes whose name a text has in it."""
    patterns = _patterns(classes)
    return {classes.each[patterns.number_of[name]] for name in re.findall(patterns.name, text.lower())}


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


def _quantity(number: int, each: ChangeClass) -> str:
    if number == 1:
        return f"{'an' if each.name[0] in 'aeiou' else 'a'} {each.name}"
    return f"{_in_words(number)} {each.plural}"


_SAYS = {NEW: ("built", "added to the scene"), REMOVED: ("removed", "gone from the scene")}
_SAYS[STATED] = ("seen", "found in the scene")


def captions_of(facts: Facts) -> tuple[str, ...]:
    """All captions that fit, in LEVIR-CC's style: its five stock sentences, or what is new or gone, worded twice."""
    if not facts.changed:
        return NO_CHANGE
    changed: dict[str, dict[ChangeClass, int]] = {}
    for each, number in zip(facts.classes, facts.counts, strict=True):
        if number:
            changed.setdefault(facts.how(each), {})[each] = number
    return tuple(
        join_words(
            [
                f"{join_words([_quantity(numbers[each], each) for each in numbers])} {_is(sum(numbers.values()))} "
                f"{_SAYS[how][ending]}"
                for how, numbers in changed.items()
            ]
        )
        for ending in range(2)
    )


def describe_in_detail(facts: Facts) -> str:
    """The long caption that ends the fixed dialogue: how many of what, and where."""
    if not facts.changed:
        return NO_CHANGE[0]
    parts = []
    for each, number, cells in zip(facts.classes, facts.counts, facts.cells, strict=True):
        if number:
            place = f" in the {_cell_list(cells)}" if cells.any() else ""
            parts.append(f"{_quantity(number, each)} {_is(number)} {_SAYS[facts.how(each)][0]}{place}")
    return ", and ".join(parts)


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def _open_question(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    cell = int(rng.integers(9))
    questions: tuple[tuple[str, str], ...]
    if facts.classes != ROADS_AND_BUILDINGS:
        questions = tuple(_own_questions(facts, cell))
    elif facts.removed:
        questions = (
            ("How many buildings were built?", "no"),
            ("Are there new buildings?", "no"),
            ("Where are the new buildings?", "nowhere"),
            ("How many buildings were removed?", _in_words(facts.buildings)),
            ("Have any buildings been removed?", _yes_no(facts.buildings > 0)),
            ("Where were buildings removed?", _cell_list(facts.building_cells) or "nowhere"),
            (f"Were buildings removed in the {CELLS[cell]}?", _yes_no(bool(facts.building_cells[cell]))),
        )
    else:
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


def _own_questions(facts: Facts, cell: int) -> Iterable[tuple[str, str]]:
    """Open questions about any classes."""
    named = [_named(facts.how(each), each.plural) for each in facts.classes]
    for name, number, cells in zip(named, facts.counts, facts.cells, strict=True):
        yield f"How many {name} are there?", _in_words(number)
        yield f"Are there {name}?", _yes_no(number > 0)
        yield f"Where are the {name}?", _cell_list(cells) or "nowhere"
        yield f"Are there {name} in the {CELLS[cell]}?", _yes_no(bool(cells[cell]))
    for one, other in zip(range(len(named)), range(1, len(named)), strict=False):
        more = _yes_no(facts.counts[one] > facts.counts[other])
        yield f"Are there more {named[one]} than {named[other]}?", more


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
    words = wording(ROADS_AND_BUILDINGS if facts is None else facts.classes)
    if task == "open":
        return (_open_question(_require_facts(facts, task), rng),)
    if task == "dialogue":
        facts = _require_facts(facts, task)
        details = max(captions, key=len) if captions else describe_in_detail(facts)
        answers = (_yes_no(_changed(facts, captions, task)), format_count(facts), details)
        return tuple(zip((words.instructions["binary"], *words.follow_ups), answers, strict=True))
    question = words.instructions[task]
    if rng.random() < paraphrase:
        question = words.paraphrases[task][rng.integers(len(words.paraphrases[task]))]
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


def name_task(turns: Turns, classes: Classes = ROADS_AND_BUILDINGS) -> str:
    """The task that turns belong to: `dialogue` for several, else by the question, see [`question_task`]."""
    return "dialogue" if len(turns) > 1 else question_task(turns[0][0], classes)


def question_task(question: str, classes: Classes = ROADS_AND_BUILDINGS) -> str:
    """
    The task of one question: of a fixed instruction, a paraphrase of it or a follow-up of the fixed dialogue (`count`
    and `caption`); else `open`. Case, white space and end marks do not matter.
    """
    return wording(classes).task_of.get(_plain(question), "open")
