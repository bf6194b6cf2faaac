"""
Damaged files, thousands of them: each is read, or refused with a `ValueError` or `OSError` that names it. They are the
same in every run; `docs/reliability.md` states how many there are.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from paths import SHARED
from PIL import Image
from transformers.utils import logging

import deltavlm_hf
from deltavlm_hf import DeltaVLMForConditionalGeneration, DeltaVLMImageProcessor, DeltaVLMProcessor
from deltavlm_hf.data.scenes import generate_scene

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IMAGES = 300  # of each kind below
IMAGE_KINDS: dict[str, dict[str, Any]] = {
    "png": {},
    "png of 16 bits": {"mode": "I;16"},
    "png with palette": {"mode": "P"},
    "jpeg": {},
    "jpeg, progressive": {"progressive": True},
    "tiff": {},
    "tiff, lzw": {"compression": "tiff_lzw"},
    "bmp": {},
    "gif": {},
    "webp": {},
    "jpeg2000": {},
    "ppm": {},
}
CHECKPOINTS = {  # how many of each file
    "model.safetensors": 300,
    "config.json": 400,
    "generation_config.json": 100,
    "processor_config.json": 250,
    "tokenizer.json": 250,
    "tokenizer_config.json": 150,
    "qformer_tokenizer/tokenizer.json": 100,
    "qformer_tokenizer/tokenizer_config.json": 100,
    "chat_template.jinja": 150,
}
CONVERSIONS = {"checkpoint": 60, "vision": 40}
TOTAL = IMAGES * len(IMAGE_KINDS) + sum(CHECKPOINTS.values()) + sum(CONVERSIONS.values())

ODD_VALUES = (None, -1, 0, 3, 1e9, 0.5, True, "", "x", [], [1], {}, {"a": 1}, float("nan"))


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """Without what transformers logs, thousands of times."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity(verbosity)


def damage(content: bytes, random: Random) -> bytes:
    """Bytes flipped, most of them near the beginning; a piece cut out, doubled or overwritten; the end cut off."""
    damaged = bytearray(content)
    for _ in range(random.randint(1, 4)):
        size = len(damaged)
        start = random.randrange(random.choice((min(size, 64), min(size, 2048), size)) or 1)
        piece = bytes(damaged[start : start + random.randint(1, 40)])
        match random.choice(("flip", "byte", "cut", "double", "move", "fill", "end")):
            case "flip" if size:
                damaged[start] ^= 1 << random.randrange(8)
            case "byte" if size:
                damaged[start] = random.randrange(256)
            case "cut":
                del damaged[start : start + len(piece)]
            case "double":
                damaged[start:start] = piece
            case "move":
                to = random.randrange(size or 1)
                damaged[to : to + len(piece)] = piece
            case "fill":
                damaged[start : start + len(piece)] = bytes([random.choice((0, 255))]) * len(piece)
            case "end" if random.random() < 0.3:
                del damaged[random.randrange(size or 1) :]
    return bytes(damaged)


def damage_json(content: bytes, random: Random) -> bytes:
    """JSON that still is JSON: values replaced by others, or taken out."""
    tree = json.loads(content)
    for _ in range(random.randint(1, 2)):
        node, key = {"": tree}, ""
        while isinstance(node[key], (dict, list)) and node[key] and (node[key] is tree or random.random() < 0.8):
            node = node[key]
            key = random.choice(sorted(node) if isinstance(node, dict) else range(min(len(node), 20)))
        if random.random() < 0.3 and node is not tree and key != "":
            del node[key]
        else:
            node[key] = random.choice(ODD_VALUES)
        tree = node[key] if key == "" else tree
        if not isinstance(tree, (dict, list)):
            break
    return json.dumps(tree).encode()


def damage_safetensors(content: bytes, random: Random) -> bytes:
    """The head, which is JSON behind its length, or anything."""
    if random.random() < 0.5:
        return damage(content, random)
    size = int.from_bytes(content[:8], "little")
    change = random.choice((damage, damage_json))
    head = change(content[8 : 8 + size], random)
    return len(head).to_bytes(8, "little") + head + content[8 + size :]


def refused(act: Callable[[], Any], named: str) -> bool:
    """Whether it was, by an error of ours that says what is wrong with what."""
    try:
        act()
    except (ValueError, OSError) as error:
        assert named in f"{error}", f"not named: {error!r}"
        return True
    return False


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Parts of real imagery where there is some beside the repository, else generated."""
    real = sorted((SHARED / "real").rglob("*.png"))[:8]
    whole = [Image.open(path) for path in real] or [Image.fromarray(generate_scene(seed).before) for seed in range(8)]
    return [image.convert("RGB").crop((0, 0, 64, 64)) for image in whole]


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_images(kind, pictures, tmp_path):
    processor = DeltaVLMImageProcessor(size={"height": 16, "width": 16})
    options = dict(IMAGE_KINDS[kind])
    mode = options.pop("mode", "RGB")
    contents = []
    for picture in pictures:
        buffer = io.BytesIO()
        image = picture.convert("L").convert("I;16") if mode == "I;16" else picture.convert(mode)
        image.save(buffer, kind.split()[0].strip(","), **options)
        contents.append(buffer.getvalue())
    outcomes = []
    for number in range(IMAGES):
        random = Random(f"{kind} {number}")
        path = tmp_path / "image"
        path.write_bytes(damage(random.choice(contents), random))

        def read(path=path):
            pixel_values = processor((pictures[0], path), return_tensors="pt")["pixel_values"]
            assert pixel_values.isfinite().all()

        outcomes.append(refused(read, "pair 1, after image: "))
    assert 0 < sum(outcomes) < IMAGES == len(outcomes)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_saved_folders(file, tmp_path):
    folder = Path(shutil.copytree(deltavlm_hf.tiny(), tmp_path / "model", copy_function=os.symlink))
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    of_model = file in ("model.safetensors", "config.json", "generation_config.json")
    kind = DeltaVLMForConditionalGeneration if of_model else DeltaVLMProcessor
    ways = [damage_safetensors] if file.endswith(".safetensors") else [damage]
    if file.endswith(".json"):
        ways.append(damage_json)
    outcomes = []
    for number in range(CHECKPOINTS[file]):
        random = Random(f"{file} {number}")
        (folder / file).write_bytes(random.choice(ways)(content, random))
        outcomes.append(refused(lambda: kind.from_pretrained(folder), str(folder)))
    assert 0 < sum(outcomes) < CHECKPOINTS[file] == len(outcomes)


@pytest.mark.parametrize("file", CONVERSIONS)
def test_conversions(file, sources, official_config, tmp_path):
    path, content = tmp_path / "damaged.pth", sources[file].read_bytes()
    outcomes = []
    for number in range(CONVERSIONS[file]):
        path.write_bytes(damage(content, Random(f"{file} {number}")))

        def convert(output=tmp_path / str(number)):
            changed = {**sources, file: path}
            deltavlm_hf.convert_original_checkpoint(**changed, output_dir=output, config=official_config)

        outcomes.append(refused(convert, str(path)))
        assert (tmp_path / str(number)).exists() != outcomes[-1]
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)
    assert 0 < sum(outcomes) and len(outcomes) == CONVERSIONS[file]


def test_their_number_is_the_one_that_is_stated():
    stated = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()
    assert f"{TOTAL:,} damaged files" in stated
