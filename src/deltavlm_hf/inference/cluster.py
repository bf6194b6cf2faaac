"""Questions about many pairs, answered by the processes of a Ray cluster. Needs the extra `[ray]`."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from ..extras import missing
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .loading import load_model
from .stream import Answered, Pairs, PixelReader, answer_read, as_dialogues, read_or_error

try:
    import ray
    import ray.data
except ImportError as error:
    raise missing("--engine ray needs more packages", "ray") from error

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """
    A Ray cluster with copies of a model in it.

    Args:
        model (`str`): folder or Hub id, `small` or `tiny`: every machine of the cluster loads it by this name.
        device (`str`, *optional*, defaults to `"auto"`): of each copy; by default a GPU of its own where the cluster
            has any.
        address (`str`, *optional*): of a running cluster, `auto` for the one that this machine belongs to. By default
            the environment variable `RAY_ADDRESS`, and without that a Ray of this machine alone, while it is needed.
        actors (`int`, *optional*): copies of the model; by default as many as there are GPUs, or half as many as there
            are CPUs.
    """

    model: str
    device: str = "auto"
    address: str | None = None
    actors: int | None = None

    def stream_answers(
        self,
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
        Answers as [`~deltavlm_hf.inference.stream_answers`] does. Tasks read the pairs, actors hold the model; what
        an actor that dies was at, another does again.

        Args:
            model ([`DeltaVLMForConditionalGeneration`]): the same model, on any device, `meta` too: arguments are
                checked against it, it answers nothing.
            pairs (`Sequence`): travels to the tasks; the files that it names must be there.
            num_workers (`int`, *optional*, defaults to 1): tasks that read at a time, at least one.
            processor, questions, indices, batch_size, masks, generate_kwargs: see
                [`~deltavlm_hf.inference.stream_answers`].

        Yields:
            [`Answered`], in the order in which they come.

        Raises:
            ValueError: at once, if an argument cannot be.
            OSError: if the cluster cannot be reached, or the work fails in it.
        """
        dialogues = as_dialogues(model, processor, questions, batch_size, num_workers, masks, generate_kwargs)
        which = list(range(len(pairs)) if indices is None else indices)
        chunks = [which[start : start + batch_size] for start in range(0, len(which), batch_size)]
        reader = PixelReader(pairs, processor.image_processor)
        asked = {"dialogues": dialogues, "batch_size": batch_size, "masks": masks, "options": generate_kwargs}
        return self._stream(chunks, reader, asked, max(1, num_workers))

    def _stream(
        self, chunks: list[list[int]], reader: PixelReader, asked: dict[str, Any], workers: int
    ) -> Iterator[Answered]:
        if not chunks:
            return
        try:
            with self._connected(workers) as (actors, gpus):
                # A block for each chunk: what is done again, when an actor dies, is one of them.
                chunked = ray.data.from_items([{"chunk": chunk} for chunk in chunks], override_num_blocks=len(chunks))
                read = chunked.map_batches(
                    partial(_read, reader=reader),
                    batch_size=1,
                    compute=ray.data.TaskPoolStrategy(size=workers),
                    num_cpus=1,
                )
                answered = read.map_batches(
                    _Answerer,
                    batch_size=1,
                    fn_constructor_args=(self.model, self.device, asked),
                    compute=ray.data.ActorPoolStrategy(size=actors),
                    num_cpus=1,
                    num_gpus=gpus,
                )
                for row in answered.iter_rows():
                    yield row["answered"]
        except ray.exceptions.RayError as error:
            raise OSError(f"The work in the Ray cluster has failed: {error}") from error

    @contextmanager
    def _connected(self, workers: int) -> Iterator[tuple[int, int]]:
        """While there is a cluster; yields how many actors it is to have, and how many GPUs each of them."""
        started = not ray.is_initialized()  # a program that has connected itself stays connected
        if started:
            self._connect(workers)
        try:
            logging.getLogger("ray.data").setLevel(logging.WARNING)
            ray.data.DataContext.get_current().enable_progress_bars = False
            there = ray.cluster_resources()
            cpus, gpus = int(there.get("CPU", 0)), int(there.get("GPU", 0))
            on_gpus = self.device != "cpu" and gpus > 0
            actors = self.actors or (gpus if on_gpus else max(1, cpus // 2))
            wanted = {"CPU": actors + 1} | ({"GPU": actors} if on_gpus else {})
            if lacking := [f"{number} {what}s" for what, number in wanted.items() if there.get(what, 0) < number]:
                logger.warning(
                    "%d actors and a task that reads want %s, the cluster has %d CPUs and %d GPUs: until it grows, "
                    "they wait. Fewer --actors do with less.",
                    actors,
                    " and ".join(lacking),
                    cpus,
                    gpus,
                )
            yield actors, int(on_gpus)
        finally:
            if started:
                ray.shutdown()

    def _connect(self, workers: int) -> None:
        address = self.address or os.environ.get("RAY_ADDRESS", "local")
        quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address != "local":
            ray.init(address=address, **quiet)
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Its CPUs are a number to share out, not cores: as many as the processes that there would be without Ray.
        cores = os.cpu_count() or 1
        actors = self.actors or torch.cuda.device_count() or max(1, cores // 2)
        ray.init(address=address, num_cpus=max(cores, actors + workers), include_dashboard=False, **quiet)


@dataclass(frozen=True)
class _Read:
    """Pairs that are read: their numbers, and the pixels `(1, 2, 3, H, W)` of each, or why it could not be read."""

    indices: list[int]
    pixels: list[np.ndarray | Exception]


def _read(batch: dict[str, np.ndarray], reader: PixelReader) -> dict[str, np.ndarray]:
    chunks = [[int(index) for index in chunk] for chunk in batch["chunk"]]
    return {"read": _column([_Read(chunk, [read_or_error(reader, index) for index in chunk]) for chunk in chunks])}


class _Answerer:
    """A copy of the model, in an actor."""

    def __init__(self, model: str, device: str, asked: dict[str, Any]):
        self.model, self.processor = load_model(model, device)
        self.asked = asked

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        found: list[Answered] = []
        for read in batch["read"]:
            pairs = zip(read.indices, read.pixels, strict=True)
            found += answer_read(self.model, self.processor, pairs, **self.asked)
        return {"answered": _column(found)}


def _column(items: Sequence[Any]) -> np.ndarray:
    """Objects that Ray Data takes as they are, and does not look into for tensors."""
    column = np.empty(len(items), dtype=object)
    column[:] = items
    return column
