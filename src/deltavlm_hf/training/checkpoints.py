"""Which checkpoint a run that was killed goes on from."""

import json
import zipfile
from pathlib import Path

from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

_SHARDS = (f"{FSDP_MODEL_NAME}*", "global_step*")


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint of `Trainer` that was written to its end; those cut short by a kill are passed over.

    For `trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))`. `Trainer` alone takes the newest,
    whole or not.

    Args:
        output_dir (`str` or `Path`): the run's folder. It need not exist.

    Returns:
        `str`, *optional*: the checkpoint's folder, or None if there is none.
    """
    numbered = []
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdecimal():
            numbered.append((int(number), folder))
    for _, folder in sorted(numbered, reverse=True):
        if is_complete(folder):
            return str(folder)
    return None


def is_complete(checkpoint: Path) -> bool:
    """Whether all files of a checkpoint are whole. `Trainer` writes its state last, after the other files."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        weights = sorted(checkpoint.glob("*.safetensors"))
        for file in weights:
            with safe_open(file, framework="pt"):  # compares the file's length with what its head says
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    # FSDP and DeepSpeed write weights and optimizer in folders of their own.
    sharded = any(path.is_dir() for name in _SHARDS for path in checkpoint.glob(name))
    random_states = list(checkpoint.glob("rng_state*.pth"))
    states = [checkpoint / SCHEDULER_NAME, *random_states]
    if not sharded:
        states.append(checkpoint / OPTIMIZER_NAME)
    return bool(weights or sharded) and bool(random_states) and all(map(zipfile.is_zipfile, states))
