"""`Trainer` for DeltaVLM: rows in their own order, small checkpoints, cached vision states, few logits."""

import torch
from transformers import EarlyStoppingCallback, Trainer

from ..data.classes import classes_of
from ..data.collator import PairCollator
from ..data.rows import undecoded
from ..files import replacing
from ..processing.processing_deltavlm import IGNORE_INDEX
from .arguments import DeltaVLMTrainingArguments
from .freezing import leave_out_frozen
from .prefix_cache import PrefixCache
from .rows import RowSampler, TrainingRows

CACHE_AND_AUGMENTATION = (
    "`vision_cache` keeps one state for each image, but augmentation makes new images in every epoch: leave out one "
    "of them."
)
CACHE_AND_MASKS = (
    "`vision_cache` gives states in place of pixels, of which masks are made: leave it out, or train text alone, with "
    "`masks: false` under `freeze`."
)


class DeltaVLMTrainer(Trainer):
    """
    [`Trainer`] with what DeltaVLM's recipe adds: the order of [`TrainingRows`], checkpoints that hold what trains
    ([`leave_out_frozen`]), early stopping, and vision states that are computed once ([`PrefixCache`]). Each of them
    works with the plain `Trainer` as well, the last in full precision. Beyond that, logits are computed only where a
    label is predicted. Where the model makes masks and rows have a column `mask`, it learns them too.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): after [`freeze`].
        args ([`DeltaVLMTrainingArguments`]).
        train_dataset ([`TrainingRows`]).
        eval_dataset (`datasets.Dataset`, *optional*): rows like those, not augmented.
        processing_class ([`DeltaVLMProcessor`]): the model's.
        kwargs: see [`Trainer`].

    Raises:
        ValueError: if vision states cannot be cached: see [`PrefixCache`]; for masks of other classes than rows have.
    """

    def __init__(self, model, args: DeltaVLMTrainingArguments, *, train_dataset, processing_class, **kwargs):
        has_masks = isinstance(train_dataset, TrainingRows) and "mask" in train_dataset.rows.column_names
        mask_classes = model.config.mask_classes if has_masks else None
        cache = None
        if args.vision_cache:
            if mask_classes:
                raise ValueError(CACHE_AND_MASKS)
            if getattr(train_dataset, "augmentation", None):
                raise ValueError(CACHE_AND_AUGMENTATION)
            cache = PrefixCache(args.vision_cache, model, processing_class, getattr(torch, args.vision_cache_dtype))
            with args.main_process_first(local=False, desc="vision states"):
                for rows in (train_dataset, kwargs.get("eval_dataset")):
                    if rows is not None:
                        cache.fill(getattr(rows, "rows", rows), args.device)
            train_dataset.rows = undecoded(train_dataset.rows)
            if kwargs.get("eval_dataset") is not None:
                kwargs["eval_dataset"] = undecoded(kwargs["eval_dataset"])
        if not args.save_frozen_weights:
            leave_out_frozen(model)
        centres, classes = model.config.mask_evidence, classes_of(model.config)
        collator = PairCollator(processing_class, cache, mask_classes, centres=centres, classes=classes)
        kwargs.setdefault("data_collator", collator)
        super().__init__(model, args, train_dataset=train_dataset, processing_class=processing_class, **kwargs)
        if args.early_stopping_patience and self.eval_dataset is not None and args.load_best_model_at_end:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))

    def _get_train_sampler(self, train_dataset=None) -> torch.utils.data.Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, TrainingRows):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return RowSampler(rows, step, args.group_by_length)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As in [`Trainer`]; model, processor and arguments take the place of older ones together."""
        folder = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(folder, state_dict)
        with replacing(folder) as new:
            super()._save(new, state_dict)

    def compute_loss(self, model, inputs, *args, **kwargs):
        """As in [`Trainer`]; the same loss from the logits of those positions that predict a label in some row."""
        # A loss of the user's own expects all logits; `DataParallel` would split the positions among devices.
        plain = self.compute_loss_func is None and self.label_smoother is None and self.args.n_gpu <= 1
        if model.training and plain and "labels" in inputs and "shift_labels" not in inputs:
            predicting = (inputs["labels"][:, 1:] != IGNORE_INDEX).any(0)
            inputs = {**inputs, "logits_to_keep": predicting.nonzero().squeeze(1)}
        with self.accelerator.autocast():  # which else begins after vision states have been read on
            return super().compute_loss(model, inputs, *args, **kwargs)
