"""What each question, and each mask, adds to a system's figures: kept beside a report, to compare it with others."""

import hashlib
from collections.abc import Iterator, Sequence

from .masks import SeenMasks
from .score import Case

RECORDS = "records.json"
# Task, number of the pair, digest of what was asked and what is right, and by figure the parts of its sums.
Parts = dict[str, Sequence[float]]
Entry = tuple[str, int, str, Parts]


def make_records(pairs: Sequence[Sequence[int]], cases: Sequence[Case], masks: SeenMasks | None) -> list[Entry]:
    """
    Args:
        pairs (`Sequence[Sequence[int]]`): the rows of each, see [`group_by_pair`].
        cases (`Sequence[Case]`): of one system, see [`evaluate_predictions`].
        masks ([`SeenMasks`], *optional*): the system's.
    """
    number_of = {row: number for number, pair in enumerate(pairs) for row in pair}
    found: list[Entry] = []
    for case in cases:
        asked = (case.row["id"], [(turn["question"], turn["answer"]) for turn in case.row["turns"]], case.references)
        parts: Parts = {name: [float(each) for each in numbers] for name, numbers in case.parts.items()}
        found.append((case.row["task"], number_of[case.index], _digest(asked), parts))
    if masks is not None:
        found += [("masks", number_of[row], digest, parts) for row, digest, parts in _of_masks(masks)]
    return found


def _of_masks(masks: SeenMasks) -> Iterator[tuple[int, str, Parts]]:
    for row, confusion in zip(masks.rows, masks.confusions, strict=True):
        truth, predicted = confusion.sum(1), confusion.sum(0)
        parts: Parts = {}
        for number, name in enumerate(masks.classes, start=1):
            sums = [float(each[number]) for each in (confusion.diagonal(), predicted, truth)]
            parts |= {f"{name} f1": sums, f"{name} iou": sums}
        yield row, _digest(dict(zip(masks.classes, truth[1:].tolist(), strict=True))), parts


def _digest(what: object) -> str:
    return hashlib.sha256(repr(what).encode()).hexdigest()[:12]
