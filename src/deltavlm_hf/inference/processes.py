"""Several processes at one task: who does what, and that no other run does the same."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
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


@contextmanager
def keeping(output: Path) -> Iterator[Path]:
    """
    `OUTPUT.journal`, a folder for what is answered until the file is written whole, locked as [`lock_folder`] does.
    Afterwards it is gone, unless a journal in it (`*.jsonl`) has entries: of a run that has answered nothing, or is
    done with, nothing remains.
    """
    folder = output.with_name(f"{output.name}.journal")
    with lock_folder(folder):
        try:
            yield folder
        finally:
            if process_state().is_main_process and not any(map(_has_entries, folder.glob("*.jsonl"))):
                shutil.rmtree(folder)


def _has_entries(journal: Path) -> bool:
    with journal.open("rb") as file:
        return any(line.endswith(b"\n") for line in islice(file, 1, 2))  # behind the header, and whole
