"""The paper's recipe as the defaults of `TrainingArguments`."""

import importlib.util
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments


@dataclass
class DeltaVLMTrainingArguments(TrainingArguments):
    """
    [`TrainingArguments`] with the settings of the authors' release as defaults: learning rate 1e-5, falling to 0 along
    a cosine after 1,000 steps of warm-up, weight decay 0.05 (not on biases and norms), 12 rows a step, at most 50
    epochs, stopping 10 evaluations after the best. They trained in fp16; here it is bf16 where the GPU has it.

    The batch of 12 is that of one process: with several, set `per_device_train_batch_size` lower to keep the recipe.

    Args:
        early_stopping_patience (`int`, *optional*, defaults to 10): evaluations without a better
            `metric_for_best_model` after which training stops; 0 for never. Needs evaluation data.
        group_by_length (`bool`, *optional*, defaults to `True`): rows of like length in one batch.
        save_frozen_weights (`bool`, *optional*, defaults to `False`): write everything into each checkpoint, not only
            what trains, see [`leave_out_frozen`].
        vision_cache (`str`, *optional*): a folder for the states of the frozen vision blocks, see [`PrefixCache`].
        vision_cache_dtype (`str`, *optional*, defaults to `"bfloat16"`): their precision.
    """

    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 1000
    weight_decay: float = 0.05
    per_device_train_batch_size: int = 12
    num_train_epochs: float = 50
    bf16: bool = field(default_factory=lambda: torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    remove_unused_columns: bool = False
    label_names: list[str] | None = field(default_factory=lambda: ["labels"])
    ddp_find_unused_parameters: bool | None = False
    prediction_loss_only: bool = True
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
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
