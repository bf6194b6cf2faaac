"""
How good a model's masks are: pixel by pixel, through the answers that the rules read off them, and whether its words
say the same. Masks are cheap: a run that goes on makes them anew.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import numpy as np
from accelerate.utils import gather_object
from tqdm import tqdm

from ..data.classes import ROADS_AND_BUILDINGS, Classes
from ..data.masks import class_values, read_mask
from ..data.questions import format_count, format_grid, parse_count, parse_grid, parse_yes_no, says_change
from ..data.rows import undecoded
from ..data.rules import Facts, Thresholds, marks_change, read_facts
from ..inference import predict_mask
from ..inference.processes import process_state
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..processing.reading import READING_ERRORS, read_image
from .answering import group_by_pair
from .metrics import bootstrap_interval

logger = logging.getLogger(__name__)

READ_OFF: dict[str, Callable[[Facts], str]] = {
    "binary": lambda facts: "yes" if facts.changed else "no",
    "count": format_count,
    "grid": format_grid,
}


@dataclass
class SeenMasks:
    """
    What a model's masks say about a data set.

    Attributes:
        classes (`list[str]`): the model's.
        facts (`dict[int, Facts | str]`): for each row what the rules read off its mask, or why there is none.
        confusions (`np.ndarray` of shape `(P, K + 1, K + 1)`): pixels of each pair with a mask, by what they are
            (rows) and what they were taken for; unchanged ones first, then those of each class.
        rows (`list[int]`): of each of these pairs its first row.
        unreadable (`int`): pairs that are left out, for their mask or images cannot be used.
    """

    classes: list[str]
    facts: dict[int, Facts | str]
    confusions: np.ndarray
    rows: list[int]
    unreadable: int


def see_masks(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    rows: datasets.Dataset,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> SeenMasks | None:
    """
    Predicts the mask of each pair, at the size of the true one or, without, of the second date. Processes share the
    work.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        rows (`Dataset`): see [`load_changechat`], with `masks=True`.
        classes ([`Classes`], *optional*): of the data set, see [`find_classes`]; by default roads and buildings.

    Returns:
        [`SeenMasks`] of all processes; None for a model without masks, or with others than of these classes.
    """
    names = model.config.mask_classes
    if not names or not set(names) <= {*classes.names}:
        return None
    state = process_state()
    rows = undecoded(rows.with_format(None))
    seen = []
    mine = group_by_pair(rows)[state.process_index :: state.num_processes]
    for pair in tqdm(mine, desc="masks", unit="pair", disable=not state.is_main_process):
        row, truth, confusion, is_whole = rows[pair[0]], None, None, True
        try:
            truth = read_mask(row, classes)
        except ValueError as error:
            logger.warning("%s", error)
            is_whole = False
        facts: Facts | str
        try:
            before, after = read_image(row["before"]), read_image(row["after"])
            size = None if truth is None else truth.shape
            mask = predict_mask(model, processor, before, after, size, classes)
        except READING_ERRORS as error:
            facts, is_whole = f"{type(error).__name__}: {error}", False
        else:
            facts = read_facts(mask, Thresholds.for_size(round(mask.size**0.5)), classes)
            confusion = None if truth is None else count_pixels(mask, truth, names, classes)
        seen.append((pair, facts, confusion, is_whole))
    seen = sorted(gather_object(seen), key=lambda found: found[0])
    confusions = {pair[0]: confusion for pair, _, confusion, _ in seen if confusion is not None}
    return SeenMasks(
        names,
        facts={index: facts for pair, facts, _, _ in seen for index in pair},
        confusions=np.array([*confusions.values()], int).reshape(-1, *(len(names) + 1,) * 2),
        rows=list(confusions),
        unreadable=sum(not is_whole for *_, is_whole in seen),
    )


def count_pixels(
    mask: np.ndarray, truth: np.ndarray, names: Sequence[str], classes: Classes = ROADS_AND_BUILDINGS
) -> np.ndarray:
    """
    Pixels by what they are and what they were taken for.

    Args:
        mask, truth (`np.ndarray` of shape `(H, W)`, uint8): predicted and true.
        names (`Sequence[str]`): of the classes that count; any other is as if nothing had changed.
        classes ([`Classes`], *optional*): whose values both have; by default roads and buildings.

    Returns:
        `np.ndarray` of shape `(K + 1, K + 1)`, int: one of [`SeenMasks`]'s confusions.
    """
    number_of = np.zeros(256, int)
    number_of[list(class_values(names, classes).values())] = range(1, len(names) + 1)
    size = len(names) + 1
    return np.bincount((number_of[truth] * size + number_of[mask]).ravel(), minlength=size**2).reshape(size, size)


def score_pixels(confusions: np.ndarray, classes: Sequence[str], *, intervals: bool = False) -> dict[str, Any]:
    """
    Figures of pixels, all pairs taken together as one.

    Args:
        confusions (`np.ndarray` of shape `(P, K + 1, K + 1)`): see [`SeenMasks`].
        classes (`Sequence[str]`).
        intervals (`bool`, *optional*, defaults to `False`): with 95 % bootstrap confidence intervals, over pairs.

    Returns:
        `dict`: `classes` with `precision`, `recall`, `f1`, `iou` and the number of `pixels` in truth of each; the same
        over all classes in `all` (hits, misses and false alarms added up); `miou`, the mean IoU of unchanged pixels
        and of classes that the data mark at all, `miou_of_classes` without the former; `accuracy`, the share of
        pixels that are right. None for a ratio with nothing to divide by.
    """
    figures = _score_pixels(confusions.sum(0), classes)
    if intervals:
        marked = {kind: each for kind, each in figures["classes"].items() if each["pixels"]}
        for way, each in ((("all",), figures["all"]), *((("classes", kind), each) for kind, each in marked.items())):
            if each["pixels"]:
                each["intervals"] = {
                    name: bootstrap_interval(partial(_figure_of, confusions, classes, (*way, name)), len(confusions))
                    for name in ("f1", "iou")
                }
    return figures


def _figure_of(confusions: np.ndarray, classes: Sequence[str], way: Sequence[str], chosen: np.ndarray) -> float:
    figure: Any = _score_pixels(confusions[chosen].sum(0), classes)
    for step in way:
        figure = figure[step]
    return figure or 0.0  # a draw without a pixel of the class has none right


def _score_pixels(confusion: np.ndarray, classes: Sequence[str]) -> dict[str, Any]:
    hits, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    each = [_overlap(*numbers) for numbers in zip(hits, truth, predicted, strict=True)]
    unchanged, *of_classes = each
    marked = [figures["iou"] for figures in of_classes if figures["pixels"]]
    return {
        "classes": dict(zip(classes, of_classes, strict=True)),
        "all": _overlap(hits[1:].sum(), truth[1:].sum(), predicted[1:].sum()),
        "miou": float(np.mean([unchanged["iou"], *marked])) if unchanged["pixels"] else None,
        "miou_of_classes": float(np.mean(marked)) if marked else None,
        "accuracy": _ratio(hits.sum(), confusion.sum()),
    }


def _overlap(hits: int, truth: int, predicted: int) -> dict[str, Any]:
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, truth),
        "f1": _ratio(2 * hits, truth + predicted),
        "iou": _ratio(hits, truth + predicted - hits),
        "pixels": int(truth),
    }


def _ratio(part: int, whole: int) -> float | None:
    return float(part / whole) if whole else None


def against_masks(
    rows: datasets.Dataset, pairs: Sequence[Sequence[int]], classes: Classes = ROADS_AND_BUILDINGS
) -> list[Sequence[int]]:
    """
    Those pairs whose mask marks a change while their flag, or captions, say that there is none, or marks none
    while these tell of one. LEVIR-MCI has such pairs: what is right of them depends on who is asked.

    Args:
        rows (`Dataset`): see [`load_changechat`], with `masks=True`.
        pairs (`Sequence[Sequence[int]]`): the rows of each, see [`group_by_pair`].
        classes ([`Classes`], *optional*): of the data set; by default roads and buildings.
    """
    rows = undecoded(rows.with_format(None))
    found = []
    for pair in pairs:
        of_pair = [rows[index] for index in pair]
        said = [row["changed"] for row in of_pair if row["changed"] is not None]
        said = said or [
            says_change(row["captions"] or [row["turns"][0]["answer"]]) for row in of_pair if row["task"] == "caption"
        ]
        if said and of_pair[0]["mask"] is not None:
            try:
                mask = read_mask(of_pair[0], classes)
            except ValueError:  # told where masks are scored
                continue
            if mask is not None and marks_change(mask, classes) != any(said):
                found.append(pair)
    return found


def answers_of_masks(rows: Iterable[dict], seen: SeenMasks) -> tuple[list[dict], list[dict]]:
    """
    What the masks answer to the questions of yes or no, counts and cells, in the form of [`predict`]: the rules read
    them as they read true ones.

    Args:
        rows (`Iterable[dict]`): all rows, without images.
        seen ([`SeenMasks`]): of these.

    Returns:
        `tuple[list[dict], list[dict]]`: rows of these tasks, and predictions for them.
    """
    asked, predictions = [], []
    for index, row in enumerate(rows):
        if row["task"] in READ_OFF:
            facts = seen.facts[index]
            said = {"error": facts} if isinstance(facts, str) else {"answers": [READ_OFF[row["task"]](facts)]}
            asked.append(row)
            predictions.append({"id": row["id"], **said})
    return asked, predictions


def score_agreement(rows: Iterable[dict], predictions: Sequence[dict], seen: SeenMasks) -> dict[str, Any]:
    """
    How often a model's words say what its own masks say. Answers that cannot be read, or that are not there, do not.

    Args:
        rows (`Iterable[dict]`): all rows, without images.
        predictions (`Sequence[dict]`): the model's answers, see [`predict`].
        seen ([`SeenMasks`]): its masks.

    Returns:
        `dict`: by task `samples` and shares: of each class that the model's masks have, such as `roads` and
        `buildings`, for counts and cells, and `all`. Empty if nothing was asked whose answer masks have.
    """
    found: dict[str, list[dict[str, bool]]] = {}
    for index, (row, prediction) in enumerate(zip(rows, predictions, strict=True)):
        facts = seen.facts[index]
        if row["task"] not in READ_OFF or isinstance(facts, str):
            continue
        (answer,) = prediction.get("answers") or [""]
        same = {}
        if row["task"] == "binary":
            same["all"] = parse_yes_no(answer) == facts.changed
        else:
            counting = row["task"] == "count"
            words: Any = (parse_count if counting else parse_grid)(answer, facts.classes)
            masks: Any = facts.counts if counting else facts.cells
            for number, each in enumerate(facts.classes):
                if each.name in seen.classes:
                    same[each.plural] = words is not None and np.array_equal(words[number], masks[number])
            same["all"] = all(same.values())
        found.setdefault(row["task"], []).append(same)
    return {
        task: {"samples": len(each), **{name: float(np.mean([same[name] for same in each])) for name in each[0]}}
        for task, each in found.items()
    }
