"""
Whether the heat maps of `model.explain` lie where the change is: their mass inside the true masks of generated pairs.

    python benchmarks/heat_maps.py

For each changed pair: the share of a map's mass inside the mask, the mask's share of the image (what an even map has
there: chance), and the ratio of densities inside and outside. Means over pairs; as a second baseline, the same maps
against another pair's mask.
"""

import argparse
import json

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import deltavlm_hf
from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.data.scenes import generate_scene

FIRST_SEED = 5_200_000


def measure(heat: torch.Tensor, mask: torch.Tensor) -> tuple[float, float]:
    """Mass inside, and density inside relative to outside."""
    inside = float(heat[mask].sum() / heat.sum())
    area = float(mask.float().mean())
    return inside, (inside / area) / ((1 - inside) / (1 - area))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=deltavlm_hf.tiny())
    parser.add_argument("--pairs", type=int, default=200)
    args = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(args.model)
    processor = AutoProcessor.from_pretrained(args.model)
    size = processor.image_processor.size["height"]
    scenes, seed = [], FIRST_SEED
    while len(scenes) < args.pairs:
        scene = generate_scene(seed, size)
        seed += 1
        if scene.mask.any():
            scenes.append(scene)
    masks = [torch.from_numpy(scene.mask > 0) for scene in scenes]
    kinds = {"change": "change", **{f"attention, {task}": question for task, question in INSTRUCTIONS.items()}}
    figures = {"pairs": len(scenes), "mask_share": float(torch.stack(masks).float().mean())}
    for kind, question in kinds.items():
        rows = []
        for index, scene in enumerate(scenes):
            inputs = processor(images=(scene.before, scene.after), text=question, history=[], return_tensors="pt")
            maps = model.explain(**inputs)
            heat = maps.change[0] if kind == "change" else maps.attention[0].sum(0)
            rows.append((*measure(heat, masks[index]), *measure(heat, masks[index - 1])))
        inside, ratio, other_inside, other_ratio = torch.tensor(rows).mean(0).tolist()
        figures[kind] = {
            "inside": inside,
            "inside_over_outside": ratio,
            "other_mask_inside": other_inside,
            "other_mask_inside_over_outside": other_ratio,
        }
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
