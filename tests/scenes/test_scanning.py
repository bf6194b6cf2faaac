"""A scan: what is said of tiles is what the model says of such pairs, and every tile is asked once."""

import json
import os
import signal
import subprocess
import sys
import time

import geopandas
import numpy as np
import pytest
import torch
from geo_rasters import as_reflectance, lay_out, rewarp, write_raster
from processes import run_python

from deltavlm_hf import ask_pairs
from deltavlm_hf.cli import main
from deltavlm_hf.data.questions import INSTRUCTIONS, parse_count
from deltavlm_hf.scenes import scan, to_geodataframe
from deltavlm_hf.scenes.scanning import answer_tiles, open_scene

SEEDS = (2, 3, 8, 10, 0, 12, 5, 13, 22)
THREE = [INSTRUCTIONS[task] for task in ("binary", "count", "grid")]


@pytest.fixture(scope="module")
def mosaic():
    """Three by three scenes: before, after, and the scenes."""
    before, after, scenes = lay_out(SEEDS, 3)
    assert 2 < sum(scene.changed for scene in scenes) < 8
    return before, after, scenes


@pytest.fixture(scope="module")
def files(mosaic, tmp_path_factory):
    """The mosaic of 8 bits, as files."""
    folder = tmp_path_factory.mktemp("mosaic")
    return [write_raster(folder / f"{date}.tif", image) for date, image in enumerate(mosaic[:2], start=1)]


def test_the_sum_over_a_mosaic_is_that_of_its_tiles(tiny_model, tiny_processor, mosaic, files):
    pairs = [(scene.before, scene.after) for scene in mosaic[2]]
    expected = list(ask_pairs(tiny_model, tiny_processor, pairs, THREE))
    answers = list(scan(tiny_model, tiny_processor, *files))
    assert [list(answer.answers) for answer in answers] == expected
    assert [answer.changed for answer in answers] == [texts[0] == "yes" for texts in expected]
    layer = to_geodataframe(answers)
    counts = [parse_count(texts[1]) for texts in expected]
    assert layer.roads.sum() == sum(roads for roads, _ in counts)
    assert layer.buildings.sum() == sum(buildings for _, buildings in counts)
    cells = to_geodataframe(answers, "cells")
    said = [answer.meaning for answer in answers]
    assert len(cells) == sum(len(each["road_cells"] + each["building_cells"]) for each in said) > 5
    for _, cell in cells.iterrows():
        (tile,) = layer[layer.tile == cell.tile].geometry
        assert tile.covers(cell.geometry) and cell.geometry.area == pytest.approx(16**2)


def test_other_bits_and_another_zone_change_little(tiny_model, tiny_processor, mosaic, files, tmp_path):
    paths = [write_raster(tmp_path / f"{number}.tif", as_reflectance(each)) for number, each in enumerate(mosaic[:2])]
    plain = [answer.changed for answer in scan(tiny_model, tiny_processor, *files)]
    same = scan(tiny_model, tiny_processor, *paths, stretch=(300, 2850))
    assert [answer.changed for answer in same] == plain
    elsewhere = rewarp(paths[1], tmp_path / "elsewhere.tif")
    other = list(scan(tiny_model, tiny_processor, paths[0], elsewhere, stretch=(300, 2850)))
    assert sum(answer.changed == what for answer, what in zip(other, plain, strict=True)) >= 8


def test_one_saturated_pixel_is_no_change_and_nodata_is_unknown(tiny_model, tiny_processor, mosaic, tmp_path):
    image = as_reflectance(mosaic[0])
    image[:, :60] = 0  # 36 of 96 columns of the first tiles are left
    before = write_raster(tmp_path / "before.tif", image, nodata=0)
    image[150, 200] = 65535
    after = write_raster(tmp_path / "after.tif", image, nodata=0)
    answers = list(scan(tiny_model, tiny_processor, before, after))
    assert [answer.changed for answer in answers] == [None, False, False] * 3
    assert {answer.reason for answer in answers if answer.changed is None} == {
        "0.38 of the ground is known at both dates, 0.5 is needed"
    }
    answers = list(scan(tiny_model, tiny_processor, before, after, min_valid=0.3))
    assert [answer.changed for answer in answers] == [False] * 9


def test_questions_by_task_or_in_own_words(tiny_model, tiny_processor, files):
    asked = ["count", "dialogue", "Are there new buildings?"]
    *_, answer = scan(tiny_model, tiny_processor, *files, questions=asked, limit=2)
    assert answer.source.questions[0] == INSTRUCTIONS["count"]
    assert len(answer.answers) == len(answer.source.questions) == 5
    assert answer.tile.index == 1 and answer.meaning["roads"] is not None and answer.changed is not None
    (answer,) = scan(tiny_model, tiny_processor, *files, questions=["What?"], limit=1)
    assert answer.changed is None and answer.reason is None


