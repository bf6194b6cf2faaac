"""The model for real imagery that ships with the package, on generated scenes and on pictures of made houses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf import ChangeSession, ask_pairs, predict_mask
from deltavlm_hf.cli import main
from deltavlm_hf.data.questions import INSTRUCTIONS, parse_count, parse_grid, parse_yes_no
from deltavlm_hf.data.rules import Thresholds, read_facts
from deltavlm_hf.data.scenes import generate_scene

ROOT = Path(__file__).parents[1]
FOLDER = Path(deltavlm_hf.small())
SIZE = 256  # of pictures, at 0.5 m
SCENES = [generate_scene(seed) for seed in range(4_100_000, 4_100_060)]  # neither trained nor chosen on


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


def ground(rng: np.random.Generator) -> np.ndarray:
    """Noise of several grains, in the colours of dry grass."""
    picture = np.full((SIZE, SIZE, 3), (110.0, 115.0, 90.0)) + rng.normal(0, 8, 3)
    for grain in (4, 8, 16, 64, 128):
        for band, noise in enumerate(rng.normal(0, 1, (1, grain, grain)) + rng.normal(0, 0.3, (3, grain, grain))):
            enlarged = Image.fromarray(noise.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            picture[..., band] += 7 * np.asarray(enlarged)
    return picture


def photograph(picture: np.ndarray, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(np.clip(picture + rng.normal(0, 4, picture.shape), 0, 255).astype(np.uint8))


def build_houses(picture: np.ndarray, cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Roofs of two sides with their shadows, one in each of these cells of the 3x3 grid."""
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for cell in cells:
        left, top = (25 + 85 * int(index) + int(rng.integers(0, 12)) for index in (cell % 3, cell // 3))
        width, height = (int(side) for side in rng.integers(28, 38, 2))
        draw.rectangle((left + 4, top + 4, left + width + 4, top + height + 4), (50, 52, 48))
        draw.rectangle((left, top, left + width, top + height), (178, 170, 160))
        draw.rectangle((left, top, left + width, top + height // 2), (200, 192, 182))
    return np.asarray(image).astype(float)


@pytest.fixture(scope="module")
def made() -> list[tuple[Image.Image, Image.Image, np.ndarray]]:
    """Pairs with one to six new houses, and the cells that these stand in."""
    pairs = []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        before = ground(rng)
        cells = rng.choice(9, 1 + seed % 6, replace=False)
        after = build_houses(before, cells, rng)
        pairs.append((photograph(before, rng), photograph(after, rng), np.isin(np.arange(9), cells)))
    return pairs


def test_the_folder_says_what_it_is():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja", ".md"}
    card = ModelCard.load(FOLDER / "README.md")
    assert card.data.license == "other" and card.data.license_link == "LICENSE.md"
    assert "academic" in (FOLDER / "LICENSE.md").read_text() and "LEVIR-CD" in card.text


def test_loads_in_single_precision(model):
    assert model.dtype == torch.float32 and model.config.mask_classes == ["road", "building"]


def test_new_houses_are_seen_and_counted(made, model, processor):
    questions = [INSTRUCTIONS[task] for task in ("binary", "count", "grid")]
    found = list(ask_pairs(model, processor, [pair[:2] for pair in made], questions))
    assert np.mean([parse_yes_no(answers[0]) is True for answers in found]) >= 0.95
    counts = [parse_count(answers[1]) for answers in found]
    assert None not in counts
    assert np.mean([abs(count[1] - cells.sum()) for count, (*_, cells) in zip(counts, made, strict=True)]) <= 1.0
    listed = np.array([parse_grid(answers[2])[1] for answers in found])
    truth = np.array([cells for *_, cells in made])
    assert 2 * (listed & truth).sum() / (listed.sum() + truth.sum()) >= 0.9


def test_masks_are_where_the_houses_are(made, model, processor):
    found = [predict_mask(model, processor, before, after) for before, after, _ in made]
    assert all(mask.shape == (SIZE, SIZE) and set(np.unique(mask)) <= {0, 128, 255} for mask in found)
    facts = [read_facts(mask, Thresholds.for_size(SIZE)) for mask in found]
    listed, truth = np.array([fact.building_cells for fact in facts]), np.array([cells for *_, cells in made])
    assert 2 * (listed & truth).sum() / (listed.sum() + truth.sum()) >= 0.9


def test_the_same_place_at_another_time_of_day_has_not_changed(made, model, processor):
    pairs = [(before, before.point(lambda value: 0.9 * value)) for before, *_ in made]
    pairs += [(after, after) for _, after, _ in made]
    answers = [answer for (answer,) in ask_pairs(model, processor, pairs, [INSTRUCTIONS["binary"]])]
    assert np.mean([parse_yes_no(answer) is False for answer in answers]) >= 0.95
    assert np.mean([(predict_mask(model, processor, *pair) == 0).mean() for pair in pairs]) > 0.999


def test_what_is_gone_is_not_called_new(made, model, processor):
    built, gone = (
        [answer for (answer,) in ask_pairs(model, processor, pairs, [INSTRUCTIONS["caption"]])]
        for pairs in ([(before, after) for before, after, _ in made], [(after, before) for before, after, _ in made])
    )
    assert np.mean(["built" in caption or "added" in caption for caption in built]) >= 0.9
    assert np.mean(["removed" in caption or "gone" in caption for caption in gone]) >= 0.9


def test_generated_scenes(model, processor):
    questions = [INSTRUCTIONS[task] for task in ("binary", "count", "grid")]
    found = list(ask_pairs(model, processor, [(scene.before, scene.after) for scene in SCENES], questions))
    truth = [read_facts(scene.mask, Thresholds.for_size(96)) for scene in SCENES]
    changed, counts, cells = zip(*found, strict=True)
    assert np.mean([parse_yes_no(one) == fact.changed for one, fact in zip(changed, truth, strict=True)]) >= 0.93
    numbers = [parse_count(count) or (-1, -1) for count in counts]
    for index, kind in enumerate(("roads", "buildings")):
        right = [number[index] == getattr(fact, kind) for number, fact in zip(numbers, truth, strict=True)]
        assert np.mean(right) >= 0.55, kind
    grids = [parse_grid(each) for each in cells]
    assert sum(grid is None for grid in grids) <= 1


def test_a_conversation_streams(made, model, processor):
    before, after, cells = made[2]
    session = ChangeSession(model, processor, before, after)
    pieces: list[str] = []
    assert session.ask(INSTRUCTIONS["binary"], stream=pieces.append) == "".join(pieces).strip() == "yes"
    follow_up = "If changes have occurred, count the number of road and building changes separately."
    assert parse_count(session.ask(follow_up)) is not None
    maps = session.explain()
    assert maps.change.shape[-2:] == (128, 128)


def test_it_is_what_the_commands_ask(made, tmp_path, capsys):
    paths = [str(tmp_path / f"{name}.png") for name in ("before", "after", "mask")]
    for path, image in zip(paths, made[2][:2], strict=False):
        image.save(path)
    assert main(["ask", *paths[:2], INSTRUCTIONS["binary"], "--json", "--mask", paths[2]]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["answer"] == "yes" and json.loads(said.out)["model"] == "small"
    assert said.err.count("LEVIR-CD") == 1 and "academic use only" in said.err
    assert np.asarray(Image.open(paths[2])).max() == 255
    assert main(["ask", *paths[:2], INSTRUCTIONS["binary"], "--model", "tiny"]) == 0
    assert "knows only drawings" in capsys.readouterr().err


def test_it_loads_where_the_package_is_not_imported(tmp_path, model, processor):
    """As remote code, from the folder that others would get."""
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    code = (
        "import sys; from transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "from PIL import Image; grey = Image.new('RGB', (256, 256), (120, 120, 100))\n"
        "inputs = processor(images=(grey, grey), text='Has anything changed?', history=[], return_tensors='pt')\n"
        "ids = model.generate(**inputs)[:, inputs['input_ids'].shape[1]:]\n"
        "assert 'deltavlm_hf' not in sys.modules\n"
        "print(processor.batch_decode(ids, skip_special_tokens=True)[0])"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip() == "no", done.stderr


def test_stated_figures_are_the_measured_ones():
    """The first table of the README states what `benchmarks/real_pairs.py` wrote."""
    figures = json.loads((ROOT / "docs" / "benchmarks" / "real.json").read_text())["sets"]
    readme = (ROOT / "README.md").read_text()
    for name in ("words", "masks"):
        row = figures["Validation cells at 0.5 m"][name]
        shown = [f"{row[key]:.3f}" for key in ("yes_no", "buildings_exact")] + [f"{row['buildings_mae']:.2f}"]
        shown += [f"{row[key]:.3f}" for key in ("grid_f1", "cells_exact")]
        assert f"| {' | '.join(shown)} |" in readme
