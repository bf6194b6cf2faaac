"""Rows of a data set to a batch for the model: what `Trainer` takes as its data collator."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature

from ..processing import DeltaVLMProcessor
from ..processing.processing_deltavlm import IGNORE_INDEX
from .classes import ROADS_AND_BUILDINGS, Classes
from .masks import centre_maps, check_classes, class_maps, read_mask
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
        mask_classes (`Sequence[str]`, *optional*): the model's `config.mask_classes`, to learn masks beside answers.
            Rows then have a column `mask`; those where it is None teach answers alone.
        centres (`bool`, *optional*, defaults to `False`): with the centres of objects, for models with
            `mask_evidence`.
        classes ([`Classes`], *optional*): of the masks, see [`find_classes`]; by default roads and buildings.

    Raises:
        ValueError: for classes that masks do not have, or masks with a `vision_cache`.
    """

    def __init__(
        self,
        processor: DeltaVLMProcessor,
        vision_cache: VisionStates | None = None,
        mask_classes: Sequence[str] | None = None,
        centres: bool = False,
        classes: Classes = ROADS_AND_BUILDINGS,
    ):
        if mask_classes and vision_cache is not None:
            raise ValueError(
                "Masks are learnt from pixels, in whose place `vision_cache` gives states: leave out one of them."
            )
        check_classes(mask_classes or (), classes)
        self.processor = processor
        self.vision_cache = vision_cache
        self.mask_classes = mask_classes
        self.centres = centres
        self.classes = classes

    def __call__(self, rows: list[dict[str, Any]]) -> BatchFeature:
        """
        Args:
            rows (`list[dict]`): with `before`, `after` and `turns`, and `mask` where masks are learnt, see
                [`load_changechat`]; other columns are left.

        Returns:
            `BatchFeature`: `pixel_values` `(B, 2, 3, H, W)`, `input_ids`, `labels` and what else the model takes;
            `mask_labels` and `centre_labels` `(B, K, H, W)` if asked, -100 for rows without a mask.

        Raises:
            ValueError: for a mask that cannot be used, see [`read_mask`].
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
        if self.mask_classes:
            height, width = batch["pixel_values"].shape[-2:]
            maps = [self._class_maps(row, height, width) for row in rows]
            batch["mask_labels"] = _stack(maps, (len(self.mask_classes), height, width))
            if self.centres:
                centres = [None if each is None else centre_maps(each) for each in maps]
                batch["centre_labels"] = _stack(centres, batch["mask_labels"].shape[1:])
        return batch

    def _class_maps(self, row: dict[str, Any], height: int, width: int) -> np.ndarray | None:
        mask = read_mask(row, self.classes)
        if mask is None:
            return None
        resized = Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
        return class_maps(np.asarray(resized), self.mask_classes or (), self.classes)


def _stack(maps: list[np.ndarray | None], shape: Sequence[int]) -> torch.Tensor:
    unknown = np.full(shape, IGNORE_INDEX, np.float32)
    return torch.from_numpy(np.stack([unknown if each is None else each for each in maps]))
