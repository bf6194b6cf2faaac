"""The order and the mix of an epoch."""

from collections import Counter

import numpy as np
import pytest
from broken_images import BOMB

from deltavlm_hf.data import load_generated
from deltavlm_hf.training import PairAugmentation, TrainingRows
from deltavlm_hf.training.rows import RowSampler


@pytest.fixture(scope="module")
def many():
    return load_generated(60, 4_800_000)


def test_each_epoch_has_every_row_once_in_an_order_of_its_own(many):
    sampler = RowSampler(TrainingRows(many, seed=3), 8)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert keys == list(sampler)
        assert {number for _, number in keys} == {epoch}
        epochs.append([index for index, _ in keys])
        assert sorted(epochs[-1]) == list(range(len(many)))
    assert epochs[0] != epochs[1]
    other = RowSampler(TrainingRows(many, seed=4), 8)
    assert [index for index, _ in other] != epochs[0]


def test_rows_of_like_length_stand_together(many):
    rows = TrainingRows(many)

    def waste(grouped: bool) -> int:
        order = [rows.lengths[index] for index, _ in RowSampler(rows, 8, grouped)]
        return sum(max(order[at : at + 8]) - length for at in range(0, len(order), 8) for length in order[at : at + 8])

    assert waste(True) < 0.3 * waste(False)


def test_answers_to_one_question_stay_mixed(many):
    """Batches of like length must not be batches of one answer."""
    binary = many.filter(lambda task: task == "binary", input_columns="task")
    rows = TrainingRows(binary)
    answers = [rows[key]["turns"][0]["answer"] for key in RowSampler(rows, 6)]
    alike = sum(len(set(answers[at : at + 6])) == 1 for at in range(0, 60, 6))
    assert alike <= 2  # by chance 0.3 of the ten


def test_task_weights(many):
    rows = TrainingRows(many, task_weights={"grid": 3, "open": 0})
    drawn = Counter(rows[key]["task"] for epoch in range(5) for key in drawn_in(rows, epoch))
    assert drawn["open"] == 0
    assert drawn["grid"] / drawn["count"] == pytest.approx(3, rel=0.3)


def drawn_in(rows, epoch):
    sampler = RowSampler(rows, 8)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_bad_weights(many):
    with pytest.raises(ValueError, match="captions"):
        TrainingRows(many, task_weights={"captions": 1})
    with pytest.raises(ValueError, match="are negative or leave nothing"):
        TrainingRows(many, task_weights=dict.fromkeys(("caption", "binary", "count", "grid", "open", "dialogue"), 0))


def test_augmentation_changes_with_the_epoch_and_with_nothing_else(many):
    rows, twin = (TrainingRows(many, PairAugmentation(), seed=1) for _ in range(2))
    seen = [np.asarray(rows[0, epoch]["after"]) for epoch in range(6)]
    assert all(np.array_equal(image, twin[0, epoch]["after"]) for epoch, image in enumerate(seen))
    assert len({image.tobytes() for image in seen}) > 1


def test_images_are_read_by_the_one_reader(many):
    rows = TrainingRows(many.select([0]))
    assert set(rows[0]["before"]) == {"bytes", "path"}  # for the processor, which reads it within its bounds
    augmented = TrainingRows(many.select([0]).map(lambda row: row), PairAugmentation())
    augmented.rows = augmented.rows.map(lambda row: {**row, "after": {"bytes": BOMB, "path": "bomb.png"}})
    with pytest.raises(ValueError, match="cannot read 'bomb.png' as an image.*pixels"):
        augmented[0, 0]
