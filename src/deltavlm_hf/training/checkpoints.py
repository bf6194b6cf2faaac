"""Which checkpoint a run that was killed goes on from."""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


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
    sharded = any(path.is_dir() for path in checkpoint.glob("*"))  # by FSDP or DeepSpeed, in folders of their own
    states = [checkpoint / SCHEDULER_NAME, *checkpoint.glob("rng_state*.pth")]
    if not sharded:
        states.append(checkpoint / OPTIMIZER_NAME)
    return bool(weights or sharded) and len(states) > 1 and all(map(zipfile.is_zipfile, states))
