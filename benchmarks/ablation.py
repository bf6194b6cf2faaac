"""
The paper's ablation at the size of the small model: CSRM against plain concatenation, trained against frozen vision.

    python benchmarks/ablation.py --output ablation.json

For each seed a vision encoder learns to see changes under a throw-away head that reads both dates' plain features, so
that it suits CSRM and concatenation alike. From there every variant gets the same steps of the stages `eyes`, `align`
and `speak` of `examples/train_tiny.py`, and the shipped model's language model, frozen. Budgets are far below the
shipped model's: the table compares, it does not show what is possible. Finished runs are kept and not repeated.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_tiny

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration

VARIANTS = {
    "csrm, vision trained": ("csrm", True),
    "csrm, vision frozen": ("csrm", False),
    "concatenation, vision trained": ("concat", True),
}
STEPS = {"pretrain": 400, "eyes": 400, "align": 400, "speak": 120}
TEST_SEED = 5_300_000
STAGES = {"eyes": train_tiny.Eyes, "align": train_tiny.Align, "speak": train_tiny.Speak}


def make(difference: str, seed: int) -> DeltaVLMForConditionalGeneration:
    """A fresh model around the shipped language model."""
    shipped = AutoModelForImageTextToText.from_pretrained(deltavlm_hf.tiny())
    config = DeltaVLMConfig.from_dict({**shipped.config.to_dict(), "difference_module": difference})
    set_seed(seed)
    model = DeltaVLMForConditionalGeneration(config)
    model.language_model.load_state_dict(shipped.language_model.state_dict())
    return model


def fit(stage: str, model: DeltaVLMForConditionalGeneration, scenes, processor, steps: int, seed: int) -> None:
    questions = train_tiny.QUESTIONS_PER_PAIR if stage == "speak" else 1
    collator = train_tiny.Collator(processor, questions)
    scale = steps / train_tiny.STAGES[stage][0]
    train_tiny.train(stage, STAGES[stage](model), scenes, collator, scale, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=6400, help="generated training pairs")
    parser.add_argument("--test", type=int, default=200, help="unseen pairs")
    args = parser.parse_args()
    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    scenes = train_tiny.Scenes(train_tiny.TRAIN_SEEDS, args.scenes)
    results = json.loads(args.output.read_text()) if args.output.exists() else {}
    for seed in range(args.seeds):
        missing = [name for name in VARIANTS if f"{name}, seed {seed}" not in results]
        if not missing:
            continue
        eyes = make("concat", seed)
        eyes.language_model.requires_grad_(False)
        fit("eyes", eyes, scenes, processor, STEPS["pretrain"], seed)
        for name in missing:
            difference, trained = VARIANTS[name]
            model = make(difference, seed)
            model.vision_model.load_state_dict(eyes.vision_model.state_dict())
            model.language_model.requires_grad_(False)
            model.vision_model.requires_grad_(trained)
            for stage in STAGES:
                fit(stage, model, scenes, processor, STEPS[stage], seed)
            with tempfile.TemporaryDirectory() as folder:
                train_tiny.save(model, processor, Path(folder))
                results[f"{name}, seed {seed}"] = train_tiny.evaluate(Path(folder), TEST_SEED, args.test)
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    figures = ("yes_no", "roads_exact", "buildings_exact", "grid_f1_roads", "grid_f1_buildings", "open_exact")
    print(f"| variant | {' | '.join(figures)} |\n|---|{'---:|' * len(figures)}")
    for name in VARIANTS:
        runs = [results[f"{name}, seed {seed}"] for seed in range(args.seeds)]
        cells = []
        for figure in figures:
            values = torch.tensor([run[figure] for run in runs], dtype=torch.float64)
            cells.append(f"{values.mean():.3f} ({values.min():.3f}-{values.max():.3f})")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
