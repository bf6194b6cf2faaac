"""
Many pairs by one command: how much faster than by the ways that there were, and where the time goes.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/predict.py --output docs/benchmarks

writes `predict.json` and `predict.md` there; the command line sets that variable by itself. The ways take turns, each
round asks one question about each pair of a folder of PNGs, generated scenes enlarged to `--side` pixels; each figure
is the median over rounds. A loop over `deltavlm ask` starts anew for every pair: it is measured with a few of them.

Parts are measured by themselves, in one process: reading and resizing, handing over between processes, the model,
writing. From these follows, computed, how long an accelerator waits that answers faster than this machine: it goes on
when the next pair is read, and stands still while answers are written and pairs are handed over.
"""

import argparse
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from deltavlm_hf.data.asked import questions_of
from deltavlm_hf.data.pairs import PairTable, find_pair_table
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ask_pairs, encode, stream_answers
from deltavlm_hf.inference.asking import PAIRS_AT_ONCE, ask_turns, pair_pixels
from deltavlm_hf.inference.loading import load_model
from deltavlm_hf.inference.results import result_rows, write_rows
from deltavlm_hf.journal import Journal

SPEEDS = (10, 30, 100, 300)  # pairs per second of an accelerator, for which its waiting is computed
WORKERS = (1, 2, 4, 8, 16)


def make_pairs(folder: Path, number: int, side: int) -> PairTable:
    for index in range(number):
        scene = generate_scene(index)
        for date, image in (("A", scene.before), ("B", scene.after)):
            (folder / date).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).resize((side, side)).save(folder / date / f"{index:05}.png")
    return find_pair_table(folder)


def seconds(way: Callable[[], Any]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def command(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "deltavlm_hf", *map(str, arguments)], check=True, capture_output=True)


def measure_ways(args: argparse.Namespace, model, processor, pairs: PairTable, folder: Path) -> dict[str, float]:
    """Seconds for a pair, by each way."""
    questions = [args.question]
    shared = ["--model", args.model, "--device", args.device]
    (asked,) = questions_of(args.question)

    def ask_each() -> None:
        for index in range(args.asked):
            command("ask", *pairs[index], asked, *shared)

    def predict() -> None:
        fixed = ["--batch-size", args.batch_size, "--workers", args.workers, *shared]
        command("predict", folder, "--questions", *questions, "--output", folder.parent / "answers.parquet", *fixed)

    options = {"batch_size": args.batch_size}
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "`deltavlm ask`, pair after pair": (args.asked, ask_each),
        "`ask_pairs`": (len(pairs), lambda: list(ask_pairs(model, processor, pairs, [asked], **options))),
        "`stream_answers`": (
            len(pairs),
            lambda: list(stream_answers(model, processor, pairs, [asked], num_workers=args.workers, **options)),
        ),
        "`deltavlm predict`, with its start": (len(pairs), predict),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, (number, way) in ways.items():
            found[name].append(seconds(way) / number)
    return {name: statistics.median(times) for name, times in found.items()}


def measure_parts(args: argparse.Namespace, model, processor, pairs: PairTable, folder: Path) -> dict[str, float]:
    """Seconds for a pair, of each part of the work."""
    dialogues = [questions_of(args.question)]
    found: dict[str, list[float]] = {name: [] for name in ("reading", "handing over", "model", "writing")}
    for number in range(args.rounds):
        journal = Journal(folder.parent / f"journal.{number}.jsonl", {}, ("index",))
        spent = dict.fromkeys(found, 0.0)
        for start in range(0, len(pairs), args.batch_size):
            indices = range(start, min(start + args.batch_size, len(pairs)))
            times = [time.perf_counter()]
            pixels = [pair_pixels(processor.image_processor, pairs[index]) for index in indices]
            times.append(time.perf_counter())
            pixels = pickle.loads(pickle.dumps(pixels))
            times.append(time.perf_counter())
            pixel_values = torch.cat([torch.from_numpy(each) for each in pixels])
            features = [
                each
                for some in pixel_values.split(PAIRS_AT_ONCE)
                for each in model.encode_pair(some.to(model.device, model.dtype))
            ]
            answers = ask_turns(model, processor, features, dialogues, args.batch_size, {})
            times.append(time.perf_counter())
            journal.append(
                *({"index": index, "answers": said[0]} for index, said in zip(indices, answers, strict=True))
            )
            times.append(time.perf_counter())
            for name, before, after in zip(spent, times, times[1:], strict=False):
                spent[name] += after - before
        entries = [journal.entries[index,] for index in range(len(pairs))]
        spent["writing"] += seconds(
            lambda entries=entries: write_rows(
                folder.parent / "parts.parquet", result_rows(pairs.named(), dialogues, entries, args.model, "")
            )
        )
        for name, times_of in found.items():
            times_of.append(spent[name] / len(pairs))
    return {name: statistics.median(times) for name, times in found.items()}


