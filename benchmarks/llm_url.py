"""
Answers decoded by vLLM beside the same ones decoded here: whether they are equal, token by token, and how the times
compare. Both take turns in one process, on the same pairs and questions.

    deltavlm export-llm tiny llm
    .venv-vllm/bin/vllm serve llm --enable-prompt-embeds --dtype float32 --host 127.0.0.1 --port 8001
    python benchmarks/llm_url.py --llm-url http://127.0.0.1:8001/v1
"""

import argparse
import statistics
import time

import torch

from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference.asking import encode, generate_ids
from deltavlm_hf.inference.loading import load_model

SEED = 4_900_000  # beyond all that the models inside the package were trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="whose language model vLLM has")
    parser.add_argument("--llm-url", required=True)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    models = {url: load_model(args.model, "cpu", llm_url=url) for url in (None, args.llm_url)}
    questions = [INSTRUCTIONS[task] for task in ("caption", "binary", "count", "grid")]
    scenes = [generate_scene(SEED + number) for number in range(args.pairs)]
    model, processor = models[None]
    features = encode(model, processor, [(scene.before, scene.after) for scene in scenes])
    asked, features = questions * args.pairs, features.repeat_interleave(len(questions), 0)
    times: dict[str | None, list[float]] = {url: [] for url in models}
    answers: dict[str | None, list[list[int]]] = {}
    for _ in range(args.rounds + 1):
        for url, (model, processor) in models.items():
            start = time.perf_counter()
            ids = generate_ids(model, processor, asked, pair_features=features)
            times[url].append(time.perf_counter() - start)
            answers[url] = [_to_its_end(each, model.generation_config.eos_token_id) for each in ids]
    here, there = answers.values()
    equal = sum(map(list.__eq__, here, there))
    ratios = [one / other for one, other in zip(*times.values(), strict=True)][1:]  # the first round warms up
    print(f"{equal} of {len(here)} answers are equal, {sum(map(len, here))} tokens")
    print(f"vLLM is {statistics.median(ratios):.2f} times as fast as here ({min(ratios):.2f} to {max(ratios):.2f})")


def _to_its_end(ids: torch.Tensor, end: int) -> list[int]:
    found = ids.tolist()
    return found[: found.index(end) + 1] if end in found else found


if __name__ == "__main__":
    main()
