"""From answers to figures, task by task."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.questions import TASKS, parse_count, parse_grid, parse_yes_no, question_task, says_change
from .captions import Protocol, score_by_change
from .metrics import bootstrap_interval, figure_of, score_counts, score_dialogues, score_grids, score_yes_no

_READ: dict[str, Callable[[str, Classes], Any]] = {
    "binary": lambda answer, classes: parse_yes_no(answer),
    "count": parse_count,
    "grid": parse_grid,
}


class Case:
    """
    One row with its answers.

    Attributes:
        index (`int`): the row's number.
        row (`dict`): the row without its images.
        answers (`list[str]`): one for each turn; empty texts where the row failed.
        error (`str`, *optional*): why there are no answers.
        score (`float`): how good the answers are, 0 to 1, to sort cases of one task by.
        parts (`dict[str, Sequence[float]]`): by figure, what this row adds to the sums that it is made of, see
            [`~evaluation.metrics.figure_of`]. Empty where the right answer cannot be read.
        classes ([`Classes`]): what is counted and placed.
    """

    def __init__(self, index: int, row: dict, prediction: dict, classes: Classes = ROADS_AND_BUILDINGS):
        self.index = index
        self.row = row
        self.classes = classes
        self.error: str | None = prediction.get("error")
        self.answers: list[str] = prediction.get("answers") or [""] * len(row["turns"])
        self.score = 0.0
        self.parts: dict[str, Sequence[float]] = {}

    @property
    def references(self) -> list[str]:
        """What the last answer is compared with."""
        return self.row["captions"] or [self.row["turns"][-1]["answer"]]

    def read(self, answer: str, task: str | None = None) -> Any:
        """What an answer to the row's task, or another, says by the task's grammar; None if it cannot be read."""
        return _READ[task or self.row["task"]](answer, self.classes)


def evaluate_predictions(
    rows: Iterable[dict],
    predictions: Sequence[dict],
    protocol: Protocol | None = None,
    *,
    intervals: bool = True,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> tuple[dict[str, dict], list[Case]]:
    """
    Figures for each task that the rows have.

    Args:
        rows (`Iterable[dict]`): as [`load_changechat`] gives them; images are not needed.
        predictions (`Sequence[dict]`): for each row `answers`, or `error`, see [`predict`].
        protocol ([`Protocol`], *optional*): for captions and open questions; defaults to `coco`.
        intervals (`bool`, *optional*, defaults to `True`): with 95 % bootstrap confidence intervals (not for METEOR,
            whose sums are Java's own).
        classes ([`Classes`], *optional*): of the data set, see [`find_classes`]; by default roads and buildings.

    Returns:
        `tuple[dict[str, dict], list[Case]]`: figures by task, and all cases. Every task has `samples`, `failed` (rows
        without an answer, which count as wrong) and `unreadable_truths` (rows whose right answer could not be read:
        they are left out, for there is nothing to compare with).

    Raises:
        ValueError: if rows and predictions differ in number or in ids.
    """
    cases: dict[str, list[Case]] = {task: [] for task in TASKS}
    everything = list(rows)
    if len(everything) != len(predictions):
        raise ValueError(f"Expected a prediction for each row; got {len(predictions)} for {len(everything)} rows.")
    for index, (row, prediction) in enumerate(zip(everything, predictions, strict=True)):
        if prediction.get("id", row["id"]) != row["id"]:
            raise ValueError(f"Prediction {index} is for record {prediction['id']!r}, the row is {row['id']!r}.")
        answers = prediction.get("answers")
        if answers is not None and (isinstance(answers, str) or len(answers) != len(row["turns"])):
            raise ValueError(f"Prediction {index} must have a list of {len(row['turns'])} answers, got {answers!r}.")
        cases[row["task"]].append(Case(index, row, prediction, classes))
    results = {}
    for task, found in cases.items():
        if found:
            results[task] = SCORERS[task](found, protocol, intervals)
            results[task]["failed"] = sum(case.error is not None for case in found)
    return results, [case for found in cases.values() for case in found]


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Of a mean."""
    array = np.asarray(values, float)
    return bootstrap_interval(lambda chosen: float(array[chosen].mean()), len(array))


def _resampled(score: Callable[[list, list], dict], predictions: list, truths: list, name: str) -> tuple[float, float]:
    """Of a figure that is no mean over samples."""
    return bootstrap_interval(
        lambda chosen: score([predictions[i] for i in chosen], [truths[i] for i in chosen])[name],
        len(predictions),
        resamples=400,
    )


def unreadable(case: Case) -> bool:
    """Whether a case's right answer cannot be read, so that nothing can be said about the given one."""
    return case.row["task"] in _READ and case.read(case.row["turns"][0]["answer"]) is None


def _readable(cases: list[Case]) -> tuple[list[Case], list, list]:
    """Cases with a right answer that can be read, those answers, and the predicted ones."""
    truths = [case.read(case.row["turns"][0]["answer"]) for case in cases]
    kept = [(case, truth) for case, truth in zip(cases, truths, strict=True) if truth is not None]
    predictions = [case.read(case.answers[0]) for case, _ in kept]
    return [case for case, _ in kept], [truth for _, truth in kept], predictions


def _binary(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    kept, truths, predictions = _readable(cases)
    result: dict[str, Any] = {"samples": len(kept), "unreadable_truths": len(cases) - len(kept)}
    if not kept:
        return result
    result |= score_yes_no(predictions, truths)
    for case, predicted, truth in zip(kept, predictions, truths, strict=True):
        case.score = float(predicted == truth)
        said = not truth if predicted is None else predicted
        case.parts = {"accuracy": (said == truth, 1), "f1": (said and truth, said, truth)}
    if intervals:
        result["intervals"] = {
            name: _resampled(score_yes_no, predictions, truths, name) for name in ("accuracy", "f1")
        }
    return result


def _count(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    kept, truths, predictions = _readable(cases)
    result: dict[str, Any] = {"samples": len(kept), "unreadable_truths": len(cases) - len(kept)}
    if not kept:
        return result
    for number, name in enumerate(kept[0].classes.plurals):
        numbers = [None if predicted is None else predicted[number] for predicted in predictions]
        right = [truth[number] for truth in truths]
        result[name] = score_counts(numbers, right)
        result[name]["pairs"] = [[truth, predicted] for truth, predicted in zip(right, numbers, strict=True)]
        errors = [abs((predicted or 0) - truth) for predicted, truth in zip(numbers, right, strict=True)]
        exact = [predicted == truth for predicted, truth in zip(numbers, right, strict=True)]
        for case, error, is_exact in zip(kept, errors, exact, strict=True):
            case.parts |= {f"{name} exact": (is_exact, 1), f"{name} mae": (error, 1), f"{name} rmse": (error**2, 1)}
        if intervals:
            result[name]["intervals"] = {"mae": _interval(errors), "exact": _interval(exact)}
    for case, predicted, truth in zip(kept, predictions, truths, strict=True):
        if predicted is not None:
            case.score = 1 / (1 + sum(abs(said - right) for said, right in zip(predicted, truth, strict=True)))
    return result


def _grid(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    kept, truths, predictions = _readable(cases)
    result: dict[str, Any] = {"samples": len(kept), "unreadable_truths": len(cases) - len(kept)}
    if not kept:
        return result
    for number, name in enumerate(kept[0].classes.plurals):
        listed = [None if predicted is None else predicted[number] for predicted in predictions]
        right = [truth[number] for truth in truths]
        result[name] = score_grids(listed, right)
        for case, cells, truth in zip(kept, listed, right, strict=True):
            said = ~truth if cells is None else cells
            case.parts[f"{name} f1"] = (int((said & truth).sum()), int(said.sum()), int(truth.sum()))
            case.parts[f"{name} all-right"] = (bool((said == truth).all()), 1)
        if intervals:
            result[name]["intervals"] = {
                figure: _resampled(score_grids, listed, right, figure) for figure in ("f1", "subset_accuracy")
            }
    for case, predicted, truth in zip(kept, predictions, truths, strict=True):
        if predicted is not None:
            case.score = float(np.mean([said == right for said, right in zip(predicted, truth, strict=True)]))
    return result


def _texts(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    protocol = protocol or Protocol()
    answers = [case.answers[-1] for case in cases]
    scores = score_by_change(
        answers, [case.references for case in cases], [case.row["changed"] for case in cases], protocol
    )
    for case, score in zip(cases, scores["all"].each["ROUGE-L"], strict=True):
        case.score = score
    result: dict[str, Any] = {
        "samples": len(cases),
        "unreadable_truths": 0,
        "protocol": protocol.name,
        **{name: subset.overall for name, subset in scores.items()},
        "samples_by_change": {name: len(subset.each["ROUGE-L"]) for name, subset in scores.items()},
        "lengths": [len(answer.split()) for answer in answers],
        "each_rouge_l": [case.score for case in cases],
    }
    flags = {"changed": True, "unchanged": False}
    for name, subset in scores.items():
        of_subset = [case for case in cases if name == "all" or case.row["changed"] == flags[name]]
        for number, case in enumerate(of_subset):
            case.parts[f"{name} BLEU-4"] = subset.bleu[number]
            case.parts |= {f"{name} {each}": (subset.each[each][number], 1) for each in ("ROUGE-L", "CIDEr")}
    if intervals:
        result["intervals"] = {name: _interval(scores["all"].each[name]) for name in ("ROUGE-L", "CIDEr")}
        bleu = np.asarray(scores["all"].bleu)
        result["intervals"]["BLEU-4"] = bootstrap_interval(
            lambda chosen: float(figure_of("BLEU-4", bleu[chosen].sum(0))), len(bleu)
        )
    return result


def _caption(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    result = _texts(cases, protocol, intervals)
    flags = [case.row["changed"] for case in cases]
    truths = [says_change(case.references) if flag is None else flag for case, flag in zip(cases, flags, strict=True)]
    predictions = [says_change([case.answers[-1]]) if case.answers[-1].strip() else None for case in cases]
    result["yes_no_from_captions"] = score_yes_no(predictions, truths)
    return result


def _open(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    result = _texts(cases, protocol, intervals)
    exact = [_same(case, case.answers[-1], case.row["turns"][-1]["answer"], "open") for case in cases]
    for case, right in zip(cases, exact, strict=True):
        case.parts["exact"] = (right, 1)
    result["exact"] = float(np.mean(exact))
    return result


def _dialogue(cases: list[Case], protocol: Protocol | None, intervals: bool) -> dict:
    right, consistent, unparsed = [], [], 0
    for case in cases:
        tasks = [question_task(turn["question"], case.classes) for turn in case.row["turns"]]
        turns = list(zip(tasks, case.answers, case.row["turns"], strict=True))
        right.append([_same(case, answer, turn["answer"], task) for task, answer, turn in turns])
        case.score = float(np.mean(right[-1]))
        case.parts = {"turns": (sum(right[-1]), len(right[-1])), "whole": (all(right[-1]), 1)}
        read = {task: case.read(answer, task) for task, answer, _ in turns if task in _READ}
        unparsed += sum(value is None for value in read.values())
        if "binary" in read and "count" in read:
            counts = read["count"]
            consistent.append(read["binary"] is not None and counts is not None and read["binary"] == any(counts))
            case.parts["consistent"] = (consistent[-1], 1)
    result: dict[str, Any] = {**score_dialogues(right), "unreadable_truths": 0, "unparsed": unparsed}
    if consistent:
        result["consistent"] = float(np.mean(consistent))
    if intervals:
        result["intervals"] = {"whole": _interval([all(turns) for turns in right])}
    return result


def _same(case: Case, answer: str, truth: str, task: str) -> bool:
    """Whether two answers say the same: as read by the task's grammar, or word for word where that cannot read it."""
    if task in _READ:
        one, other = case.read(answer, task), case.read(truth, task)
        if other is not None:
            return one is not None and bool(np.array_equal(np.asarray(one), np.asarray(other)))
    return _plain(answer) == _plain(truth)


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(". ")


SCORERS: dict[str, Callable[[list[Case], Protocol | None, bool], dict]] = {
    "caption": _caption,
    "binary": _binary,
    "count": _count,
    "grid": _grid,
    "open": _open,
    "dialogue": _dialogue,
}
