"""From a folder of pairs with masks to a model card with figures, by the six commands of `examples/own_data.sh`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from transformers import AutoModelForImageTextToText

from deltavlm_hf.data.scenes import generate_scene

SCRIPT = Path(__file__).parents[1] / "examples" / "own_data.sh"
SETTINGS = {"MODEL": "tiny", "STEPS": "2", "MASKS": "", "PLACES": r"(.+)_\d+", "REPO": "someone/changes"}


@pytest.mark.slow
def test_from_masks_to_a_card(tmp_path):
    pairs, out = tmp_path / "my pairs", tmp_path / "out"
    for number in range(6):
        scene = generate_scene(7_700_000 + number)
        for part, image in (("A", scene.before), ("B", scene.after), ("label", scene.mask)):
            path = pairs / part / f"town {number // 2}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    given = sorted(pairs.rglob("*"))
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, **SETTINGS, "PATH": commands, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([SCRIPT, pairs, out], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.findall(r"^(\d)/6  \w.*:$", done.stdout, re.M) == list("123456")
    assert sorted(pairs.rglob("*")) == given

    places = [
        {item["image"][0].partition("_")[0] for file in files for item in json.loads(file.read_text())}
        for files in ((out / "annotations").glob(f"*_{split}*.json") for split in ("train", "val", "test"))
    ]
    assert sorted(map(len, places)) == [1, 1, 1] and len(set.union(*places)) == 3
    checked = json.loads((out / "check.json").read_text())
    assert checked["problems"] == [] and checked["masks"] == 6

    assert "2 pairs, 12 questions: 2 steps, 0 of warm-up, evaluated and saved every 1" in done.stderr
    recorded = json.loads((out / "checkpoint" / "training_run.json").read_text())["training"]
    assert (recorded["max_steps"], recorded["eval_steps"], recorded["learning_rate"]) == (2, 1, 3e-4)
    assert json.loads((out / "checkpoint" / "config.json").read_text())["weight_sources"]
    AutoModelForImageTextToText.from_pretrained(out / "model")
    assert not json.loads((out / "model" / "config.json").read_text()).get("weight_sources")

    (found,) = json.loads((out / "evaluation" / "report.json").read_text())["systems"].values()
    card = done.stdout.partition("\n6/6")[2]
    for name, value in (
        ("yes/no accuracy", found["binary"]["accuracy"]),
        ("buildings, exact count", found["count"]["buildings"]["exact"]),
        ("3x3 grid, buildings, micro-F1", found["grid"]["buildings"]["f1"]),
    ):
        assert f"| {name} | {round(value, 4)} |" in card
    assert "bytes to someone/changes" in card and "| training.max_steps | `2` |" in card
