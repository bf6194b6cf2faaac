"""Rows of a data set to a batch for the model: what `Trainer` takes as its data collator."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import BatchFeature

from ..processing import DeltaVLMProcessor
from .rows import turns_of


class VisionStates(Protocol):
    """What [`PrefixCache`] gives in place of pixels: the states of rows, and the vision block that they enter."""

    first_block: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> torch.Tensor: ...


class PairCollator:
    """
    Makes a training batch of rows: each row's last question, the turns before it as its history, and its last answer
    as labels. Load data with `unroll=True` to learn every turn of a dialogue.

    A first question goes to the processor in dialogue form too (`q: ...`), as the authors' training has it.

    Args:
        processor ([`DeltaVLMProcessor`]): the model's.
        vision_cache ([`PrefixCache`], *optional*): gives vision states in place of pixels. Rows then have their images
            undecoded.
    """

    def __init__(self, processor: DeltaVLMProcessor, vision_cache: VisionStates | None = None):
        self.processor = processor
        self.vision_cache = vision_cache

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`): with `before`, `after` and `turns`, see [`load_changechat`]; other columns are left.

        Returns:
            `BatchFeature`: `pixel_values` `(B, 2, 3, H, W)`, `input_ids`, `labels` and what else the model takes.
        """
        turns = list(map(turns_of, rows))
        cached = self.vision_cache is not None
        batch = self.processor(
            images=None if cached else [(row["before"], row["after"]) for row in rows],
            text=[pair_turns[-1][0] for pair_turns in turns],
            history=[pair_turns[:-1] for pair_turns in turns],
            answers=[pair_turns[-1][1] for pair_turns in turns],
            padding=True,
            return_tensors="pt",
        )
        if self.vision_cache is not None:
            batch["vision_states"] = self.vision_cache(rows)
            batch["vision_states_block"] = self.vision_cache.first_block
        return batch