def waiting(parts: dict[str, float], pairs_per_second: float, workers: int) -> float:
    """The share of its time in which an accelerator of this speed waits."""
    busy = 1 / pairs_per_second
    return 1 - busy / max(busy + parts["handing over"] + parts["writing"], parts["reading"] / workers)


def table(setting: dict[str, Any], ways: dict[str, float], parts: dict[str, float]) -> str:
    _, ours, streamed, _ = ways.values()
    lines = [
        "# Many pairs, measured",
        "",
        "Written by `" + setting["command"] + "`; ratios of times that took turns.",
        "",
    ]
    lines += [f"- {name}: {value}" for name, value in setting.items() if name != "command"]
    lines += ["", "| way | times as fast as `deltavlm ask` | times as fast as `ask_pairs` |", "|---|---|---|"]
    first = next(iter(ways.values()))
    lines += [f"| {name} | {first / time_of:.2f} | {ours / time_of:.2f} |" for name, time_of in ways.items()]
    lines += ["", f"`stream_answers`: {ours / streamed:.2f} times `ask_pairs` (aim: 1.25 on two cores).", ""]
    lines += ["| part of a pair's work, in one process | share |", "|---|---|"]
    lines += [f"| {name} | {time_of / sum(parts.values()):.1%} |" for name, time_of in parts.items()]
    lines += [
        "",
        "How long an accelerator waits, computed from these parts as they are on this machine, by its speed and",
        "",
    ]
    lines[-2] += " `--workers`:"
    lines += [f"| pairs per second | {' | '.join(map(str, WORKERS))} |", "|---" * (len(WORKERS) + 1) + "|"]
    for speed in SPEEDS:
        lines.append(f"| {speed} | {' | '.join(f'{waiting(parts, speed, number):.0%}' for number in WORKERS)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--question", default="binary")
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--asked", type=int, default=3, help="pairs for the loop over `deltavlm ask`")
    parser.add_argument("--side", type=int, default=256, help="pixels of an image")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="folder for predict.json and predict.md")
    args = parser.parse_args()
    model, processor = load_model(args.model, args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "pairs"
        pairs = make_pairs(folder, args.pairs, args.side)
        with torch.inference_mode():
            encode(model, processor, [pairs[0]])  # warm
            parts = measure_parts(args, model, processor, pairs, folder)
        ways = measure_ways(args, model, processor, pairs, folder)
    setting = {
        "command": " ".join(["python", *sys.argv]),
        "threads that wait": os.environ.get("OMP_WAIT_POLICY", "spin").lower(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {args.device}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "pairs": f"{args.pairs} of {args.side} x {args.side} pixels, {args.rounds} rounds",
        "asked": f"{args.model}, one question ({args.question}), batches of {args.batch_size}",
        "processes that read": args.workers,
    }
    text = table(setting, ways, parts)
    if args.output is None:
        print(text)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    found = {**setting, "seconds_for_a_pair": {"ways": ways, "parts": parts}}
    (args.output / "predict.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.output / "predict.md").write_text(text)


if __name__ == "__main__":
    main()
