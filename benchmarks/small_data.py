"""
How much a model learns from few real pairs: figures against the number of pairs, the section "Small data" of
docs/training.md.

    python benchmarks/small_data.py --data DATA --keep RUN --output docs

DATA is that of `examples/train_real.py`: runs learn from cells of `train_cells`, drawn at random, a larger number
holding the smaller; figures are of `val_cells` and `val_cells_b`. One pair of six chooses the best step of a run, the
others teach.

The small model has learnt from these very cells, so runs begin elsewhere: from a model of its form that has seen no
real pair. Its backbone is pretrained on ImageNet, its language model is the small model's, which learnt from text
alone, and all between them is taught by generated scenes, in the stages of `examples/train_real.py`. That start is
measured too, as 0 pairs. From it on, runs follow `examples/small_data.yaml`. What is finished is kept in RUN and not
repeated, nor begun after `--minutes`; a run that was stopped goes on.
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_real
from train_real import STAGES, Cells, Scenes, listen, look, score, score_masks

from deltavlm_hf import DeltaVLMForConditionalGeneration
from deltavlm_hf.data.build import build_dataset, find_pairs
from deltavlm_hf.inference.loading import load_model
from deltavlm_hf.training.run import DataConfig, TrainingRun, train

RECIPE = Path(__file__).parents[1] / "examples" / "small_data.yaml"
NUMBERS = (60, 200, 288)  # of pairs; the last are all cells
START = {"eyes": 400, "align": 400, "speak": 80}  # steps of the model that runs begin from
VALIDATION = 6  # of so many pairs one chooses the best step
TASKS = ["binary", "count", "grid"]
FIGURES = {
    "yes_no": "yes/no, right",
    "buildings_exact": "buildings, exact number",
    "grid_f1": "3x3 grid, F1",
    "buildings_mae": "buildings, mean error",
}


def make_start(keep: Path) -> Path:
    """The folder of a model like the small one that has seen no real pair."""
    folder = keep / "start"
    if (folder / "config.json").exists():
        return folder
    set_seed(0)
    small, processor = load_model("small", "cpu")
    model = DeltaVLMForConditionalGeneration(small.config)
    model.generation_config = small.generation_config
    model.language_model.load_state_dict(small.language_model.state_dict())
    train_real.load_backbone(model)
    model.to(memory_format=torch.channels_last)
    for name, steps in START.items():
        kept = keep / f"{name}.pt"
        if not kept.exists():
            stage = STAGES[name]
            frozen = (*stage.frozen, "vision_model.backbone.")  # drawings would spoil what it knows of photographs
            stage = replace(stage, cycles=(steps,), frozen=frozen)
            train_real.train(stage, model, processor, {"scenes": Scenes(train_real.SCENES)}, keep / f"{name}.part", 0)
            torch.save(model.state_dict(), kept)
        model.load_state_dict(torch.load(kept, weights_only=True))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_data(data: Path, number: int, seed: int, folder: Path) -> DataConfig:
    """Some pairs, and records of them by rule."""
    shutil.rmtree(folder, ignore_errors=True)
    names = sorted(path.stem for path in (data / "train_cells" / "label").iterdir())
    chosen = np.random.default_rng(seed).permutation(names)[:number]
    for index, name in enumerate(chosen):
        split = "train" if index % VALIDATION else "val"
        for part in ("A", "B", "label"):
            (path,) = (data / "train_cells" / part).glob(f"{name}.*")
            place = folder / "images" / split / part / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path.resolve())
    for split in ("train", "val"):
        pairs = find_pairs(folder / "images", split=split)
        build_dataset(pairs, folder / "annotations", split=split, tasks=TASKS, binary_masks=True)
    return DataConfig(source=str(folder / "annotations"), images=str(folder / "images"), tasks=TASKS)


def measure(folder: Path, cells: Cells) -> dict[str, dict[str, float]]:
    """Figures of a model's words and masks."""
    model, processor = load_model(str(folder), "cpu")
    return {
        "words": score(listen(model, processor, cells), cells.facts),
        "masks": score_masks(look(model, processor, cells), cells),
    }


def spread(results: dict[str, dict[str, Any]], of: str, figure: str) -> dict[int, tuple[float, float, float]]:
    """By number of pairs: mean, least and greatest over seeds."""
    values: dict[int, list[float]] = {}
    for run in results.values():
        values.setdefault(run["pairs"], []).append(run[of][figure])
    return {pairs: (statistics.mean(each), min(each), max(each)) for pairs, each in sorted(values.items())}


