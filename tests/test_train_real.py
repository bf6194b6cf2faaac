"""The recipe for real pairs, on made ones: every stage, stopped and gone on with, to a model that loads."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from deltavlm_hf import ChangeSession, predict_mask
from deltavlm_hf.data.scenes import generate_scene

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "train_tiles_1m": (512, 2),
    "train_cells": (256, 2),
    "train_cells_jittered": (256, 2),
    "val_cells": (256, 3),
    "val_cells_b": (256, 3),
    "val_tiles_1m": (512, 1),
    "xian_cells": (256, 2),
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Generated pairs in the form of the real ones; `val_cells_b` shows the places of `val_cells` again."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for kind, (size, count) in FOLDERS.items():
        for part in ("A", "B", "label"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(count):
            scene = generate_scene(number + size, size)
            name = f"item_{number}"
            Image.fromarray(scene.before).save(folder / kind / "A" / f"{name}.jpg")
            Image.fromarray(scene.after).save(folder / kind / "B" / f"{name}.jpg")
            Image.fromarray(scene.mask > 0).save(folder / kind / "label" / f"{name}.png")
            place = {"parent_tile": f"tile_{number}", "parent_cell": "00"} if kind.startswith("val_cells") else {}
            rows.append({"set": kind, "name": name, "parent_tile": "", "parent_cell": "", **place})
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def command(data: Path, keep: Path, *options: str) -> list[str]:
    script = [sys.executable, str(ROOT / "examples" / "train_real.py"), "--data", str(data), "--keep", str(keep)]
    return [*script, "--from-scratch", *options]


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    keep = tmp_path_factory.mktemp("run")
    done = subprocess.run(
        command(data, keep, "--scale", "0.0006", "--output", str(keep / "model")), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return keep


def test_the_model_loads_and_answers(trained):
    model = AutoModelForImageTextToText.from_pretrained(trained / "model")
    processor = AutoProcessor.from_pretrained(trained / "model")
    assert model.config.vision_config.model_type == "efficientnet_lite"
    assert model.config.mask_classes == ["road", "building"] and model.config.mask_evidence
    assert (trained / "model" / "model.safetensors").stat().st_size < 16e6
    rng = np.random.default_rng(0)
    before, after = (Image.fromarray(rng.integers(0, 256, (256, 256, 3), dtype=np.uint8)) for _ in range(2))
    assert isinstance(ChangeSession(model, processor, before, after).ask("What changed?", max_new_tokens=4), str)
    assert predict_mask(model, processor, before, after).shape == (256, 256)


def test_every_stage_says_how_good_it_is(trained):
    figures = json.loads((trained / "model" / "evaluation.json").read_text())
    assert list(figures) == ["eyes", "language", "align", "reread", "speak", "settle"]
    assert figures["eyes"]["masks"].keys() >= {"pixel_f1", "yes_no", "buildings_exact", "grid_f1", "cells_exact"}
    for name in ("speak", "settle"):
        assert figures[name]["words"].keys() >= {"yes_no", "buildings_exact", "grid_f1", "unread"}
    assert all(found["minutes"] >= 0 for found in figures.values())


def test_finished_stages_are_kept(trained, data):
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*.pt")}
    again = subprocess.run(command(data, trained, "--scale", "0.0006"), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in trained.glob("*.pt")} == before


def test_a_stage_that_was_killed_ends_as_if_it_had_not_been(data, tmp_path):
    """To the last bit: what is drawn at random depends on the step alone."""
    script = (ROOT / "examples" / "train_real.py").read_text()
    options = ("--scale", "0.005", "--stages", "language")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code = script.replace("CHECKPOINT_SECONDS = 120", "CHECKPOINT_SECONDS = 1")
    assert code != script
    (tmp_path / "train_real.py").write_text(code)
    (tmp_path / "train_tiny.py").write_text((ROOT / "examples" / "train_tiny.py").read_text())
    run = [sys.executable, str(tmp_path / "train_real.py"), "--data", str(data), "--from-scratch", *options, "--keep"]
    assert subprocess.run([*run, str(whole)], capture_output=True).returncode == 0
    process = subprocess.Popen([*run, str(parts)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (parts / "language_unfinished.pt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (parts / "language.pt").exists()
    assert subprocess.run([*run, str(parts)], capture_output=True).returncode == 0
    found, expected = (torch.load(folder / "language.pt", weights_only=True) for folder in (parts, whole))
    assert all(torch.equal(found["weights"][name], weight) for name, weight in expected["weights"].items())


def test_tables_of_a_model(trained, data, tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "real_pairs.py"), "--model", str(trained / "model")]
        + ["--data", str(data), "--output", str(tmp_path), "--generated", "4"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "real.json").read_text())
    assert results["sets"]["Validation cells at 0.5 m"]["pairs"] == 3  # those of `val_cells_b` are the same
    assert results["sets"]["Validation cells at 1 m"]["pairs"] == 16
    for found in results["sets"].values():
        assert 0 <= found["words"]["yes_no"] <= 1 and 0 <= found["masks"]["pixel_f1"] <= 1
    same = results["sets"]["The first date against itself"]["masks"]
    assert same["yes_no"] == 1 - same["false_alarms"]
    low, high = results["sets"]["Validation cells at 0.5 m"]["words_95"]["yes_no"]
    assert 0 <= low <= high <= 1
    report = (tmp_path / "real.md").read_text()
    assert "shifted by 4 px" in report and "swapped: gone" in report
    assert load_file(trained / "model" / "model.safetensors")
