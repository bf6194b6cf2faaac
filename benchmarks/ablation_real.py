"""
The ablation on real pairs, at a small equal budget: how dates are compared, whether the backbone learns, and whether
masks teach the words.

    python benchmarks/ablation_real.py --data DATA --keep RUN --output docs/benchmarks

DATA is that of `examples/train_real.py`, RUN its folder. Every variant begins from the backbone's pretrained weights
and gets as many steps, far fewer than the model that ships: the tables compare, they do not show what is possible. The
language model and the Q-Former, which knows the words from other eyes, are RUN's. Finished variants are kept in RUN
and not repeated.
"""

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_real
from train_real import STAGES, Cells, listen, look, score, score_masks

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

EYES_STEPS, ALIGN_STEPS, SPEAK_STEPS = 150, 150, 40
FIGURES = ("yes_no", "buildings_exact", "buildings_mae", "grid_f1", "cells_exact")
PARTS = {"words": FIGURES, "masks": (*FIGURES, "pixel_f1")}


@dataclass(frozen=True)
class Variant:
    """
    Args:
        difference (`str`, *optional*): the module that compares dates.
        backbone (`bool`, *optional*): whether the backbone learns.
        masks (`bool`, *optional*): whether masks teach the eyes; else the words do, in as many steps.
    """

    difference: str = "csrm"
    backbone: bool = True
    masks: bool = True


VARIANTS = {
    "CSRM": Variant(),
    "difference": Variant("difference"),
    "concatenation": Variant("concat"),
    "CSRM, backbone frozen": Variant(backbone=False),
    "CSRM, without mask loss": Variant(masks=False),
}
Figures = dict[str, dict[str, float]]


def measure(variant: Variant, seed: int, data: Path, keep: Path, sources: dict, scale: float) -> Figures:
    """Trains one variant and returns its figures on validation cells: of its words, and of masks if it learnt any."""
    set_seed(seed)
    processor = train_real.make_processor()
    config = DeltaVLMConfig.from_dict(
        {**train_real.make_config(processor).to_dict(), "difference_module": variant.difference}
    )
    model = DeltaVLMForConditionalGeneration(config)
    model.generation_config = train_real.make_generation_config(processor)
    train_real.load_backbone(model)
    model.to(memory_format=torch.channels_last)
    for name in ("language", "reread", "speak"):
        model.load_state_dict(torch.load(keep / f"{name}.pt", weights_only=True)["weights"], strict=False)
    place = keep / "ablation_unfinished.pt"

    def learn(name: str, steps: int, **changes: tuple[str, ...]) -> None:
        place.unlink(missing_ok=True)  # of another variant
        stage = replace(STAGES[name], cycles=(max(2, round(scale * steps)),), **changes)
        train_real.train(stage, model, processor, sources, place, seed)

    eyes, align, speak = STAGES["eyes"], STAGES["align"], STAGES["speak"]
    if variant.masks:
        learn("eyes", EYES_STEPS, frozen=eyes.frozen + (() if variant.backbone else ("vision_model.backbone.",)))
        learn("align", ALIGN_STEPS)
        learn("speak", SPEAK_STEPS)
    else:
        learn("align", EYES_STEPS + ALIGN_STEPS, trained=align.trained + eyes.trained)
        learn("speak", SPEAK_STEPS, trained=speak.trained + eyes.trained)
    model.eval()
    cells = Cells.read(data, "val_cells", "val_cells_b")
    figures = {"words": score(listen(model, processor, cells), cells.facts)}
    return {**figures, "masks": score_masks(look(model, processor, cells), cells)} if variant.masks else figures


def table(results: dict[str, dict[str, Figures]], part: str) -> str:
    """Means over seeds, with the least and the greatest, of what the masks or the words of each variant say."""
    names = PARTS[part]
    lines = [
        f"| {part} | " + " | ".join(name.replace("_", " ") for name in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for variant, runs in results.items():
        found = [run[part] for run in runs.values() if part in run]
        values = [[figures[name] for figures in found] for name in names]
        spread = [f"{statistics.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})" for each in values if each]
        lines += [f"| {variant} | " + " | ".join(spread) + " |"] if found else []
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
    (args.output / "ablation_real.md").write_text(
        "Made by `benchmarks/ablation_real.py`.\n\n" + "\n\n".join(table(results, part) for part in PARTS) + "\n"
    )


if __name__ == "__main__":
    main()
