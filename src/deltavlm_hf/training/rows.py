"""What one epoch reads, and in which order; both follow from the seed and the epoch alone, so that runs can go on."""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ..data.masks import read_mask
from ..data.questions import check_tasks
from ..data.rows import undecoded
from ..processing.reading import read_image
from .augmentation import PairAugmentation

_BLOCK = 64
_GROUP = 50  # batches' worth of rows that are sorted by length together, as in Transformers


class TrainingRows(torch.utils.data.Dataset):
    """
    Rows for training, augmented. Without augmentation their images are undecoded: the processor reads them.

    Args:
        rows (`datasets.Dataset`): see [`load_changechat`], with `unroll=True` to learn every turn of dialogues.
        augmentation ([`PairAugmentation`], *optional*): by default none.
        task_weights (`Mapping[str, float]`, *optional*): how often rows of a task are drawn, relative to the others;
            1 for those that are not named, 0 leaves a task out. By default every row comes once in an epoch.
        seed (`int`, *optional*, defaults to 0): of the augmentation and the order.

    Raises:
        ValueError: for an unknown task, or weights that leave nothing.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        augmentation: PairAugmentation | None = None,
        task_weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ):
        self.rows = undecoded(rows)
        self.augmentation = augmentation
        self.seed = seed
        texts = rows.select_columns(["task", "turns"]).with_format(None)
        tasks, turns = texts["task"], texts["turns"]
        self.lengths = [_length(row) for row in turns]
        self.weights: np.ndarray | None = None
        if task_weights:
            check_tasks(list(task_weights))
            weights = np.array([task_weights.get(task, 1.0) for task in tasks], float)
            if (weights < 0).any() or not weights.any():
                raise ValueError(
                    f"`task_weights` {dict(task_weights)} are negative or leave nothing of {sorted(set(tasks))}."
                )
            self.weights = weights / weights.sum()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        """A row by its index, or by index and epoch, as [`RowSampler`] gives them: augmentation changes with both."""
        index, epoch = key if isinstance(key, tuple) else (key, 0)
        row = self.rows[index]
        if self.augmentation is None:
            return row
        row = {**row, **{date: read_image(row[date]) for date in ("before", "after")}}
        mask = read_mask(row) if "mask" in row else None
        if mask is not None:
            row["mask"] = Image.fromarray(mask)
        return self.augmentation(row, np.random.default_rng([self.seed, epoch, index]))


def _length(turns: list[dict[str, str]]) -> int:
    """
    Characters, those of answers in whole blocks: else "yes" and "no" would be learnt in batches of their own, each
    undoing the other.
    """
    answers = sum(len(turn["answer"]) for turn in turns)
    return sum(len(turn["question"]) for turn in turns) + -(-answers // _BLOCK) * _BLOCK


class RowSampler(torch.utils.data.Sampler):
    """
    The order of an epoch: at random by task weights; rows of like length stand together.

    Args:
        rows ([`TrainingRows`]).
        batch_size (`int`): what one step takes over all processes.
        group_by_length (`bool`, *optional*, defaults to `True`).
    """

    def __init__(self, rows: TrainingRows, batch_size: int, group_by_length: bool = True):
        self.rows = rows
        self.batch_size = batch_size
        self.group_by_length = group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch; `Trainer` does."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng([self.rows.seed, self.epoch])
        number = len(self.rows)
        # Without weights a permutation, else drawn with replacement.
        order = rng.choice(number, number, replace=self.rows.weights is not None, p=self.rows.weights).tolist()
        if self.group_by_length:
            order = self._group(order, rng)
        return ((index, self.epoch) for index in order)

    def _group(self, order: list[int], rng: np.random.Generator) -> list[int]:
        size = self.batch_size * _GROUP
        batches = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=lambda index: -self.rows.lengths[index])
            batches += [group[at : at + self.batch_size] for at in range(0, len(group), self.batch_size)]
        last = [batches.pop()] if len(batches[-1]) < self.batch_size else []  # a short one stays at the end
        rng.shuffle(batches)
        return [index for batch in (*batches, *last) for index in batch]
