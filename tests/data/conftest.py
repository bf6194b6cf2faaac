"""A small data set in the very form of ChangeChat-105k: eight files, both schemas, images as LEVIR-CC has them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from deltavlm_hf.data.questions import FOLLOW_UPS, INSTRUCTIONS, NO_CHANGE
from deltavlm_hf.data.rules import marks_change
from deltavlm_hf.data.scenes import generate_scene

TRAIN, TEST = 4, 3  # pairs
GRID, OTHER_GRID = "roads: ['top-left'] buildings: []", "roads: [top-left] buildings: []"


def item(number: int, split: str, pair: int, *turns: tuple[str, str]) -> dict:
    """An annotation as upstream has it. Odd pairs changed."""
    name = f"{split}_{pair:06d}.png"
    texts = [text for turn in turns for text in turn]
    texts[0] = f"<image> <image> {texts[0]}"
    return {
        "id": number,
        "image": [f"{split}/A/{name}", f"{split}/B/{name}"],
        "changeflag": pair % 2,
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)],
    }


def tasks_of(pair: int, grid: str) -> dict[str, list[tuple[str, str]]]:
    changed = pair % 2
    yes_no = "Yes" if changed else "No"
    detail = "A road has been built." if changed else "No change has occurred."
    dialogue_count = "1 roads has changed, and no buildings has changed."
    return {
        "binary": [(INSTRUCTIONS["binary"], yes_no)],
        "count": [
            (
                INSTRUCTIONS["count"],
                "There are 1 new road and no new buildings."
                if changed
                else "There are no changes in roads or buildings.",
            )
        ],
        "loc": [(INSTRUCTIONS["grid"], grid if changed else "roads: [] buildings: []")],
        "open": [("Is there more asphalt than before?", yes_no)],
        "dialog": [
            (INSTRUCTIONS["binary"], yes_no),
            (FOLLOW_UPS[0], dialogue_count if changed else dialogue_count.replace("1", "No")),
            (FOLLOW_UPS[1], detail),
        ],
    }


def captions_of(pair: int) -> list[str]:
    return [f"a road appears in version {number}" for number in range(5)] if pair % 2 else list(NO_CHANGE)


@pytest.fixture
def changechat(tmp_path) -> Path:
    """A folder with `annotations` and `images`."""
    root = tmp_path / "changechat"
    write_images(root / "images")
    files: dict[str, list] = {}
    for name, grid in (("train", GRID), ("train_loc", OTHER_GRID)):
        items: list[dict] = []
        for pair in range(TRAIN):
            for caption in captions_of(pair):
                items.append(item(len(items), "train", pair, (INSTRUCTIONS["caption"], caption)))
            for turns in tasks_of(pair, grid).values():
                items.append(item(len(items), "train", pair, *turns))
        files[name] = items
    for task in ("binary", "count", "loc", "open", "dialog"):
        files[f"test_{task}"] = [item(pair, "test", pair, *tasks_of(pair, GRID)[task]) for pair in range(TEST)]
    files["test"] = [
        {
            "image_A": f"test/A/test_{pair:06d}.png",
            "image_B": f"test/B/test_{pair:06d}.png",
            "captions": captions_of(pair),
            "changeflag": pair % 2,
        }
        for pair in range(TEST)
    ]
    for name, content in files.items():
        path = root / "annotations" / f"changechat_105k_{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return root


def write_images(folder: Path) -> None:
    """Masks mark a change where annotations tell of one."""
    scenes = [generate_scene(seed, size=32) for seed in range(4_000_000, 4_000_040)]
    by_change = [[scene for scene in scenes if marks_change(scene.mask) == changed] for changed in (False, True)]
    for split, number in (("train", TRAIN), ("test", TEST)):
        for pair in range(number):
            scene = by_change[pair % 2][pair // 2]
            for part, image in (("A", scene.before), ("B", scene.after), ("label", scene.mask)):
                path = folder / split / part / f"{split}_{pair:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)


@pytest.fixture
def edit(changechat) -> Callable:
    """Changes one annotation file: `edit("train", lambda items: items.pop())`."""

    def edit(name: str, change: Callable[[list], object]) -> None:
        path = changechat / "annotations" / f"changechat_105k_{name}.json"
        items = json.loads(path.read_text())
        change(items)
        path.write_text(json.dumps(items))

    return edit


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Arrow tables of one test are no other test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
