"""Questions about many pairs, whose images are read and resized in other processes, ahead of the model."""

import copy
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.reduction import ForkingPickler
from threading import Thread
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers.image_utils import ImageInput

from ..modeling import DeltaVLMForConditionalGeneration
from ..modeling.vision_backbone import resize
from ..processing import DeltaVLMImageProcessor, DeltaVLMProcessor
from .asking import PAIRS_AT_ONCE, ask_turns, check_many, each_usable, pair_pixels, without_number


class Pairs(Protocol):
    """Image pairs by their number, such as a list of them, or files that are opened when they are asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sequence[ImageInput] | ImageInput: ...


@dataclass(frozen=True)
class Answered:
    """
    What came of one pair.

    Attributes:
        index (`int`): its number among the pairs.
        answers (`list[str]`, *optional*): in the order of the questions, those of a dialogue one after another.
        mask (`np.ndarray` of shape `(K, H, W)`, *optional*): for each of the model's `mask_classes` the probability
            that it changed, float32, at the model's image size; where masks were asked for.
        error (`Exception`, *optional*): why there are no answers.
    """

    index: int
    answers: list[str] | None = None
    mask: np.ndarray | None = None
    error: Exception | None = None


def stream_answers(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    pairs: Pairs,
    questions: Sequence[str | Sequence[str]],
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 32,
    num_workers: int = 1,
    masks: bool = False,
    **generate_kwargs,
) -> Iterator[Answered]:
    """
    Asks the same questions of many pairs, each by itself, as [`ask_pairs`] does, while other processes read the pairs
    to come. A pair that cannot be read or answered costs its own answers alone.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        pairs (`Sequence`): `pairs[i]` is a pair in any form that [`DeltaVLMImageProcessor`] takes, or raises. It is
            called in the other processes, where nothing may touch CUDA; under the start method `spawn` it must be
            possible to pickle `pairs`.
        questions (`Sequence`): the questions; a sequence of them is a dialogue, asked turn by turn with the model's
            own answers before the next question.
        indices (`Sequence[int]`, *optional*): which pairs, in which order; by default all.
        batch_size (`int`, *optional*, defaults to 32): pairs, and then questions, answered at once.
        num_workers (`int`, *optional*, defaults to 1): processes that read; with 0 this one does.
        masks (`bool`, *optional*, defaults to `False`): with the model's change masks.
        generate_kwargs: for `generate`, beside the model's own defaults, see [`answer`].

    Yields:
        [`Answered`], in the order of `indices`.

    Raises:
        ValueError: at once, if an argument cannot be, or the model has no masks.
        OSError: if a process that reads dies.
    """
    dialogues = as_dialogues(model, processor, questions, batch_size, num_workers, masks, generate_kwargs)
    which = range(len(pairs)) if indices is None else indices
    read = read_ahead(PixelReader(pairs, processor.image_processor), which, num_workers, ahead=2 * batch_size)
    return answer_read(model, processor, zip(which, read, strict=True), dialogues, batch_size, masks, generate_kwargs)


def as_dialogues(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    questions: Sequence[str | Sequence[str]],
    batch_size: int,
    num_workers: int,
    masks: bool,
    options: dict[str, Any],
) -> list[list[str]]:
    """The questions of [`stream_answers`], each a dialogue of one turn or more. Refuses arguments that cannot be."""
    if isinstance(questions, str):
        raise ValueError(f"Give a list of questions, got the string {questions!r:.60}.")
    dialogues = [[each] if isinstance(each, str) else list(each) for each in questions]
    if not all(dialogues):
        raise ValueError("A dialogue needs a question, got an empty one.")
    check_many(model, processor, [turn for turns in dialogues for turn in turns], batch_size, options)
    if masks and not model.config.mask_classes:
        raise ValueError("This model makes no masks: `config.mask_classes` names no class.")
    if not isinstance(num_workers, int) or num_workers < 0:
        raise ValueError(f"`num_workers` must be an integer of at least 0, got {num_workers!r}.")
    return dialogues


def answer_read(
    model: DeltaVLMForConditionalGeneration,
    processor: DeltaVLMProcessor,
    read: Iterator[tuple[int, np.ndarray | Exception]],
    dialogues: Sequence[Sequence[str]],
    batch_size: int,
    masks: bool,
    options: dict[str, Any],
) -> Iterator[Answered]:
    """
    What comes of pairs that are read.

    Args:
        read (`Iterator`): the number of each pair with its pixels `(1, 2, 3, H, W)`, or why it could not be read.
        model, processor, dialogues, batch_size, masks, options: see [`stream_answers`].
    """
    while chunk := list(islice(read, batch_size)):
        encoded = each_usable(
            lambda pixels: _encode(model, torch.from_numpy(np.concatenate(pixels)), masks),
            [pixels for _, pixels in chunk],
        )
        features = [what if isinstance(what, Exception) else what[0] for what in encoded]
        answers = ask_turns(model, processor, features, dialogues, batch_size, options)
        for (index, _), said, what in zip(chunk, answers, encoded, strict=True):
            if isinstance(said, Exception):
                yield Answered(index, error=without_number(said))
            else:
                yield Answered(index, [text for texts in said for text in texts], what[1])


@torch.inference_mode()
def _encode(
    model: DeltaVLMForConditionalGeneration, pixel_values: torch.Tensor, masks: bool
) -> list[tuple[torch.Tensor, np.ndarray | None]]:
    """Of each pair its features `(2N, D)` and, if asked for, its mask, of one pass of the vision encoder."""
    found: list[tuple[torch.Tensor, np.ndarray | None]] = []
    for pixels in pixel_values.split(PAIRS_AT_ONCE):
        pixels = pixels.to(model.device, model.dtype)
        if not masks:
            found += [(features, None) for features in model.encode_pair(pixels)]
            continue
        nothing = torch.zeros(len(pixels), 1, dtype=torch.long, device=model.device)  # an instruction of no word
        outputs = model.get_image_features(pixels, qformer_input_ids=nothing, masks=True, return_dict=True)
        logits = outputs.mask_logits[:, : len(model.config.mask_classes or ())].float()
        probabilities = resize(logits, pixels.shape[-2:]).sigmoid().cpu().numpy()  # as `model.segment`
        found += zip(outputs.last_hidden_state, probabilities, strict=True)
    return found


@dataclass(frozen=True)
class PixelReader:
    """Reads a pair, by its number, as the model takes it: `(1, 2, 3, H, W)`."""

    pairs: Pairs
    image_processor: DeltaVLMImageProcessor

    def __call__(self, index: int) -> np.ndarray:
        return pair_pixels(self.image_processor, self.pairs[index])


def read_ahead(
    read: Callable[[int], Any], indices: Sequence[int], num_workers: int = 1, *, ahead: int = 64
) -> Iterator[Any]:
    """
    What `read` makes of each index, in order, made in other processes before it is asked for.

    Args:
        read (`Callable`): can be pickled where processes are spawned, and so can what it returns.
        indices (`Sequence[int]`).
        num_workers (`int`, *optional*, defaults to 1): processes; with 0 this one reads, when it is asked.
        ahead (`int`, *optional*, defaults to 64): how many are read ahead.

    Yields:
        What was read; or the `Exception` that was raised.

    Raises:
        OSError: if one of the processes dies.
    """
    num_workers = min(num_workers, len(indices))
    loader = DataLoader(
        _Reading(read),
        batch_size=None,
        sampler=indices,
        collate_fn=_as_it_is,  # arrays, not tensors: these would take /dev/shm, which is small in containers
        num_workers=num_workers,
        prefetch_factor=-(-ahead // num_workers) if num_workers else None,
        worker_init_fn=_end_with_parent,
        generator=torch.Generator(),  # not the global one, on which sampled answers depend
    )
    items = iter(loader)
    while True:
        try:
            yield next(items)
        except StopIteration:
            return
        except RuntimeError as error:  # no exception of `read`
            raise OSError(
                f"A process that reads images has died, perhaps for want of memory or in a decoder ({error}): go on "
                "with fewer of them, or with none to see which file it is."
            ) from error


class _Reading(Dataset):
    def __init__(self, read: Callable[[int], Any]):
        self.read = read

    def __getitem__(self, index: int) -> Any:
        return read_or_error(self.read, index)


def read_or_error(read: Callable[[int], Any], index: int) -> Any:
    """What `read` makes of an index, or the exception that it raises, in a form that reaches other processes."""
    try:
        return read(index)
    except Exception as error:
        return _portable(error)


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same, where it would not arrive in another process."""
    try:
        ForkingPickler.dumps(error)
        copy.deepcopy(error)  # it is made anew there as here
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent(worker: int) -> None:
    """A process that has more to hand over than a pipe holds would wait for a parent that was killed, for good."""
    Thread(target=_wait_and_exit, daemon=True).start()


def _wait_and_exit() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _as_it_is(item: Any) -> Any:
    return item
