"""The paper's recipe as the defaults of `TrainingArguments`."""

import importlib.util
import logging
import math
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType

logger = logging.getLogger(__name__)

_CACHE_DTYPES = ("float32", "float16", "bfloat16")


@dataclass
class DeltaVLMTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the settings of the authors' release as defaults: learning rate 1e-5, falling to 0 along
    a cosine after 1,000 steps of warm-up, weight decay 0.05 (not on biases and norms), 12 rows a step, at most 50
    epochs, stopping 10 evaluations after the best. They trained in fp16; here it is bf16 where the GPU has it.

    Warm-up takes a tenth of the steps that the run will make at most, whatever `warmup_steps` is, and the run says so:
    of a small data set, 1,000 steps can be many epochs.

    The batch of 12 is that of one process: with several, set `per_device_train_batch_size` lower to keep the recipe.

    Args:
        early_stopping_patience (`int`, *optional*, defaults to 10): evaluations without a better
            `metric_for_best_model` after which training stops; 0 for never. Needs evaluation data.
        group_by_length (`bool`, *optional*, defaults to `True`): rows of like length in one batch.
        save_frozen_weights (`bool`, *optional*, defaults to `False`): write everything into each checkpoint, not only
            what trains, see [`leave_out_frozen`].
        vision_cache (`str`, *optional*): a folder for the states of the frozen vision blocks, see [`PrefixCache`].
        vision_cache_dtype (`str`, *optional*, defaults to `"bfloat16"`): their precision.

    Raises:
        ValueError: if settings do not go together, such as `save_steps` and `eval_steps` while the best model is to be
            loaded at the end, or are out of range.
    """

    learning_rate: float = 1e-5
    lr_scheduler_type: SchedulerType | str = "cosine"
    warmup_steps: float = 1000
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 12
    num_train_epochs: float = 50
    bf16: bool | None = None
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    prediction_loss_only: bool = True
    eval_strategy: IntervalStrategy | str = "epoch"
    save_strategy: SaveStrategy | str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    logging_steps: float = 10
    report_to: str | list[str] | None = field(
        default_factory=lambda: "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    )
    early_stopping_patience: int = 10
    group_by_length: bool = True
    save_frozen_weights: bool = False
    vision_cache: str | None = None
    vision_cache_dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_train_epochs <= 0 and self.max_steps <= 0:
            raise ValueError(f"`num_train_epochs` must be more than 0, got {self.num_train_epochs}.")
        if self.vision_cache_dtype not in _CACHE_DTYPES:
            raise ValueError(
                f"`vision_cache_dtype` is {self.vision_cache_dtype!r}, expected one of {', '.join(_CACHE_DTYPES)}."
            )
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and not self.fp16 and torch.cuda.is_bf16_supported()
        if self.load_best_model_at_end:
            self._check_that_the_best_is_saved()
        super().__post_init__()

    def _check_that_the_best_is_saved(self) -> None:
        evaluated, saved = IntervalStrategy(self.eval_strategy).value, SaveStrategy(self.save_strategy).value
        otherwise = "or set `load_best_model_at_end: false`"
        if evaluated == "no":
            raise ValueError(
                "`eval_strategy` is 'no', but `load_best_model_at_end`, which is on here by default, goes by the "
                f"evaluations: set `eval_strategy` to 'epoch' or 'steps', {otherwise}."
            )
        if saved == "best":
            return
        if evaluated != saved:
            raise ValueError(
                f"`save_strategy` is {saved!r} and `eval_strategy` {evaluated!r}, but `load_best_model_at_end`, which "
                f"is on here by default, needs a checkpoint of what was evaluated: give both the same, {otherwise}."
            )
        between = self.eval_steps or self.logging_steps
        if evaluated == "steps" and between and not _is_multiple(self.save_steps, between):
            alike = (self.save_steps < 1) == (between < 1)
            fitting = math.ceil(self.save_steps / between) * between if alike else between
            given = "" if self.eval_steps else " (that of `logging_steps`)"
            raise ValueError(
                f"`save_steps` is {self.save_steps:g} and `eval_steps` {between:g}{given}, but "
                "`load_best_model_at_end`, which is on here by default, needs an evaluation at every checkpoint: make "
                f"`save_steps` a multiple of `eval_steps`, such as `save_steps: {fitting:g}`, {otherwise}."
            )

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """As many as `warmup_steps` says, but a tenth of all steps at most; that is then told."""
        asked, most = super().get_warmup_steps(num_training_steps), num_training_steps // 10
        if asked > most and self.process_index == 0:
            logger.warning(
                "Warm-up takes %s of the %s steps of this run: not %s, as `warmup_steps` has it, but a tenth at most.",
                *(f"{number:,}" for number in (most, num_training_steps, asked)),
            )
        return min(asked, most)


def _is_multiple(steps: float, of: float) -> bool:
    """Of the same kind: both are steps, or both shares of all steps."""
    return (steps < 1) == (of < 1) and math.isclose(steps / of, max(1, round(steps / of)), rel_tol=1e-6)
