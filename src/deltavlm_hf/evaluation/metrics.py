"""
Figures for yes/no, counts, 3x3 grids and dialogues, from what was read out of the answers.

An answer that could not be read is None. It counts as wrong and has a figure of its own, `unparsed`; it is never left
out. A ratio with nothing to divide by is 0.
"""

from collections.abc import Callable, Sequence

import numpy as np

CONFIDENCE, RESAMPLES = 0.95, 1000


def score_yes_no(predictions: Sequence[bool | None], truths: Sequence[bool]) -> dict[str, float | int]:
    """
    Accuracy, precision, recall, F1 and F0.5 of "changed".

    An answer that could not be read is wrong whatever the truth is: a change it should have found is missed, and where
    nothing changed it is a false alarm.

    Args:
        predictions (`Sequence[bool | None]`): what was answered.
        truths (`Sequence[bool]`): whether the pair changed.

    Returns:
        `dict`: `accuracy`, `precision`, `recall`, `f1`, `f0.5`; `true_positives`, `false_positives`,
        `false_negatives`, `true_negatives`; `unparsed`, `samples`.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    _check(predictions, truths)
    for value in (*predictions, *truths):
        if not (value is None or isinstance(value, bool | np.bool_)):
            raise ValueError(f"Expected True or False, or None for what could not be read; got {value!r}.")
    pairs = [
        (not truth if prediction is None else prediction, truth)
        for prediction, truth in zip(predictions, truths, strict=True)
    ]
    outcomes = ((True, True), (True, False), (False, True), (False, False))  # prediction, truth
    found, alarms, missed, rejected = map(pairs.count, outcomes)
    precision, recall = _ratio(found, found + alarms), _ratio(found, found + missed)
    return {
        "accuracy": _ratio(found + rejected, len(pairs)),
        "precision": precision,
        "recall": recall,
        "f1": _f_score(precision, recall, 1.0),
        "f0.5": _f_score(precision, recall, 0.5),
        "true_positives": found,
        "false_positives": alarms,
        "false_negatives": missed,
        "true_negatives": rejected,
        "unparsed": sum(prediction is None for prediction in predictions),
        "samples": len(pairs),
    }


def score_counts(predictions: Sequence[int | None], truths: Sequence[int]) -> dict[str, float | int]:
    """
    Mean absolute error, root mean square error and share of exact counts, for one class.

    An answer that could not be read is not exact, and its error is that of answering 0.

    Args:
        predictions (`Sequence[int | None]`): the numbers that were answered.
        truths (`Sequence[int]`): the right numbers.

    Returns:
        `dict`: `mae`, `rmse`, `exact`, `unparsed`, `samples`.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    _check(predictions, truths)
    errors = np.array(
        [(prediction or 0) - truth for prediction, truth in zip(predictions, truths, strict=True)], float
    )
    return {
        "mae": float(np.abs(errors).mean()),
        "rmse": float(np.sqrt(np.square(errors).mean())),
        "exact": float(np.mean([prediction == truth for prediction, truth in zip(predictions, truths, strict=True)])),
        "unparsed": sum(prediction is None for prediction in predictions),
        "samples": len(errors),
    }


def score_grids(predictions: Sequence[np.ndarray | None], truths: Sequence[np.ndarray]) -> dict[str, float | int]:
    """
    Figures of listing the right cells, for one class.

    An answer that could not be read has every cell wrong, as if all others had been listed: it can never be right by
    chance.

    Args:
        predictions (`Sequence[np.ndarray | None]`): `(9,)` bool each, the cells that were listed.
        truths (`Sequence[np.ndarray]`): `(9,)` bool each, the right cells.

    Returns:
        `dict`: `hamming` (share of wrong cells); `precision`, `recall`, `f1` over all cells of all pairs (micro);
        `jaccard` averaged over pairs, where a pair with nothing in truth and answer counts 0 (as in scikit-learn, and
        so in the paper); `jaccard_empty_is_1`, where it counts 1; `subset_accuracy` (share of pairs with every cell
        right); `misses` and `false_alarms` by cell, row by row from the top left; `unparsed`, `samples`.

    Raises:
        ValueError: if the two differ in length or are empty.
    """
    _check(predictions, truths)
    truth = np.array([np.asarray(cells, bool) for cells in truths])  # (n, 9)
    prediction = np.array(
        [~right if cells is None else np.asarray(cells, bool) for cells, right in zip(predictions, truth, strict=True)]
    )
    if truth.shape[1:] != (9,) or prediction.shape != truth.shape:
        raise ValueError(f"Expected 9 cells for each pair, got shapes {prediction.shape} and {truth.shape}.")
    hits = int((prediction & truth).sum())
    precision, recall = _ratio(hits, int(prediction.sum())), _ratio(hits, int(truth.sum()))
    both, either = (prediction & truth).sum(1), (prediction | truth).sum(1)
    jaccard = both / np.maximum(either, 1)
    return {
        "hamming": float((prediction != truth).mean()),
        "precision": precision,
        "recall": recall,
        "f1": _f_score(precision, recall, 1.0),
        "jaccard": float(jaccard.mean()),
        "jaccard_empty_is_1": float(np.where(either == 0, 1.0, jaccard).mean()),
        "subset_accuracy": float((prediction == truth).all(1).mean()),
        "misses": (truth & ~prediction).sum(0).tolist(),
        "false_alarms": (prediction & ~truth).sum(0).tolist(),
        "unparsed": sum(cells is None for cells in predictions),
        "samples": len(truth),
    }