def write(
    results: dict[str, dict[str, Any]], nothing: dict[str, float], settings: dict[str, Any], output: Path
) -> None:
    """The table, its numbers and the plot."""
    folder = output / "benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "nothing has changed": nothing, "runs": results}
    (folder / "small_data.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = [f"| pairs | | {' | '.join(FIGURES.values())} |", "|---" * (len(FIGURES) + 2) + "|"]
    shown = {(of, name): spread(results, of, name) for of in ("words", "masks") for name in FIGURES}
    for pairs in shown["words", "yes_no"]:
        for of in ("words", "masks"):
            cells = []
            for name in FIGURES:
                mean, least, greatest = shown[of, name][pairs]
                cells.append(f"{mean:.3f}" + (f" ({least:.3f} to {greatest:.3f})" if least < greatest else ""))
            lines.append(f"| {pairs} | {of} | {' | '.join(cells)} |")
    lines.append(f"| - | nothing has changed | {' | '.join(f'{nothing[name]:.3f}' for name in FIGURES)} |")
    told = "; ".join(f"{name}: {value}" for name, value in settings.items())
    (folder / "small_data.md").write_text(
        f"Made by `benchmarks/small_data.py`, which says what runs begin from (0 pairs). {told}.\n\n"
        + "\n".join(lines)
        + "\n"
    )
    plot(shown, nothing, settings, output / "small_data.svg")


def plot(shown: dict, nothing: dict[str, float], settings: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same file from the same numbers
    figure, axes = pyplot.subplots(1, len(FIGURES), figsize=(12, 3.4), layout="constrained")
    for axis, (name, title) in zip(axes, FIGURES.items(), strict=True):
        for of, colour in (("words", "C0"), ("masks", "C1")):
            points = shown[of, name]
            pairs, (mean, least, greatest) = list(points), np.array(list(points.values())).T
            axis.errorbar(pairs, mean, (mean - least, greatest - mean), marker="o", capsize=3, color=colour, label=of)
        axis.axhline(nothing[name], linestyle="--", color="grey", label='"nothing has changed"')
        axis.set(title=title, xlabel="pairs", xticks=pairs)
        if "mae" not in name:
            axis.set_ylim(0, 1)
    axes[0].legend(loc="lower right", fontsize="small")
    start = "a model that has seen ImageNet, texts and generated scenes, and no real pair (0 pairs)"
    figure.suptitle(f"Start: {start}; {settings['steps']} steps of 12 rows", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with real pairs")
    parser.add_argument("--keep", type=Path, required=True, help="where the start and finished runs are kept")
    parser.add_argument("--output", type=Path, required=True, help="docs, or another folder for table and plot")
    parser.add_argument("--pairs", type=int, nargs="+", default=NUMBERS)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300, help="of each run")
    parser.add_argument("--learning-rate", type=float, help="default: the YAML's")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no run is begun")
    args = parser.parse_args()

    begun = time.monotonic()
    args.keep.mkdir(parents=True, exist_ok=True)
    recipe = TrainingRun.from_yaml(RECIPE)
    if args.learning_rate:
        recipe.training["learning_rate"] = args.learning_rate
    settings = {"steps": args.steps, "learning rate": recipe.training["learning_rate"], "start, steps": START}
    kept = args.keep / "results.json"
    content = json.loads(kept.read_text()) if kept.exists() else {"settings": settings, "runs": {}}
    if content["settings"] != settings:
        parser.error(f"{kept} is of other settings: {content['settings']}")
    results = content["runs"]
    start, cells = make_start(args.keep), Cells.read(args.data, "val_cells", "val_cells_b")
    for seed in range(args.seeds):
        for number in (0, *args.pairs):
            name = f"{number} pairs, seed {seed}" if number else "start"
            if name in results or (time.monotonic() - begun) / 60 > args.minutes:
                continue
            folder = start
            if number:
                folder = args.keep / f"run_{number}_{seed}"
                training = {**recipe.training, "output_dir": str(folder), "max_steps": args.steps, "seed": seed}
                training |= {"use_cpu": True, "report_to": "none"}
                data = make_data(args.data, number, seed, args.keep / f"data_{number}_{seed}")
                train(replace(recipe, model=str(start), data=data, training=training), show=print)
            results[name] = {"pairs": number, "seed": seed, **measure(folder, cells)}
            kept.write_text(json.dumps(content, indent=2) + "\n")
            print(name, json.dumps(results[name]), flush=True)
    nothing = score_masks([0 * mask for mask in cells.masks], cells)
    write(results, nothing, settings, args.output)


if __name__ == "__main__":
    main()
