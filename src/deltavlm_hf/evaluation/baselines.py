"""What any model must beat, answered by the same code: no change always, the majority answer, the nearest pair."""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.questions import NO_CHANGE, format_count, format_grid, question_task
from ..data.rows import as_seen, undecoded
from ..data.rules import LEVIR, read_facts
from ..processing.reading import READING_ERRORS, read_image
from .answering import Pair, pair_key

logger = logging.getLogger(__name__)

BASELINES = ("no-change", "majority", "nearest")

_SIDE = 16  # pixels that a difference is compared at


def no_change_answers(classes: Classes = ROADS_AND_BUILDINGS) -> dict[str, str]:
    """Of each task the answer that nothing changed."""
    nothing = read_facts(np.zeros((9, 9), np.uint8), LEVIR, classes)
    counts, cells = format_count(nothing), format_grid(nothing)
    return {"caption": NO_CHANGE[0], "binary": "no", "count": counts, "grid": cells, "open": "no"}


class NoChange:
    """
    Always says that nothing changed, in the form of the task.

    Args:
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.
    """

    def __init__(self, classes: Classes = ROADS_AND_BUILDINGS):
        self.classes = classes
        self.answers = no_change_answers(classes)

    def encode(self, pairs: Sequence[Pair]) -> None:
        return None

    def answer(self, encoded, which, questions, histories) -> list[str]:
        return [self.answers[question_task(question, self.classes)] for question in questions]


class Majority:
    """
    Always gives the most frequent training answer to a question: the very same, or else of its kind.

    Args:
        rows (`Dataset`): training data, see [`load_changechat`].
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.
    """

    def __init__(self, rows: datasets.Dataset, classes: Classes = ROADS_AND_BUILDINGS):
        self.classes = classes
        self.otherwise = no_change_answers(classes)
        self.answers: dict[str, Counter[str]] = {}
        for turns in rows["turns"]:
            for turn in turns:
                for name in (turn["question"], question_task(turn["question"], self.classes)):
                    self.answers.setdefault(name, Counter())[turn["answer"]] += 1

    def encode(self, pairs: Sequence[Pair]) -> None:
        return None

    def answer(self, encoded, which, questions, histories) -> list[str]:
        return [self._most_frequent(question) for question in questions]

    def _most_frequent(self, question: str) -> str:
        counts = self.answers.get(question) or self.answers.get(question_task(question, self.classes))
        return counts.most_common(1)[0][0] if counts else self.otherwise[question_task(question, self.classes)]


class Nearest:
    """
    Gives the answer of the training pair whose change looks most alike: least squared distance between what changed in
    grey at 16 x 16 pixels. Questions it has no answer to get the majority's.

    Args:
        rows (`Dataset`): training data, see [`load_changechat`]. Pairs that cannot be read are left out and told.
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.

    Raises:
        ValueError: if no pair can be read.
    """

    def __init__(self, rows: datasets.Dataset, classes: Classes = ROADS_AND_BUILDINGS):
        self.classes = classes
        self.majority = Majority(rows, classes)
        self.answers: list[dict[str, str]] = []
        differences: list[np.ndarray] = []
        numbers: dict[tuple, int | None] = {}
        for row in undecoded(rows):
            name = pair_key(row)
            if name not in numbers:
                try:
                    differences.append(_difference((read_image(row["before"]), read_image(row["after"]))))
                except READING_ERRORS as error:
                    logger.warning("The baseline nearest does without %s: %s", row["id"], error)
                    numbers[name] = None
                    continue
                numbers[name] = len(self.answers)
                self.answers.append({})
            number = numbers[name]
            if number is not None:
                for turn in row["turns"]:
                    for question in (turn["question"], question_task(turn["question"], self.classes)):
                        self.answers[number].setdefault(question, turn["answer"])
        if not differences:
            raise ValueError("The baseline nearest has no training pair whose images can be read.")
        self.differences = np.stack(differences)  # (n, 256)

    def encode(self, pairs: Sequence[Pair]) -> list[int]:
        """The number of the nearest training pair for each."""
        return [int(np.square(self.differences - _difference(pair)).sum(1).argmin()) for pair in pairs]

    def answer(self, encoded, which, questions, histories) -> list[str]:
        found = [self.answers[encoded[number]] for number in which]
        return [
            answers.get(question)
            or answers.get(question_task(question, self.classes))
            or self.majority.answer(None, [0], [question], [])[0]
            for answers, question in zip(found, questions, strict=True)
        ]


def make_baseline(name: str, training_rows: datasets.Dataset | None, classes: Classes = ROADS_AND_BUILDINGS) -> Any:
    """
    Args:
        name (`str`): one of [`BASELINES`].
        training_rows (`Dataset`, *optional*): what `majority` and `nearest` learn from.
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.

    Raises:
        ValueError: for an unknown name, or no training data where it is needed.
    """
    if name not in BASELINES:
        raise ValueError(f"Unknown baseline {name!r}, expected one of {', '.join(BASELINES)}.")
    if name == "no-change":
        return NoChange(classes)
    if training_rows is None:
        raise ValueError(f"The baseline {name} needs training data.")
    return Majority(training_rows, classes) if name == "majority" else Nearest(training_rows, classes)


def _difference(pair: Pair) -> np.ndarray:
    before, after = (np.asarray(as_seen(image).convert("L").resize((_SIDE, _SIDE)), np.float32) for image in pair)
    return (after - before).ravel()  # (256,)