def score_dialogues(right: Sequence[Sequence[bool]]) -> dict[str, float | int | list[float]]:
    """
    How often dialogues are answered right: by turn, over all turns, and as a whole.

    Args:
        right (`Sequence[Sequence[bool]]`): for each dialogue, whether each of its turns was answered right.

    Returns:
        `dict`: `by_turn` (first turns, second turns, ...), `turns`, `whole`, `samples`.

    Raises:
        ValueError: if there is no dialogue, or one without turns.
    """
    if not right or not all(right):
        raise ValueError("Expected at least one dialogue, each with at least one turn.")
    longest = max(map(len, right))
    columns = [[turns[number] for turns in right if len(turns) > number] for number in range(longest)]
    return {
        "by_turn": [float(np.mean(column)) for column in columns],
        "turns": float(np.mean([turn for turns in right for turn in turns])),
        "whole": float(np.mean([all(turns) for turns in right])),
        "samples": len(right),
    }


def bootstrap_interval(
    score: Callable[[np.ndarray], float],
    samples: int,
    *,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """
    The percentile bootstrap confidence interval of a figure.

    Args:
        score (`Callable[[np.ndarray], float]`): the figure of the samples with these indices, `(samples,)` int.
        samples (`int`): how many there are.
        confidence (`float`, *optional*, defaults to 0.95).
        resamples (`int`, *optional*, defaults to 1000).
        seed (`int`, *optional*, defaults to 0).

    Returns:
        `tuple[float, float]`: lower and upper end.
    """
    rng = np.random.default_rng(seed)
    figures = [score(rng.integers(0, samples, samples)) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(figures, (tail, 1 - tail))
    return float(low), float(high)


def figure_of(name: str, sums: np.ndarray) -> np.ndarray | float:
    """
    A figure of the sums that it is made of.

    Args:
        name (`str`): of the figure; its last word says how: `f1` and `iou` of hits, predicted and true ones; `rmse` of
            squares and their number; `BLEU-4` of n-grams that are right (4), of all (4), of words said and wanted; any
            other, a mean, of values and their number.
        sums (`np.ndarray` of shape `(..., n)`).

    Returns:
        `np.ndarray` of shape `(...)`: 0 where there is nothing to divide by.
    """
    kind, parts = name.rpartition(" ")[2], np.moveaxis(np.asarray(sums, float), -1, 0)
    if kind == "BLEU-4":
        right, all_of_them, said, wanted = parts[:4], parts[4:8], parts[8], parts[9]
        bleu = np.prod((right + 1e-15) / (all_of_them + 1e-9), axis=0) ** 0.25  # as pycocoevalcap keeps off zero
        ratio = (said + 1e-15) / (wanted + 1e-9)
        return bleu * np.exp(np.minimum(0, 1 - 1 / ratio))
    if kind == "f1":
        return _divide(2 * parts[0], parts[1] + parts[2])
    if kind == "iou":
        return _divide(parts[0], parts[1] + parts[2] - parts[0])
    mean = _divide(parts[0], parts[1])
    return np.sqrt(mean) if kind == "rmse" else mean


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole != 0)


def _check(predictions: Sequence, truths: Sequence) -> None:
    if len(predictions) != len(truths) or not len(truths):
        raise ValueError(
            f"Expected as many predictions as truths, at least one; got {len(predictions)} and {len(truths)}."
        )


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _f_score(precision: float, recall: float, beta: float) -> float:
    return _ratio((1 + beta**2) * precision * recall, beta**2 * precision + recall)
