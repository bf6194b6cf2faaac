"""What a run on few pairs chooses by itself: how long it is, and how often it is evaluated, saved and logged."""

import math
from collections.abc import Mapping
from typing import Any

import datasets
import pyarrow.compute as pc

from .arguments import DeltaVLMTrainingArguments

SMALL = 500  # pairs: with fewer, a run chooses
STEPS = 1000  # that it aims at
EPOCHS = (5, 50)  # but no fewer and no more
EVALUATIONS = 20  # of a run: early stopping, after 10 without a better one, has half of it to look at
LOGS = 10  # steps between two at most

_INTERVALS = {"eval_strategy", "eval_steps", "save_strategy", "save_steps"}


def choose(
    stated: Mapping[str, Any], args: DeltaVLMTrainingArguments, rows: datasets.Dataset
) -> tuple[dict[str, Any], str]:
    """
    Settings for a run on fewer than 500 pairs, for which the paper's (1,000 steps of warm-up, 50 epochs, an evaluation
    after each) are not meant. They follow from the number of rows and the batch alone, so that a run that goes on
    chooses the same.

    Args:
        stated (`Mapping[str, Any]`): the settings that are given, none of which is chosen.
        args ([`DeltaVLMTrainingArguments`]): made of these.
        rows (`datasets.Dataset`): what is trained on, see [`load_changechat`].

    Returns:
        `tuple[dict[str, Any], str]`: what is chosen, by the names of [`TrainingArguments`], and a line that tells it;
        nothing of 500 pairs and more.
    """
    pairs = _count_pairs(rows)
    if pairs >= SMALL:
        return {}, ""
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    chosen: dict[str, Any] = {}
    epochs = args.num_train_epochs
    if args.max_steps <= 0 and "num_train_epochs" not in stated:
        epochs = chosen["num_train_epochs"] = min(max(round(STEPS / steps_per_epoch), EPOCHS[0]), EPOCHS[1])
    steps = args.max_steps if args.max_steps > 0 else math.ceil(epochs * steps_per_epoch)
    if "warmup_steps" not in stated:
        chosen["warmup_steps"] = steps // 10
    every = math.ceil(steps / EVALUATIONS)
    told = [f"{chosen['num_train_epochs']} epochs"] if "num_train_epochs" in chosen else []
    told.append(f"{steps} steps")
    if "warmup_steps" in chosen:
        told.append(f"{chosen['warmup_steps']} of warm-up")
    if not _INTERVALS & stated.keys():
        chosen |= {"save_strategy": "steps", "save_steps": every}
        if args.eval_strategy != "no":
            chosen |= {"eval_strategy": "steps", "eval_steps": every}
        told.append(f"{'evaluated and ' if 'eval_steps' in chosen else ''}saved every {every}")
    if not {"logging_strategy", "logging_steps"} & stated.keys():
        chosen["logging_steps"] = min(LOGS, every)
        told.append(f"logged every {chosen['logging_steps']}")
    line = f"{pairs} pairs, {len(rows)} questions: {', '.join(told)}."
    names = ", ".join(f"`{name}`" for name in chosen)
    return chosen, f"{line} Chosen, as `training` does not state them: {names}." if chosen else ""


def _count_pairs(rows: datasets.Dataset) -> int:
    """Counted until there are enough."""
    pairs: set[tuple[str, str]] = set()
    for batch in rows.select_columns(["before", "after"]).with_format("arrow").iter(1000):
        paths = [pc.struct_field(batch[date], "path").to_pylist() for date in ("before", "after")]
        pairs.update(zip(*paths, strict=True))
        if len(pairs) >= SMALL:
            break
    return len(pairs)
