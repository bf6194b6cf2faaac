"""The model that ships with the package: small, complete, and it answers."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, pipeline
from transformers.pipelines.pt_utils import KeyDataset

import deltavlm_hf
from deltavlm_hf import ChangeSession
from deltavlm_hf.data.questions import INSTRUCTIONS, parse_count, parse_grid
from deltavlm_hf.data.rules import Thresholds, read_facts
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import answer

SEEDS = range(4_000_000, 4_000_060)  # neither trained, validated nor tested on
SCRIPT = Path(__file__).parents[1] / "examples" / "train_tiny.py"


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def ask(tiny_model, tiny_processor, scenes):
    """Asks one question about all scenes."""

    def ask(question: str, history=None) -> list[str]:
        images = [(scene.before, scene.after) for scene in scenes]
        return answer(tiny_model, tiny_processor, [question] * len(scenes), history, images)

    return ask


def test_size():
    files = [path for path in Path(deltavlm_hf.tiny()).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jinja"}


def test_loads_in_single_precision(tiny_model):
    assert tiny_model.dtype == torch.float32


@pytest.mark.parametrize("question", [INSTRUCTIONS["binary"], "Has anything changed?"])
def test_yes_no(question, ask, scenes):
    answers = ask(question)
    assert set(answers) <= {"yes", "no"}
    assert np.mean([answer == "no" for answer in answers]) < 0.8  # not one answer for all
    assert np.mean([(answer == "yes") == scene.changed for answer, scene in zip(answers, scenes, strict=True)]) >= 0.93


def test_a_question_as_it_stands_gets_the_same_answers(ask, scenes):
    dialogue, verbatim = ask(INSTRUCTIONS["binary"]), ask(INSTRUCTIONS["binary"], history=[None for _ in scenes])
    assert np.mean([one == other for one, other in zip(dialogue, verbatim, strict=True)]) >= 0.95


def test_counts(ask, scenes):
    counts = [parse_count(answer) for answer in ask(INSTRUCTIONS["count"])]
    assert None not in counts
    roads = [count[0] == scene.roads for count, scene in zip(counts, scenes, strict=True)]
    buildings = [count[1] == len(scene.buildings) for count, scene in zip(counts, scenes, strict=True)]
    assert np.mean(roads) >= 0.85
    assert np.mean(buildings) >= 0.7


def test_grid(ask, scenes):
    grids = [parse_grid(answer) for answer in ask(INSTRUCTIONS["grid"])]
    assert None not in grids
    truths = [read_facts(scene.mask, Thresholds.for_size(96)) for scene in scenes]
    for index, name in enumerate(("road_cells", "building_cells")):
        listed, truth = np.array([grid[index] for grid in grids]), np.array([getattr(fact, name) for fact in truths])
        assert 2 * (listed & truth).sum() / (listed.sum() + truth.sum()) >= 0.65


def test_conversation(tiny_model, tiny_processor, scenes):
    scene = next(scene for scene in scenes if len(scene.buildings) == 2 and scene.roads == 0)
    session = ChangeSession(tiny_model, tiny_processor, scene.before, scene.after)
    assert session.ask(INSTRUCTIONS["binary"]) == "yes"
    follow_up = "If changes have occurred, count the number of road and building changes separately."
    assert parse_count(session.ask(follow_up)) is not None


def test_any_text_and_any_size_get_an_answer(tiny_model, tiny_processor):
    image = Image.new("L", (333, 77))
    session = ChangeSession(tiny_model, tiny_processor, image, image)
    for question in ("什么变了?", "", "<image></s>", "where is the new stadium, please?"):
        assert isinstance(session.ask(question, max_new_tokens=10), str)


def test_pipeline(scenes):
    scene = next(scene for scene in scenes if scene.changed)
    content = [{"type": "image", "image": Image.fromarray(image)} for image in (scene.before, scene.after)]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": INSTRUCTIONS["binary"]}]}]
    answerer = pipeline("image-text-to-text", model=deltavlm_hf.tiny())
    outputs = answerer(text=messages, return_full_text=False)
    assert outputs[0]["generated_text"].strip() == "yes"
    full = answerer(text=[messages, messages])
    assert [chat[0]["generated_text"][-1]["content"].strip() for chat in full] == ["yes", "yes"]


def test_pipeline_in_batches(scenes):
    """Questions of different length, which the pipeline pads by itself: the answers are those of single calls."""
    questions = [INSTRUCTIONS["grid"], INSTRUCTIONS["binary"], "What changed?", INSTRUCTIONS["count"]]
    chats = []
    for scene, question in zip(scenes, questions, strict=False):
        content = [{"type": "image", "image": Image.fromarray(image)} for image in (scene.before, scene.after)]
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": question}]}])
    answerer = pipeline("image-text-to-text", model=deltavlm_hf.tiny())
    singles, batches = (answerer(text=chats, batch_size=size, return_full_text=False) for size in (1, 4))
    assert [output[0]["generated_text"] for output in singles] == [output[0]["generated_text"] for output in batches]


def test_pipeline_over_a_data_set_of_messages(scenes, tmp_path):
    """`datasets` fills each part of a message with the keys that others have: None is nothing."""
    chats = []
    for number, scene in enumerate(scenes[:3]):
        content = []
        for date, image in (("before", scene.before), ("after", scene.after)):
            Image.fromarray(image).save(tmp_path / f"{date}{number}.png")
            content.append({"type": "image", "url": str(tmp_path / f"{date}{number}.png")})
        chats.append([{"role": "user", "content": [*content, {"type": "text", "text": INSTRUCTIONS["count"]}]}])
    answerer = pipeline("image-text-to-text", model=deltavlm_hf.tiny())
    table = Dataset.from_list([{"messages": chat} for chat in chats])
    assert set(table[0]["messages"][0]["content"][0]) == {"type", "url", "text"}
    outputs = answerer(KeyDataset(table, "messages"), return_full_text=False)
    expected = answerer(chats, return_full_text=False)
    assert [output[0]["generated_text"] for output in outputs] == [output[0]["generated_text"] for output in expected]


def test_stated_figures_are_the_measured_ones():
    """The README's table states what `evaluation.json` holds."""
    figures = json.loads((Path(deltavlm_hf.tiny()) / "evaluation.json").read_text())
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    rows = {
        "yes/no": "yes_no",
        "number of new roads": "roads_exact",
        "number of new buildings": "buildings_exact",
        "grid, micro-F1, roads": "grid_f1_roads",
        "grid, micro-F1, buildings": "grid_f1_buildings",
        "read off the caption": "yes_no_from_caption",
        "open questions": "open_exact",
        "all answers right": "dialogue",
        "agrees with": "dialogue_consistent",
    }
    table = [line for line in readme.splitlines() if line.startswith("| ")]
    for title, name in rows.items():
        assert any(title in line and line.endswith(f"| {figures[name]:.3f} |") for line in table), title


@pytest.mark.slow
def test_the_script_that_made_it_runs(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "tiny")]
    done = subprocess.run(
        [*command, "--scale", "0.003", "--scenes", "200", "--test", "4"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())
    assert figures["pairs"] == 4 and set(figures["minutes"]) == {
        "language",
        "eyes",
        "align",
        "reread",
        "speak",
    }
    AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny")