def test_masks_make_objects_that_know_no_cores(make_mask_model, tmp_path):
    model, processor = make_mask_model()
    torch.nn.init.zeros_(model.mask_decoder.classify.weight)
    model.mask_decoder.classify.bias.data[:2] = torch.tensor([0.2, 0.9]).logit()  # all is a building
    image = as_reflectance(lay_out(range(6), 3)[0])
    image[:, :20] = 0
    image[100:130, 140:170] = 0
    path = write_raster(tmp_path / "scene.tif", image, nodata=0)
    options = {"questions": ["Changed?"], "generate_kwargs": {"max_new_tokens": 1}}
    answers = list(scan(model, processor, path, path, **options))
    assert len(answers) > 12 and answers[0].source.facts["tiles_overlap"] and all(answer.changed for answer in answers)
    layer = to_geodataframe(answers, "objects")
    assert layer.kind.tolist() == ["building"] and layer.is_valid.all()
    pixels = 192 * 268 - 30 * 30
    assert layer.geometry.area.item() == pytest.approx(pixels * 0.25)
    assert layer.area_m2.item() == pytest.approx(pixels * 0.25, rel=1e-3)
    tiles = to_geodataframe(answers)
    assert tiles.building_m2.sum() == pytest.approx(layer.area_m2.item(), rel=1e-6)
    assert tiles.building_objects.sum() == 1 and (tiles.road_objects == 0).all()


def test_a_tile_that_cannot_be_read_costs_itself_alone(tiny_model, tiny_processor, mosaic, tmp_path):
    paths = [
        write_raster(tmp_path / f"{number}.tif", image, compress="deflate", blockxsize=96, blockysize=96)
        for number, image in enumerate(mosaic[:2])
    ]
    scene = open_scene(tiny_model, tiny_processor, *paths)
    for raster in scene.rasters:
        raster.close()
    paths[1].write_bytes(paths[1].read_bytes()[:-2000])  # of the last block
    answers = list(answer_tiles(tiny_model, tiny_processor, scene, questions=["binary"]))
    (failed,) = (answer for answer in answers if answer.failed)
    assert "Cannot read" in failed.reason and failed.changed is None and failed.tile.index == 8
    assert all(answer.answers for answer in answers if not answer.failed)


def test_a_scan_that_was_killed_goes_on(files, tmp_path, capsys):
    arguments = ["scan", *map(str, files), "--model", "tiny", "--overlap", "0.5", "--questions", "count"]
    arguments += ["--batch-size", "1"]
    journal, output = tmp_path / "killed.gpkg.journal" / "tiles.jsonl", tmp_path / "killed.gpkg"
    command = [sys.executable, "-m", "deltavlm_hf", *arguments, "--output", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    while process.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists() and not list(tmp_path.glob("*.gpkg"))
    header, first, *others = journal.read_text().splitlines()
    entry = json.loads(first)
    entry["answers"][0] = "7 new roads, 5 new buildings"
    journal.write_text("\n".join([header, json.dumps(entry), *others]) + "\n" + others[-1][:20])
    assert len(others) < 24
    assert main([*arguments, "--output", str(output), "--stretch", "0", "99"]) == 1
    assert "tiles.jsonl was made with" in capsys.readouterr().err
    assert main([*arguments, "--output", str(output)]) == 0
    assert not journal.parent.exists()
    whole = tmp_path / "whole.gpkg"
    assert main([*arguments, "--output", str(whole)]) == 0
    resumed, once = (geopandas.read_file(path, layer="tiles") for path in (output, whole))
    assert len(once) == 25 and resumed.loc[0, "roads"] == 7, "the first tile was not asked again"
    assert resumed[1:].equals(once[1:])


def test_what_a_scan_cannot_be_is_told(files, tmp_path, capsys):
    for wrong, message in (
        (["--output", str(tmp_path / "scan.shp")], "layers are written as .gpkg, .parquet, .geojson"),
        (["--preview", str(tmp_path / "scene.gif")], "scene.gif': expected a name that ends with .png or .jpg"),
        (["--heat", str(files[0])], "is a raster of the scene itself: choose another name"),
        (["--stretch", "high"], "--stretch high: expected two numbers, or `none`"),
        (["--overlap", "1"], "`overlap` is 1.0, expected 0 to 0.9 of a tile"),
        (["--resolution", "-1"], "`resolution` is -1.0, expected metres per pixel"),
        (["--min-valid", "0"], "`min_valid` is 0.0, expected a share above 0, up to 1"),
        (["--bands", "1", "2", "9"], "--bands 1 2 9: expected three of 1 to 3"),
    ):
        output = [] if "--output" in wrong else ["--output", str(tmp_path / "scan.gpkg")]
        assert main(["scan", *map(str, files), "--model", "tiny", *output, *wrong]) == 1
        said = capsys.readouterr().err
        assert "deltavlm: error: " in said and message in said.replace("\n", " ")
        assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["scan", *map(str, files), "--model", "tiny", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "memory, by arithmetic: " in said.out and "minutes for 9 tiles" in said.out
    assert "deltavlm: grid: 288 x 288 pixels of 0.5 x 0.5 m" in said.err
    assert not list(tmp_path.iterdir())
    assert np.isfinite(float(said.out.split("tiles one by one: ")[1].split(" ")[0]))


def test_without_the_packages_of_the_extra():
    code = """
    import contextlib, sys
    from deltavlm_hf.cli import main
    sys.modules["rasterio"] = None
    with contextlib.redirect_stderr(sys.stdout):
        main(["scan", "before.tif", "after.tif"])
    """
    assert run_python(code) == (
        "deltavlm: error: Scenes need more packages: "
        'pip install "deltavlm-hf[geo]", or in a checkout pip install -e ".[geo]"'
    )
