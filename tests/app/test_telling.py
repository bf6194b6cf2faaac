"""What the page says beside a model's own words."""

import re
import subprocess
import sys

import numpy as np
import pytest

import deltavlm_hf
from deltavlm_hf.app.telling import cells_so_far, explain_answer, explain_scan, join_grids, snippets, trained_on
from deltavlm_hf.data.questions import FOLLOW_UPS, INSTRUCTIONS, parse_grid
from deltavlm_hf.data.rules import CELLS


def cells(*names: str) -> list[bool]:
    return [cell in names for cell in CELLS]


class TestTheCard:
    def test_of_the_small_model(self):
        short, points = trained_on(deltavlm_hf.small())
        assert "LEVIR-CD" in short and "generated" in short and len(short) <= 90
        assert len(points) > 1 and not any("**" in point or "`" in point or "](" in point for point in points)

    def test_a_table_is_left_out(self, tmp_path):
        (tmp_path / "README.md").write_text(
            "# x\n\n## Training\n\n| a | b |\n|---|---|\n\nSome images.\n\n## Use\n\nNo."
        )
        assert trained_on(str(tmp_path)) == ("Some images.", ["Some images."])

    @pytest.mark.parametrize("card", [None, "# x\n\n## Use\n\nAnyhow."])
    def test_there_is_none_or_it_does_not_say(self, tmp_path, card):
        if card:
            (tmp_path / "README.md").write_text(card)
        assert trained_on(str(tmp_path)) == ("", [])


class TestCells:
    @pytest.mark.parametrize(
        "answer, roads, buildings",
        [
            ("roads: [", (), ()),
            ("roads: [top-ri", (), ()),
            ("roads: [top-right, bottom", ("top-right",), ()),
            ("roads: [top-right] buil", ("top-right",), ()),
            ("buildings: [top-left, x", (), ("top-left",)),
            ("roads: [] buildings: [top-left, center-center, bot", (), ("top-left", "center-center")),
            ("roads: [] buildings: [top-left]", (), ("top-left",)),
        ],
    )
    def test_they_are_read_as_they_come(self, answer, roads, buildings):
        found = cells_so_far(answer)
        assert found is not None and found[0].tolist() == cells(*roads) and found[1].tolist() == cells(*buildings)

    @pytest.mark.parametrize("answer", ["", "a road is built", "two roads, one building", "roads: [here, "])
    def test_none_in_other_answers(self, answer):
        assert cells_so_far(answer) is None

    def test_tiles_lie_side_by_side(self):
        grids = [None, *[parse_grid("roads: [top-left] buildings: [bottom-right]")] * 3]
        roads, buildings = (each.reshape(6, 6) for each in join_grids(grids, 2))
        assert np.argwhere(roads).tolist() == [[0, 3], [3, 0], [3, 3]]
        assert np.argwhere(buildings).tolist() == [[2, 5], [5, 2], [5, 5]]
        assert explain_scan(grids, 4) == (
            "4 of 4 tiles asked, roads changed in 3, buildings changed in 3, 1 gave no answer that can be drawn."
        )


class TestMeaning:
    @pytest.mark.parametrize(
        "question, answer, said",
        [
            (INSTRUCTIONS["binary"], "yes", "sees a change"),
            (INSTRUCTIONS["binary"], "no", "sees no change"),
            (INSTRUCTIONS["binary"], "perhaps", "not in the form"),
            (INSTRUCTIONS["count"], "1 new road, no new buildings", "counts 1 changed road and 0 changed buildings"),
            (INSTRUCTIONS["count"], "no new roads, no new buildings", "no changed road and no changed building"),
            (FOLLOW_UPS[0], "many", "not in the form"),
            (
                INSTRUCTIONS["grid"],
                "roads: [top-center] buildings: [center-center, bottom-left]",
                "roads in the top middle and buildings in the middle and bottom left.",
            ),
            (INSTRUCTIONS["grid"], "roads: [] buildings: []", "No cell"),
        ],
    )
    def test_of_answers_to_fixed_questions(self, question, answer, said):
        assert said in explain_answer(question, answer)

    def test_own_words_speak_for_themselves(self):
        assert explain_answer(INSTRUCTIONS["caption"], "a road is built") == ""
        assert explain_answer("Is there snow?", "no") == ""


class TestSnippets:
    def test_files_are_named_and_quoted(self):
        ways = snippets(deltavlm_hf.small(), "a b.tif", "c'.tif", "What's new?")
        assert "deltavlm_hf.small()" in ways["Python"] and '"c\'.tif"' in ways["Python"]
        assert ways["Command line"] == """deltavlm ask 'a b.tif' 'c'"'"'.tif' 'What'"'"'s new?' --model small"""
        for way in ("Python", "API"):
            compile(ways[way], way, "exec")

    def test_a_folder_is_not_told(self, tmp_path):
        assert not any(str(tmp_path) in code for code in snippets(str(tmp_path), "a", "b", "?").values())

    @pytest.mark.slow
    def test_the_one_for_python_runs(self, tmp_path):
        code = snippets(deltavlm_hf.tiny(), "before.png", "after.png", INSTRUCTIONS["binary"], seed=18)["Python"]
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert re.fullmatch(r"(yes|no)", done.stdout.strip()), done.stderr
