"""What a chat model is told, and which of its answers are taken."""

import json
import re

import pytest
from local_endpoint import conversation

from deltavlm_hf.data.writing import Settings, describe, read_answer


def test_what_the_model_is_told(pairs):
    notes = describe(pairs[0])
    assert "- a house is built in scene a" in notes
    assert "no new roads, 1 new building" in notes and "buildings: [top-left]" in notes
    assert "- building, top-left, 100 pixels, box (2, 2, 12, 12)" in notes
    assert describe(pairs[3]).splitlines() == [
        "Captions by people who saw both images:",
        "- a house is built in scene d",
    ]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Sure! Here are four questions.", "Invalid JSON"),
        ('{"turns": [{"question": "Why so?", "answer": "Yes."}', "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"turns": [{"question": "Why so?"}]}', "turns.0.answer: Field required"),
        ('{"turns": [{"question": "Why so?", "answer": "  "}]}', "turns.0.answer: String should have at least 1"),
        ('{"turns": [{"question": "Why so?", "answer": 3}]}', "turns.0.answer: Input should be a valid string"),
        (json.dumps({"turns": [{"question": "Why so?", "answer": "x" * 601}]}), "at most 600 characters"),
        (conversation(3, "x"), "3 turns, expected 4"),
        (conversation(4, "x").replace("part 1", "PART 0"), "a question comes twice"),
    ],
)
def test_bad_answers_are_known(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_answer(text, "open", Settings("m"))


def test_the_example_is_no_answer():
    text = '{"turns": [{"question": "How many new houses are there?", "answer": "Three."}]}'
    with pytest.raises(ValueError, match="a turn is copied from the example"):
        read_answer(text, "open", Settings("m", questions=1))


def test_good_answers():
    expected = tuple((f"What of x, part {index}?", f"A road, {index}.") for index in range(4))
    for text in (conversation(4, "x"), f"```json\n{conversation(4, 'x')}\n```", f"\n```\n{conversation(4, 'x')}```\n"):
        assert read_answer(text, "open", Settings("m")) == expected
    assert len(read_answer(conversation(2, "x"), "dialogue", Settings("m"))) == 2
    with pytest.raises(ValueError, match="6 turns, expected 2 to 5"):
        read_answer(conversation(6, "x"), "dialogue", Settings("m"))
