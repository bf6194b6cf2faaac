"""
Eight questions about one pair: in one batch on features encoded once, against eight single calls.

    python benchmarks/questions_per_pair.py

The sizes are vision-heavy: the vision encoder has most of the operations, as with the paper's ViT-g at 224 pixels and
short answers. Weights are random, answers have a fixed length. Both ways run by turns in one process; the ratio of
their median times is what counts.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlamaConfig

import deltavlm_hf
from deltavlm_hf import DeltaVLMConfig, DeltaVLMForConditionalGeneration
from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.evaluation import ModelAnswerer
from deltavlm_hf.inference import answer

QUESTIONS = [
    *INSTRUCTIONS.values(),
    "How many buildings were built?",
    "Are there new buildings in the center?",
    "Is there a new road in the top left?",
    "Where are the new buildings?",
]


def make_model(processor) -> DeltaVLMForConditionalGeneration:
    """The shipped model's tokenizers and image size; a vision encoder far larger than the rest."""
    torch.manual_seed(0)
    size = processor.image_processor.size["height"]
    vision = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    config = DeltaVLMConfig(
        vision_config={**vision, "image_size": size, "patch_size": 8},
        qformer_config={
            "vocab_size": len(processor.qformer_tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
        text_config=LlamaConfig(
            vocab_size=len(processor.tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        num_query_tokens=processor.num_query_tokens,
        image_token_id=processor.image_token_id,
    )
    return DeltaVLMForConditionalGeneration(config).eval()


def timed(run: Callable[[], list[str]]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=8, help="of every answer")
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(deltavlm_hf.tiny())
    model = make_model(processor)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    pair = (Image.fromarray(pixels[0]), Image.fromarray(pixels[1]))
    length = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens}
    answerer = ModelAnswerer(model, processor, **length)
    alone = [None] * len(QUESTIONS)

    def one_batch() -> list[str]:
        return answerer.answer(answerer.encode([pair]), [0] * len(QUESTIONS), QUESTIONS, alone)

    def single_calls() -> list[str]:
        return [answer(model, processor, [question], None, [pair], **length)[0] for question in QUESTIONS]

    if one_batch() != single_calls():  # both are warm after this
        raise SystemExit("The two ways answer differently.")
    times: dict[str, list[float]] = {"one batch": [], "single calls": []}
    for _ in range(args.rounds):
        times["one batch"].append(timed(one_batch))
        times["single calls"].append(timed(single_calls))
    middle = {name: statistics.median(values) for name, values in times.items()}
    ratios = [single / batch for single, batch in zip(times["single calls"], times["one batch"], strict=True)]
    print(
        json.dumps(
            {
                "questions": len(QUESTIONS),
                "answer tokens": args.tokens,
                "rounds": args.rounds,
                "torch": torch.__version__,
                "threads": torch.get_num_threads(),
                "single calls / one batch, medians": round(middle["single calls"] / middle["one batch"], 2),
                "by round": [round(ratio, 2) for ratio in ratios],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
