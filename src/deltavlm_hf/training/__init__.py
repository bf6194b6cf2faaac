"""Fine-tuning with `Trainer`: what trains, the paper's recipe, small checkpoints, resuming, cached vision states."""

from ..lazy import lazy_names

_MODULES = {
    "DeltaVLMTrainer": "trainer",
    "DeltaVLMTrainingArguments": "arguments",
    "FreezePolicy": "freezing",
    "PairAugmentation": "augmentation",
    "PrefixCache": "prefix_cache",
    "TrainingRows": "rows",
    "estimate_memory": "memory",
    "freeze": "freezing",
    "last_complete_checkpoint": "checkpoints",
    "leave_out_frozen": "freezing",
    "merge_lora": "freezing",
    "trainable_table": "freezing",
}

SETTINGS_FILE = "training_run.json"  # in the output folder of a run: with what the model was trained

__all__ = ["SETTINGS_FILE", *_MODULES]

__getattr__, __dir__ = lazy_names(__name__, _MODULES)
