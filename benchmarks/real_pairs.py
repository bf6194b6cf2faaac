"""
How well a model answers about real pairs: the tables of docs/real.md.

    python benchmarks/real_pairs.py --data DATA --more FOLDER --output docs/benchmarks

DATA holds pairs as `examples/train_real.py` reads them: `val_cells`, `val_cells_b` (256 px at 0.5 m), `val_tiles_1m`
(512 px at 1 m) and `xian_cells`, each with `A`, `B` and `label`; so has every FOLDER, whose pairs are put together.
Truth is what the rules read off the masks there. A model is asked in words (yes or no, counts, cells); where it makes
masks, the same is read off those. Intervals (95 %) are of 2,000 draws of whole tiles.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from train_real import Cells, RealPairs, facts_of, listen, look, pixel_f1, score, score_masks

import deltavlm_hf
from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.data.rules import BUILDING
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ask_pairs

DRAWS = 2000
GENERATED_SEED = 5_500_000
FIGURES = (
    "yes_no",
    "false_alarms",
    "buildings_exact",
    "buildings_exact_of_changed",
    "buildings_mae",
    "grid_f1",
    "cells_exact",
    "pixel_f1",
)
Change = Callable[[Image.Image], Image.Image]


def measure(model: Any, processor: Any, cells: Cells, intervals: bool = False) -> dict[str, Any]:
    """Figures of words and of masks, and how often both say the same."""
    truth = cells.facts
    said = listen(model, processor, cells)
    results: dict[str, Any] = {"pairs": len(truth), "words": score(said, truth)}
    if intervals:
        results["words_95"] = bootstrap(cells.tiles, lambda chosen: score(pick(said, chosen), pick(truth, chosen)))
    if model.config.mask_classes:
        masks = look(model, processor, cells)
        seen = facts_of(masks)
        results["masks"] = score_masks(masks, cells)
        known = [(one, other) for one, other in zip(said, seen, strict=True) if one is not None]
        results["agreement"] = {
            "buildings": float(np.mean([one.buildings == other.buildings for one, other in known])),
            "cells": float(np.mean([(one.building_cells == other.building_cells).all() for one, other in known])),
        }
        if intervals:
            results["masks_95"] = bootstrap(
                cells.tiles,
                lambda chosen: {
                    **score(pick(seen, chosen), pick(truth, chosen)),
                    "pixel_f1": pixel_f1(pick(masks, chosen), pick(cells.masks, chosen)),
                },
            )
    return results


def load(name: str) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(name), AutoProcessor.from_pretrained(name)


def pick(items: Sequence, chosen: Sequence[int]) -> list:
    return [items[index] for index in chosen]


def bootstrap(tiles: Sequence[str], figures: Callable[[list[int]], dict[str, float]]) -> dict[str, list[float]]:
    """Of each figure the 2.5th and 97.5th percentile over draws of tiles, with all cells of each."""
    rng = np.random.default_rng(0)
    of_tile: dict[str, list[int]] = {}
    for index, tile in enumerate(tiles):
        of_tile.setdefault(tile, []).append(index)
    names = list(of_tile)
    draws = [
        figures([index for name in rng.choice(names, len(names)) for index in of_tile[name]]) for _ in range(DRAWS)
    ]
    return {
        name: [float(np.percentile([draw[name] for draw in draws], at)) for at in (2.5, 97.5)] for name in draws[0]
    }


def cut(tiles: Cells, side: int) -> Cells:
    """Every tile in cells of so many pixels."""
    cells = Cells([], [], [])
    for pair, mask, tile in zip(tiles.pairs, tiles.masks, tiles.tiles, strict=True):
        for top in range(0, len(mask), side):
            for left in range(0, len(mask), side):
                before, after = (image.crop((left, top, left + side, top + side)) for image in pair)
                cells.pairs.append((before, after))
                cells.masks.append(mask[top : top + side, left : left + side])
                cells.tiles.append(tile)
    return cells


def read_more(folders: Sequence[Path]) -> Cells:
    """All pairs of some folders."""
    cells = Cells([], [], [])
    for folder in folders:
        pairs = RealPairs(folder, halve=False)
        cells.pairs += [(Image.fromarray(before), Image.fromarray(after)) for before, after in pairs.images]
        cells.masks += pairs.masks
        cells.tiles += pairs.names
    return cells


def generated(count: int) -> Cells:
    scenes = [generate_scene(GENERATED_SEED + number) for number in range(count)]
    pairs = [(Image.fromarray(scene.before), Image.fromarray(scene.after)) for scene in scenes]
    return Cells(pairs, [scene.mask for scene in scenes], [str(number) for number in range(count)])


def changed_after(cells: Cells, change: Change) -> Cells:
    """The same pairs, the second date as it would look otherwise."""
    return Cells([(before, change(after)) for before, after in cells.pairs], cells.masks, cells.tiles)


def shifted(pixels: int) -> Change:
    def change(image: Image.Image) -> Image.Image:
        moved = np.pad(np.asarray(image), ((pixels, 0), (pixels, 0), (0, 0)), "edge")
        return Image.fromarray(moved[: image.height, : image.width])

    return change


def darkened(image: Image.Image) -> Image.Image:
    return image.point(lambda value: 0.6 * value)


def hazed(image: Image.Image) -> Image.Image:
    return image.point(lambda value: 0.7 * value + 0.3 * 235)


def compressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "jpeg", quality=40)
    return Image.open(file).convert("RGB")


DISTURBANCES: dict[str, Change] = {
    "as it is": lambda image: image,
    **{f"shifted by {pixels} px": shifted(pixels) for pixels in (1, 2, 4)},
    "darkened to 60 %": darkened,
    "haze of 30 %": hazed,
    "JPEG of quality 40": compressed,
}


def differences(cells: Cells) -> list[np.ndarray]:
    """How far two images differ, smoothed: what needs no model."""
    smoothed = (
        [ndimage.gaussian_filter(np.asarray(image, np.float32), (2, 2, 0)) for image in pair] for pair in cells.pairs
    )
    return [np.abs(before - after).mean(-1) for before, after in smoothed]


def difference_masks(found: Sequence[np.ndarray], threshold: float, least: float) -> list[np.ndarray]:
    """Where differences exceed a threshold; nothing, if that is less than a share of the image."""
    masks = [ndimage.binary_opening(difference > threshold, iterations=2) for difference in found]
    return [np.where(mask & (mask.mean() > least), BUILDING, 0).astype(np.uint8) for mask in masks]


def simple_answers(cells: Cells, training: Cells) -> dict[str, dict[str, float]]:
    """What needs no learning: nothing has changed, all has, or what differs by thresholds chosen on `training`."""
    of_training, truth = differences(training), [fact.changed for fact in training.facts]
    choices = list(product(range(30, 121, 10), (0, 0.005, 0.01, 0.02, 0.04)))
    right = [
        np.mean([mask.any() == changed for mask, changed in zip(masks, truth, strict=True)])
        for masks in (difference_masks(of_training, *choice) for choice in choices)
    ]
    chosen = choices[int(np.argmax(right))]
    return {
        "nothing has changed": score_masks([0 * mask for mask in cells.masks], cells),
        "all of it is one new building": score_masks([np.full_like(mask, BUILDING) for mask in cells.masks], cells),
        "absolute difference": score_masks(difference_masks(differences(cells), *chosen), cells),
    }


def removal(model: Any, processor: Any, cells: Cells) -> dict[str, float]:
    """Of changed pairs in either order: how often the caption says that something was built, or is gone."""
    changed = [pair for pair, facts in zip(cells.pairs, cells.facts, strict=True) if facts.changed]
    results = {}
    for name, pairs in (("in order", changed), ("swapped", [pair[::-1] for pair in changed])):
        captions = [answer for (answer,) in ask_pairs(model, processor, pairs, [INSTRUCTIONS["caption"]])]
        results[f"{name}: built"] = float(np.mean([_speaks_of(("built", "added"), text) for text in captions]))
        results[f"{name}: gone"] = float(np.mean([_speaks_of(("removed", "gone"), text) for text in captions]))
    return results


def _speaks_of(words: Sequence[str], text: str) -> bool:
    return any(word in text for word in words)


def table(rows: dict[str, dict[str, float]], intervals: dict[str, dict[str, list[float]]] | None = None) -> str:
    """In Markdown, a column for each figure."""
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for row, figures in rows.items():
        cells = []
        for name in FIGURES:
            text = "-" if name not in figures else f"{figures[name]:.2f}" if "mae" in name else f"{figures[name]:.3f}"
            if intervals and row in intervals and name in intervals[row]:
                text += " ({:.2f} to {:.2f})".format(*intervals[row][name])
            cells.append(text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(results: dict[str, Any], path: Path) -> None:
    parts = ["Made by `benchmarks/real_pairs.py`."]
    for name, found in results["sets"].items():
        rows = {key: found[key] for key in ("words", "masks") if key in found}
        spread = {key: found[f"{key}_95"] for key in rows if f"{key}_95" in found}
        parts.append(f"## {name}: {found['pairs']} pairs\n\n{table(rows, spread)}")
        if "agreement" in found:
            agreement = ", ".join(f"{key} {value:.3f}" for key, value in found["agreement"].items())
            parts.append(f"Words say what the masks say: {agreement}.")
    parts.append("## For comparison, validation cells at 0.5 m if nothing else is said\n\n" + table(results["simple"]))
    parts.append("## Disturbed second dates, in words\n\n" + table(results["disturbed"]))
    lines = [f"| {name} | {value:.3f} |" for name, value in results["removal"].items()]
    parts.append("## Captions of changed pairs\n\n| | share |\n|---|---|\n" + "\n".join(lines))
    path.write_text("\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--more", type=Path, nargs="*", default=[], help="folders with other pairs")
    parser.add_argument("--output", type=Path, required=True, help="the folder for real.json and real.md")
    parser.add_argument("--generated", type=int, default=500, help="generated pairs")
    args = parser.parse_args()
    model, processor = load(args.model)
    cells = Cells.read(args.data, "val_cells", "val_cells_b")
    same = Cells([(before, before) for before, _ in cells.pairs], [0 * mask for mask in cells.masks], cells.tiles)
    scenes = generated(args.generated)
    sets = {
        "Validation cells at 0.5 m": measure(model, processor, cells, intervals=True),
        "Validation cells at 1 m": measure(model, processor, cut(Cells.read(args.data, "val_tiles_1m"), 128), True),
        "Xi'an": measure(model, processor, Cells.read(args.data, "xian_cells")),
        "Generated": measure(model, processor, scenes),
        "The first date against itself": measure(model, processor, same),
    }
    if args.more:
        sets["Other pairs"] = measure(model, processor, read_more(args.more))
    disturbed = {
        name: score(listen(model, processor, changed_after(cells, change)), cells.facts)
        for name, change in DISTURBANCES.items()
    }
    simple = simple_answers(cells, read_more([args.data / "train_cells"]))
    tiny = load(deltavlm_hf.tiny())
    simple["the tiny model"] = score(listen(*tiny, cells), cells.facts)
    simple["the tiny model, generated pairs"] = score(listen(*tiny, scenes), scenes.facts)
    results = {
        "sets": sets,
        "simple": simple,
        "disturbed": disturbed,
        "removal": removal(model, processor, cells),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "real.json").write_text(json.dumps(results, indent=2) + "\n")
    write(results, args.output / "real.md")


if __name__ == "__main__":
    main()
