"""
A training step with vision states from the cache against one that computes them, at the model's real proportions.

    python benchmarks/training_step.py

Widths are scaled down from the paper's by one factor, depths are its own (39 vision blocks, 12 Q-Former layers, 32
layers of the language model), so that the shares of the parts stay what they are. Steps of both ways take turns in one
process; the figure is the ratio of their medians.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import LlamaConfig

from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.training import FreezePolicy, freeze

HEADS = {"vision": 16, "qformer": 12, "language": 32}


def scaled(width: int, factor: int, heads: int) -> int:
    """A width that divides among its heads, with an even part for each."""
    return max(2 * heads, round(width / factor / (2 * heads)) * 2 * heads)


def make(factor: int) -> DeltaVLMForConditionalGeneration:
    language = scaled(4096, factor, HEADS["language"])
    config = DeltaVLMConfig(
        vision_config={
            "hidden_size": scaled(1408, factor, HEADS["vision"]),
            "intermediate_size": 6144 // factor,
            "num_attention_heads": HEADS["vision"],
        },
        qformer_config={
            "hidden_size": scaled(768, factor, HEADS["qformer"]),
            "intermediate_size": 3072 // factor,
            "num_attention_heads": HEADS["qformer"],
        },
        text_config=LlamaConfig(
            hidden_size=language,
            intermediate_size=11008 // factor,
            num_attention_heads=HEADS["language"],
            num_hidden_layers=32,
            vocab_size=32000 // factor,
        ),
        image_token_id=32000 // factor,
    )
    return DeltaVLMForConditionalGeneration(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factor", type=int, default=8, help="by which widths are smaller than the paper's")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--text", type=int, default=96, help="tokens of question and answer")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = make(args.factor)
    freeze(model, FreezePolicy(vision_blocks=2))
    model.train()
    blocks = model.config.vision_config.num_hidden_layers - 2
    size = model.config.vision_config.image_size
    pixel_values = torch.randn(args.batch_size, 2, 3, size, size)
    with torch.no_grad():
        states = model.encode_vision_prefix(pixel_values.flatten(0, 1), blocks).unflatten(0, (-1, 2))
    placeholders = torch.full((args.batch_size, model.config.num_query_tokens), model.config.image_token_id)
    text = torch.randint(3, 32000 // args.factor, (args.batch_size, args.text))
    input_ids = torch.cat([placeholders, text], dim=1)
    inputs = {
        "input_ids": input_ids,
        "labels": input_ids.masked_fill(input_ids == model.config.image_token_id, -100),
        "qformer_input_ids": torch.randint(3, 1000, (args.batch_size, 32)),
    }
    ways = {
        "computed": {"pixel_values": pixel_values},
        "cached": {"vision_states": states, "vision_states_block": blocks},
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(args.rounds + 1):
        for way, images in ways.items():
            model.zero_grad()
            start = time.perf_counter()
            model(**inputs, **images).loss.backward()
            times[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(seconds[1:]) for way, seconds in times.items()}
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in model.named_children()}
    print(
        json.dumps({"computed_over_cached": medians["computed"] / medians["cached"], "parameters": counts}, indent=2)
    )


if __name__ == "__main__":
    main()
