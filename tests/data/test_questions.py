"""Questions and answers: the fixed wordings, and that an answer says what the facts say."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltavlm_hf.data.questions import (
    CELLS,
    INSTRUCTIONS,
    NO_CHANGE,
    TASKS,
    Facts,
    format_count,
    format_grid,
    grid_cells,
    make_record,
    parse_count,
    parse_grid,
    read_facts,
)
from deltavlm_hf.data.scenes import ScenePair, generate_scene

CELL_FLAGS = st.lists(st.booleans(), min_size=9, max_size=9).map(np.array)


@st.composite
def facts(draw) -> Facts:
    return Facts(
        roads=draw(st.integers(0, 2)),
        buildings=draw(st.integers(0, 6)),
        road_cells=draw(CELL_FLAGS),
        building_cells=draw(CELL_FLAGS),
        buildings_by_cell=np.zeros(9, int),
    )


def scene_with(mask: np.ndarray, roads: int = 0, buildings=()) -> ScenePair:
    image = np.zeros((*mask.shape, 3), np.uint8)
    return ScenePair(image, image, mask, roads, np.array(buildings, float).reshape(-1, 2))


def test_grid_is_named_from_the_top_left():
    mask = np.zeros((96, 96), np.uint8)
    mask[:10, 70:80] = 255
    mask[40:50, 40:50] = 128
    found = read_facts(scene_with(mask, roads=1, buildings=[(5, 75)]))
    assert [cell for cell, listed in zip(CELLS, found.building_cells, strict=True) if listed] == ["top-right"]
    assert [cell for cell, listed in zip(CELLS, found.road_cells, strict=True) if listed] == ["center-center"]
    assert found.buildings_by_cell.tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert format_grid(found) == "roads: [center-center] buildings: [top-right]"
    assert format_count(found) == "1 new road, 1 new building"


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.005, 0.01, 0.1]))
def test_grid_cells_against_brute_force(seed, fraction):
    changed = np.random.default_rng(seed).random((30, 30)) < 0.02
    expected = []
    for row in range(3):
        for column in range(3):
            count = sum(
                changed[y, x] for y in range(10 * row, 10 * row + 10) for x in range(10 * column, 10 * column + 10)
            )
            expected.append(count > 0 and count / 100 >= fraction)
    assert grid_cells(changed, fraction).tolist() == expected


@given(facts())
def test_count_answers_parse_back(found):
    assert parse_count(format_count(found)) == (found.roads, found.buildings)


@given(facts())
def test_grid_answers_parse_back(found):
    roads, buildings = parse_grid(format_grid(found))
    assert roads.tolist() == found.road_cells.tolist()
    assert buildings.tolist() == found.building_cells.tolist()


@pytest.mark.parametrize(
    "answer", ["", "yes", "roads: [top-middle] buildings: []", "2 roads", "roads: [ buildings: ]"]
)
def test_answers_that_do_not_parse(answer):
    assert parse_count(answer) is None
    assert parse_grid(answer) is None


@pytest.mark.parametrize("task", TASKS)
def test_records(task):
    for seed in range(40):
        found = read_facts(generate_scene(seed))
        record = make_record(found, task, np.random.default_rng(seed))
        assert record == make_record(found, task, np.random.default_rng(seed))
        assert len(record.turns) == (3 if task == "dialogue" else 1)
        question, answer = record.turns[0]
        assert question and answer
        if task in INSTRUCTIONS:
            assert question == INSTRUCTIONS[task]
        if task == "binary":
            assert answer == ("yes" if found.changed else "no")
        if task == "caption":
            assert (answer in NO_CHANGE) == (not found.changed)
            assert ("road" in answer, "building" in answer) == (found.roads > 0, found.buildings > 0)


def test_paraphrases():
    found = read_facts(generate_scene(0))
    rng = np.random.default_rng(0)
    questions = {make_record(found, "grid", rng, paraphrase=1.0).turns[0][0] for _ in range(30)}
    assert len(questions) > 1 and INSTRUCTIONS["grid"] not in questions


def test_unknown_task():
    with pytest.raises(ValueError, match="Unknown task 'segment', expected one of caption, binary"):
        make_record(read_facts(generate_scene(0)), "segment", np.random.default_rng(0))
