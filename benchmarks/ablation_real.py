"""
The ablation on real pairs, at a small equal budget: how dates are compared, whether the backbone learns, and whether
masks teach the words.

    python benchmarks/ablation_real.py --data DATA --keep RUN --output docs/benchmarks

DATA is that of `examples/train_real.py`, RUN its folder, whose language model is taken. Every variant begins from
the backbone's pretrained weights and gets as many steps, far fewer than the model that ships: the table compares, it
does not show what is possible. Finished variants are kept in RUN and not repeated.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_real
from train_real import STAGES, Cells, listen, look, score, score_masks

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

EYES_STEPS, ALIGN_STEPS, SPEAK_STEPS = 300, 300, 120
FIGURES = ("pixel_f1", "yes_no", "buildings_exact", "buildings_mae", "grid_f1", "cells_exact")


@dataclass(frozen=True)
class Variant:
    """
    Args:
        difference (`str`, *optional*): the module that compares dates.
        backbone (`bool`, *optional*): whether the backbone learns.
        masks (`bool`, *optional*): whether masks teach the eyes; else the words do, in as many steps.
        words (`bool`, *optional*): whether it goes on to words, which are then what is measured.
    """

    difference: str = "csrm"
    backbone: bool = True
    masks: bool = True
    words: bool = False


VARIANTS = {
    "CSRM": Variant(),
    "difference": Variant("difference"),
    "concatenation": Variant("concat"),
    "CSRM, backbone frozen": Variant(backbone=False),
    "CSRM, words, with mask loss": Variant(words=True),
    "CSRM, words, without mask loss": Variant(masks=False, words=True),
}


def measure(variant: Variant, seed: int, data: Path, keep: Path, sources: dict, scale: float) -> dict[str, float]:
    """Trains one variant and returns its figures on validation cells."""
    set_seed(seed)
    processor = train_real.make_processor()
    config = DeltaVLMConfig.from_dict(
        {**train_real.make_config(processor).to_dict(), "difference_module": variant.difference}
    )
    model = DeltaVLMForConditionalGeneration(config)
    model.generation_config = train_real.make_generation_config(processor)
    train_real.load_backbone(model)
    model.to(memory_format=torch.channels_last)
    for name in ("language", "reread"):
        model.load_state_dict(torch.load(keep / f"{name}.pt", weights_only=True)["weights"], strict=False)

    frozen = () if variant.backbone else ("vision_model.backbone.",)
    eyes = STAGES["eyes"]
    stages = {"eyes": replace(eyes, cycles=(EYES_STEPS,), frozen=eyes.frozen + frozen)} if variant.masks else {}
    if variant.words:
        align, speak = STAGES["align"], STAGES["speak"]
        extra = () if variant.masks else eyes.trained
        steps = ALIGN_STEPS if variant.masks else ALIGN_STEPS + EYES_STEPS
        stages["align"] = replace(align, cycles=(steps,), trained=align.trained + extra)
        stages["speak"] = replace(speak, cycles=(SPEAK_STEPS,), trained=speak.trained + extra)
    place = keep / "ablation_unfinished.pt"
    for stage in stages.values():
        place.unlink(missing_ok=True)  # of another variant
        stage = replace(stage, cycles=(max(2, round(scale * stage.steps)),))
        train_real.train(stage, model, processor, sources, place, seed)

    model.eval()
    cells = Cells.read(data, "val_cells", "val_cells_b")
    if variant.words:
        return score(listen(model, processor, cells), cells.facts)
    return score_masks(look(model, processor, cells), cells)


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Means over seeds, with the least and the greatest."""
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |", "|---" * (len(FIGURES) + 1) + "|"]
    for variant, runs in results.items():
        cells = []
        for name in FIGURES:
            values = [run[name] for run in runs.values() if name in run]
            spread = f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})" if values else "-"
            cells.append(spread)
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--keep", type=Path, required=True, help="the folder of a run of examples/train_real.py")
    parser.add_argument("--output", type=Path, required=True, help="the folder for ablation_real.json and .md")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="steps, relative to those of the table")
    args = parser.parse_args()

    kept = args.keep / "ablation.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    sources = train_real.read_sources(args.data)
    for seed in range(args.seeds):
        for name, variant in VARIANTS.items():
            runs = results.setdefault(name, {})
            if str(seed) not in runs:
                runs[str(seed)] = measure(variant, seed, args.data, args.keep, sources, args.scale)
                kept.write_text(json.dumps(results, indent=2) + "\n")
                print(name, seed, json.dumps(runs[str(seed)]), flush=True)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "ablation_real.json").write_text(json.dumps(results, indent=2) + "\n")
    (args.output / "ablation_real.md").write_text(f"Made by `benchmarks/ablation_real.py`.\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
