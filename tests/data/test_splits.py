"""Pairs as people have them: both dates in one folder, all splits at once, places on one side, masks and captions."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deltavlm_hf.cli import main
from deltavlm_hf.data import check_data, find_pairs, load_changechat
from deltavlm_hf.data.build import SPLITS, find_places, split_by_place
from deltavlm_hf.data.questions import NO_CHANGE


def save(path: Path, mask: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", (60, 60)) if mask is None else Image.fromarray(mask)).save(path)


def building(side: int = 12) -> np.ndarray:
    mask = np.zeros((60, 60), np.uint8)
    mask[5 : 5 + side, 5 : 5 + side] = 255
    return mask


@pytest.fixture
def flat(tmp_path) -> Path:
    """Twelve pairs of four cities in one folder, every other one with a new building."""
    folder = tmp_path / "flat"
    for city in ("ulm", "bonn", "kiel", "jena"):
        for number in range(3):
            for date in ("pre", "post"):
                save(folder / f"{city}_{number}_{date}.png")
            save(folder / f"{city}_{number}_mask.png", building(12 * (number % 2)))
    return folder


def read(folder: Path, split: str) -> dict[str, dict]:
    return {row["id"]: row for file in sorted(folder.glob(f"*_{split}*.json")) for row in json.loads(file.read_text())}


class TestBothDatesInOneFolder:
    def test_pairs_and_masks(self, flat):
        pairs = find_pairs(flat)
        assert [pair.name for pair in pairs][:2] == ["bonn_0", "bonn_1"] and len(pairs) == 12
        assert (pairs[0].before, pairs[0].after) == ("bonn_0_pre.png", "bonn_0_post.png")
        assert pairs[0].mask == flat / "bonn_0_mask.png"

    @pytest.mark.parametrize("where", ["label", "elsewhere"])
    def test_masks_in_a_folder(self, flat, where, tmp_path):
        folder = flat / "label" if where == "label" else tmp_path / "elsewhere"
        folder.mkdir()
        for path in flat.glob("*_mask.png"):
            path.rename(folder / path.name.replace("_mask", ""))
        pairs = find_pairs(flat, masks=None if where == "label" else folder)
        assert len(pairs) == 12 and pairs[0].mask == folder / "bonn_0.png"

    @pytest.mark.parametrize("name", ["ulm_0", "ulm_0.png", "ulm_0_pre.png", "ulm_0_post.png"])
    def test_captions_by_any_of_its_names(self, flat, name, tmp_path):
        (tmp_path / "captions.json").write_text(json.dumps({name: ["a house is built"]}))
        pairs = {pair.name: pair for pair in find_pairs(flat, tmp_path / "captions.json")}
        assert pairs["ulm_0"].captions == ("a house is built",) and pairs["ulm_1"].captions == ()

    def test_what_is_built_is_loaded_with_its_masks(self, flat, tmp_path, capsys):
        command = ["data", "build", "--images", str(flat), "--output", str(tmp_path / "out"), "--tasks", "count"]
        assert main(command) == 0
        rows = load_changechat(tmp_path / "out", flat, split="train", masks=True, cache_dir=tmp_path / "cache")
        assert len(rows) == 12
        for row in rows:
            changed = row["mask"].getextrema()[1] > 0
            assert (
                row["turns"][0]["answer"]
                == f"no new roads, {'1' if changed else 'no'} new building{'s' * (not changed)}"
            )

    def test_a_date_that_is_missing(self, flat):
        (flat / "ulm_0_post.png").unlink()
        with pytest.raises(ValueError, match="Images without their other date: ulm_0_pre.png"):
            find_pairs(flat)

    def test_two_of_one_name(self, flat):
        for date in ("before", "after"):
            save(flat / f"ulm_0_{date}.png")
        with pytest.raises(ValueError, match="Two pairs are named ulm_0"):
            find_pairs(flat)


class TestSplits:
    def build(self, *options: object) -> int:
        return main(["data", "build", *map(str, options), "--split", "all"])

    def test_by_place_in_one_call(self, flat, tmp_path, capsys):
        assert self.build("--images", flat, "--output", tmp_path / "out", "--places", r"^([a-z]+)_") == 0
        said = capsys.readouterr()
        assert "warning" not in said.err
        built = json.loads(said.out)
        assert list(built) == list(SPLITS) and sum(each["pairs"] for each in built.values()) == 12
        cities = {split: {row.partition("_")[0] for row in read(tmp_path / "out", split)} for split in SPLITS}
        assert all(cities.values()) and sum(map(len, cities.values())) == 4  # each city on one side
        rows = load_changechat(tmp_path / "out", flat, split="test", cache_dir=tmp_path / "cache")
        assert len(rows) == 4 * built["test"]["pairs"]
        for split, found in built.items():
            places = f"of {len(cities[split])} places: {', '.join(sorted(cities[split]))}"
            assert (
                f"{tmp_path / 'out'}: {found['pairs']} pairs in {split}, {found['changed']} changed, {places}"
                in said.err
            )
            assert ("one kind alone" in said.err) == any(
                each["changed"] in (0, each["pairs"]) for each in built.values()
            )

    def test_by_a_column(self, flat, tmp_path, capsys):
        names = sorted({path.name.rpartition("_")[0] for path in flat.iterdir()})
        lines = [f"{name},{'north' if index < 6 else 'south'}" for index, name in enumerate(names)]
        (tmp_path / "pairs.csv").write_text("\n".join(["name,side", *lines]))
        places = f"{tmp_path / 'pairs.csv'}:side"
        options = ["--images", flat, "--output", tmp_path / "out", "--places", places]
        assert self.build(*options, "--shares", 1, 0, 1) == 0
        assert list(json.loads(capsys.readouterr().out)) == ["train", "test"]
        north = {row.rpartition("-")[0] in names[:6] for row in read(tmp_path / "out", "train")}
        assert len(north) == 1
        assert self.build(*options, "--overwrite") == 1
        assert "There are 2 places, and each of train, val, test needs one" in capsys.readouterr().err

    def test_folders_of_splits_and_a_place_on_both_sides(self, tmp_path, capsys):
        for split, names in (("train", ["ulm_1", "ulm_2", "bonn_1"]), ("test", ["ulm_3", "kiel_1"])):
            for name in names:
                for part in "AB":
                    save(tmp_path / "images" / split / part / f"{name}.png")
        captions = dict.fromkeys(["ulm_1", "ulm_2", "bonn_1", "ulm_3", "kiel_1"], ["a house is built"])
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        options = [
            "--images",
            tmp_path / "images",
            "--captions",
            tmp_path / "captions.json",
            "--output",
            tmp_path / "out",
        ]
        assert self.build(*options) == 0
        said = capsys.readouterr()
        assert {split: each["pairs"] for split, each in json.loads(said.out).items()} == {"train": 3, "test": 2}
        assert "warning" not in said.err and said.err.count("one kind alone") == 2
        assert self.build(*options, "--places", "(.+)_", "--overwrite") == 0
        told = capsys.readouterr().err
        assert "warning: 1 places are in more than one split" in told and "ulm (2 in train, 1 in test)" in told

    def test_nothing_is_written_if_one_is_there(self, flat, tmp_path, capsys):
        out = tmp_path / "out"
        out.mkdir()
        (out / "changechat_test_count.json").write_text("mine")
        assert self.build("--images", flat, "--output", out, "--places", "([a-z]+)") == 1
        assert "changechat_test_count.json exists" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == ["changechat_test_count.json"]

    @pytest.mark.parametrize(
        "places, words",
        [
            (None, "has no folders train, val and test. To split its pairs"),
            ("[a-z]+", "has no group: put the place in brackets"),
            ("(", "is no table with its column, nor an expression"),
            ("(ulm)", "These pairs have no place by '(ulm)': bonn_0"),
            ("{table}:city", "has the columns name, town; expected `name` and `city`"),
        ],
        ids=str,
    )
    def test_places_that_cannot_be_used(self, places, words, flat, tmp_path, capsys):
        (tmp_path / "t.csv").write_text("name,town\nulm_0,ulm\n")
        options = [] if places is None else ["--places", places.format(table=tmp_path / "t.csv")]
        assert self.build("--images", flat, "--output", tmp_path / "out", *options) == 1
        assert words in capsys.readouterr().err and not (tmp_path / "out").exists()

    def test_the_seed_chooses_and_pairs_are_kept(self, flat):
        pairs = find_pairs(flat)
        places = find_places([pair.name for pair in pairs], r"(.+)_\d")
        found = [split_by_place(pairs, places, seed=seed) for seed in (0, 0, 1, 2, 3)]
        assert found[0] == found[1] and any(other != found[0] for other in found[2:])
        for each in found:
            assert sorted(pair.name for split in each.values() for pair in split) == [pair.name for pair in pairs]
        with pytest.raises(ValueError, match="Expected three shares"):
            split_by_place(pairs, places, shares=(1, -1, 1))

    def test_options_that_need_all(self, flat, tmp_path, capsys):
        with pytest.raises(SystemExit):
            main(["data", "build", "--images", str(flat), "--output", str(tmp_path), "--places", "(.+)"])
        assert "--places and --shares go with --split all" in capsys.readouterr().err


class TestCaptionsAgainstMasks:
    @pytest.fixture
    def levir(self, tmp_path) -> Path:
        """Five pairs: masks know more than captions in `b`, and less in `c`; that of `e` has a speck."""
        captions = {}
        for name, side, text in (
            ("a", 12, "a house is built"),
            ("b", 12, None),
            ("c", 0, "trees are gone"),
            ("d", 0, None),
            ("e", 1, None),
        ):
            for part in "AB":
                save(tmp_path / "images" / "test" / part / f"{name}.png")
            save(tmp_path / "images" / "test" / "label" / f"{name}.png", building(side))
            captions[f"{name}.png"] = [text] if text else list(NO_CHANGE)
        (tmp_path / "captions.json").write_text(json.dumps(captions))
        command = ["data", "build", "--captions", str(tmp_path / "captions.json"), "--split", "test", "--name", "mine"]
        assert main([*command, "--images", str(tmp_path / "images"), "--output", str(tmp_path / "annotations")]) == 0
        return tmp_path

    def test_check_finds_them(self, levir):
        report = check_data(levir)
        problems = [problem for problem in report.problems if problem.kind == "caption against mask"]
        assert [problem.detail.partition(":")[0] for problem in problems] == ["test/A/b.png"]
        assert report.unmarked == ["test/A/c.png"] and report.masks == 5
        (note,) = report.notes
        assert "Of 5 pairs with masks, 1 did not change by their captions" in note and "40.00 % in all" in note
        assert report.to_dict()["problems_by_kind"]["caption against mask"] == 1

    def test_figures_with_and_without_them(self, levir):
        command = ["evaluate", "no-change", str(levir), "--tasks", "binary", "caption"]
        assert main([*command, "--output", str(levir / "results")]) == 0
        report = json.loads((levir / "results" / "report.json").read_text())
        assert report["settings"]["captions against masks"] == "2 of 5 pairs"
        with_them, without = report["systems"].values()
        assert list(report["systems"])[1] == "no-change, without pairs whose captions and masks differ"
        assert (with_them["binary"]["samples"], without["binary"]["samples"]) == (5, 3)
        assert with_them["binary"]["accuracy"] == pytest.approx(3 / 5)
        assert without["binary"]["accuracy"] == pytest.approx(2 / 3)
