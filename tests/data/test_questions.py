"""Questions and answers: the fixed wordings, and that an answer says what the facts say."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from deltavlm_hf.data.questions import (
    FOLLOW_UPS,
    INSTRUCTIONS,
    NO_CHANGE,
    PARAPHRASES,
    TASKS,
    describe_in_detail,
    format_count,
    format_grid,
    make_turns,
    name_task,
    parse_count,
    parse_grid,
    parse_yes_no,
    question_task,
    says_change,
)
from deltavlm_hf.data.rules import CELLS, Facts, Thresholds, read_facts
from deltavlm_hf.data.scenes import generate_scene

CELL_FLAGS = st.lists(st.booleans(), min_size=9, max_size=9).map(np.array)


@st.composite
def facts(draw) -> Facts:
    return Facts(
        counts=(draw(st.integers(0, 2)), draw(st.integers(0, 6))),
        cells=(draw(CELL_FLAGS), draw(CELL_FLAGS)),
        counts_by_cell=(np.zeros(9, int),) * 2,
    )


@given(facts())
def test_count_answers_parse_back(found):
    assert parse_count(format_count(found)) == (found.roads, found.buildings)


@given(facts())
def test_grid_answers_parse_back(found):
    roads, buildings = parse_grid(format_grid(found))
    assert roads.tolist() == found.road_cells.tolist()
    assert buildings.tolist() == found.building_cells.tolist()


WORDS = st.sampled_from(
    "yes no new road roads: building buildings two 3 1,000 top-left center [ ] , . ٣ ² \x00".split(" ")
)


@given(st.text() | st.lists(WORDS).map(" ".join))
@example("9" * 5000 + " new roads, 1 new building")
@example("no " * 10_000 + "roads or buildings")
def test_any_text_is_read_or_not(text):
    assert parse_yes_no(text) in (True, False, None)
    counts, grid = parse_count(text), parse_grid(text)
    assert counts is None or all(0 <= number < 10**9 for number in counts)
    assert grid is None or all(cells.shape == (9,) and cells.dtype == bool for cells in grid)
    assert question_task(text) in TASKS
    assert says_change([text]) in (True, False)


@pytest.mark.parametrize(
    "answer, counts",
    [
        ("There are no changes in roads or buildings.", (0, 0)),
        ("no new roads or buildings", (0, 0)),
        ("No roads has changed, and no buildings has changed.", (0, 0)),
        ("There are 2 new roads and 13 new buildings.", (2, 13)),
        ("a new road and ten buildings", (1, 10)),
        ("3 buildings and one road have changed", (1, 3)),
        ("1,000 buildings, 2 roads", (2, 1000)),
        ("There are no changes in buildings or roads.", (0, 0)),
        ("No changes in roads, 3 new buildings.", (0, 3)),
        ("zero roads, zero buildings", (0, 0)),
        ("three newly built buildings and one new road", (1, 3)),
        ("Roads: 1, Buildings: 3", (1, 3)),
        ("2 new roads,3 new buildings", (2, 3)),
        ("There are 1 new road and 3 new buildings", (1, 3)),
        ("twelve roads and two buildings", (12, 2)),
    ],
)
def test_counts_in_other_words(answer, counts):
    assert parse_count(answer) == counts


@pytest.mark.parametrize(
    "answer",
    [
        "roads: ['top-left', 'center-center'] buildings: []",
        'Roads: ["center-center","top-left"], Buildings: [].',
        "roads [top-left, center-center] buildings []",
        "buildings: [], roads: [center-center, top-left]",
        "road: [top-left, center-center] and building: []",
        '{"roads": ["top-left", "center-center"], "buildings": []}',
        "roads : [top left, center] buildings : []",
        "- roads: [top-left, center-center]\n- buildings: []",
    ],
)
def test_grids_in_other_forms(answer):
    roads, buildings = parse_grid(answer)
    assert [cell for cell, listed in zip(CELLS, roads, strict=True) if listed] == ["top-left", "center-center"]
    assert not buildings.any()


@pytest.mark.parametrize(
    "answer, truth",
    [
        ("Yes", True),
        ("no.", False),
        (" YES! ", True),
        ("**Yes**", True),
        ('"No" .', False),
        ("Yes, the images have changed.", True),
        ("No. There is no change.", False),
        ("no new roads", None),
        ("yes and no", None),
        ("yesterday", None),
        ("Notably, yes", None),
        ("", None),
    ],
)
def test_yes_no(answer, truth):
    assert parse_yes_no(answer) is truth


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "yes",
        "roads: [top-middle] buildings: []",
        "roads: [] roads: []",
        "10 to 12 new buildings, 1 new road",
        "2 roads",
        "roads: [ buildings: ]",
        "²  roads, ² buildings",
    ],
)
def test_answers_that_do_not_parse(answer):
    assert parse_count(answer) is None
    assert parse_grid(answer) is None


def scene_facts(seed: int) -> Facts:
    return read_facts(generate_scene(seed).mask, Thresholds.for_size(96))


@pytest.mark.parametrize("task", TASKS)
def test_turns(task):
    for seed in range(40):
        found = scene_facts(seed)
        turns = make_turns(task, found, np.random.default_rng(seed))
        assert turns == make_turns(task, found, np.random.default_rng(seed))
        assert len(turns) == (3 if task == "dialogue" else 1)
        question, answer = turns[0]
        assert question and answer
        if task in INSTRUCTIONS:
            assert question == INSTRUCTIONS[task]
        if task == "binary":
            assert answer == ("yes" if found.changed else "no")
        if task == "caption":
            assert (answer in NO_CHANGE) == (not found.changed)
            assert ("road" in answer, "building" in answer) == (found.roads > 0, found.buildings > 0)


def test_captions_go_before_what_is_counted():
    captions = ("a lake appears", "some trees are replaced by a lake")
    nothing = read_facts(np.zeros((9, 9), np.uint8))
    rng = np.random.default_rng(0)
    assert make_turns("caption", nothing, rng, captions)[0][1] in captions
    assert make_turns("binary", nothing, rng, captions)[0][1] == "yes"
    assert make_turns("binary", None, rng, NO_CHANGE)[0][1] == "no"
    dialogue = make_turns("dialogue", nothing, rng, captions)
    assert [question for question, _ in dialogue] == [INSTRUCTIONS["binary"], *FOLLOW_UPS]
    assert [answer for _, answer in dialogue] == ["yes", "no new roads, no new buildings", captions[1]]


def test_many_objects_have_words():
    mask = np.zeros((90, 90), np.uint8)
    mask[1::6, 1::6] = 255
    found = read_facts(mask, Thresholds(1, 100))
    assert found.buildings == 225 and not found.building_cells.any()
    assert describe_in_detail(found) == "225 buildings are built"
    assert make_turns("caption", found, np.random.default_rng(0))[0][1].startswith("225 buildings are")


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_paraphrases(task):
    found = scene_facts(0)
    rng = np.random.default_rng(0)
    questions = {make_turns(task, found, rng, paraphrase=1.0)[0][0] for _ in range(30)}
    assert questions == set(PARAPHRASES[task])


def test_tasks_are_told_from_questions():
    for task in TASKS:
        assert name_task(make_turns(task, scene_facts(0), np.random.default_rng(0), paraphrase=0.5)) == task
    assert name_task((("please determine how many roads and buildings have changed", "2"),)) == "count"
    assert [question_task(question) for question in FOLLOW_UPS] == ["count", "caption"]


@pytest.mark.parametrize(
    "captions, truth",
    [(NO_CHANGE, False), (["There is no difference ."], False), ([NO_CHANGE[0], "a road is built"], True)],
)
def test_captions_that_tell_of_a_change(captions, truth):
    assert says_change(captions) is truth


def test_what_cannot_be_made():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="Unknown task 'segment', expected one of caption, binary"):
        make_turns("segment", scene_facts(0), rng)
    with pytest.raises(ValueError, match="Task 'grid' needs a change mask."):
        make_turns("grid", None, rng, captions=["a road is built"])
    with pytest.raises(ValueError, match="Task 'binary' needs a change mask or captions."):
        make_turns("binary", None, rng)
