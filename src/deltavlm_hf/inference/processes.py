"""Several processes at one task: who does what, and that no other run does the same."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout


def process_state() -> PartialState:
    """Which of how many processes this is; on the CPU accelerate must be told to look for others."""
    return PartialState(cpu=not torch.cuda.is_available())


def own_device(device: str) -> str:
    """Where this process loads its model: under `torchrun`, by default, each of them has a whole one of its own."""
    state = process_state()
    return str(state.device) if device == "auto" and state.num_processes > 1 else device


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """
    While this run, all of its processes together, is the only one that answers into a folder.

    Raises:
        BlockingIOError: if another run does. One that was killed does not count.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        is_taken = [False]
        if process_state().is_main_process:
            try:  # entered once more by `predict`, where the command line holds it already
                stack.enter_context(FileLock(folder / "predictions.lock", timeout=0, is_singleton=True))
            except Timeout:
                is_taken = [True]
        if broadcast_object_list(is_taken)[0]:
            raise BlockingIOError(f"Another run is answering into {folder}: wait for it, or choose another folder.")
        yield
