"""One thread that has the model, and the rows that wait for it."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..inference.asking import embed_questions, encode_pixels, generate_ids
from ..inference.remote import RemoteLanguageModel, end_ids, request_options
from ..inference.turns import Turns
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from .errors import ApiError
from .metrics import Metrics
from .pairs import Pair
from .rows import Choose, Follow, Row


class Batcher:
    """
    Answers rows in batches, as they come. A batch takes the row that waits for longest and those most like it in
    length; rows that come meanwhile wait for the next one.

    A language model in another process batches by itself: there each row is a request of its own, and a row that ends
    makes room for the next.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's, used by this thread alone.
        metrics ([`Metrics`]): what is counted.
        batch_size (`int`): rows answered at once.
        wait (`float`): seconds that rows wait for others, before each batch.
        most_waiting (`int`): rows that may wait.
        turns ([`Turns`]): with whom else the model is shared.
    """

    def __init__(
        self,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        metrics: Metrics,
        batch_size: int,
        wait: float,
        most_waiting: int,
        turns: Turns,
    ):
        self.model = model
        self.processor = processor
        self.metrics = metrics
        self.batch_size = batch_size
        self.wait = wait
        self.most_waiting = most_waiting
        self.turns = turns
        config = model.generation_config
        self._ends = end_ids(config)
        self.is_remote = isinstance(model.language_model, RemoteLanguageModel)
        self.has_beams = (config.num_beams or 1) > 1 and not self.is_remote
        self._waiting: list[Row] = []
        self._under_way = 0
        self._said = request_options(config) if self.is_remote else {}
        self._requests = ThreadPoolExecutor(batch_size)
        self._tokenizing = threading.Lock()  # tokenizers are not for several threads at once
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Answers what waits, and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._requests.shutdown()

    def __len__(self) -> int:
        """How many rows wait."""
        return len(self._waiting)

    def add(self, rows: Sequence[Row]) -> None:
        """
        Has rows answered, or none of them.

        Raises:
            ApiError: if there is no room.
        """
        with self._changed:
            if len(self._waiting) + len(rows) > self.most_waiting:
                raise ApiError(
                    "Busy: many questions wait already. Ask again in a moment.",
                    429,
                    code="queue_full",
                    retry_after=1,
                )
            self._waiting += rows
            self._changed.notify_all()

    def drop(self, rows: Sequence[Row]) -> None:
        """Nobody waits for these any more: they leave the queue, or their batch after its next token."""
        with self._changed:
            for row in rows:
                row.gone = True
            self._waiting = [row for row in self._waiting if not row.gone]

    def _run(self) -> None:
        while rows := self._next():
            self.metrics.batch.observe(len(rows))
            with self.turns:
                self._answer(rows)

    def _next(self) -> list[Row]:
        """The rows of the next batch; none when all is done."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._room() if self._waiting else self._closed)
                self._changed.wait_for(lambda: len(self._waiting) >= self.batch_size or self._closed, self.wait)
                if self._waiting:  # those that were there may have left meanwhile
                    break
                if self._closed:
                    return []
            first = self._waiting[0]
            alike = [row for row in self._waiting if self._way(row) == self._way(first)]
            alike.sort(key=lambda row: (row is not first, abs(row.prompt_tokens - first.prompt_tokens)))
            chosen = alike[: self._room()]
            self._waiting = [row for row in self._waiting if row not in chosen]
            return chosen

    def _room(self) -> int:
        return self.batch_size - self._under_way

    def _way(self, row: Row) -> int | None:
        """What rows of a batch have in common: none but beams, which end together, at one length."""
        return row.max_tokens if self.has_beams and not row.temperature else None

    def _answer(self, rows: Sequence[Row]) -> None:
        """Each row is told its end or its error; an error of one is not that of its neighbours."""
        try:
            self._generate(rows)
        except Exception as error:
            left = [row for row in rows if row.finish_reason is None and not row.gone]
            if len(rows) == 1:
                for row in left:
                    row.tell(error)
            else:
                for row in left:
                    self._answer([row])

    def _generate(self, rows: Sequence[Row]) -> None:
        pairs = {row.pair.id: row.pair for row in rows}
        self._encode([pair for pair in pairs.values() if pair.features is None])
        for row in rows:
            row.begin()
        asked = (self.model, self.processor, [row.question for row in rows], [row.history for row in rows])
        features = torch.stack([row.pair.features for row in rows if row.pair.features is not None])  # all are
        if self.is_remote:
            with self._tokenizing:
                prompts = embed_questions(*asked, pair_features=features)
            self._send(rows, prompts)
            return
        by_beams = self._way(rows[0]) is not None
        options: dict = {"max_new_tokens": max(row.max_tokens for row in rows), "do_sample": False}
        if not by_beams:
            options |= {
                "num_beams": 1,
                "logits_processor": LogitsProcessorList([Choose(rows)]),
                "stopping_criteria": StoppingCriteriaList([Follow(rows, self._ends, self.processor)]),
            }
        answers = generate_ids(*asked, pair_features=features, **options)
        if by_beams:
            for row, ids in zip(rows, answers, strict=True):
                for token in ids:
                    if row.finish_reason is None and not row.gone:
                        row.take(token, self._ends, self.processor)
                if row.finish_reason is None and not row.gone:
                    row.finish(True, self.processor)

    def _send(self, rows: Sequence[Row], prompts: Sequence[torch.Tensor]) -> None:
        """Has rows answered in the other process; by threads, which do little but wait for it."""
        with self._changed:
            self._under_way += len(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            self._requests.submit(self._follow, row, prompt)

    def _follow(self, row: Row, prompt: torch.Tensor) -> None:
        """Gives a row its tokens as they come, to its end or until nobody waits for it any more."""
        options = self._said | {
            "max_tokens": row.max_tokens,
            "temperature": row.temperature,
            "top_k": row.top_k or 0,
            "top_p": row.top_p,
            "seed": row.seed,
        }
        try:
            for _, ids, finish_reason in self.model.language_model.complete([prompt], options):
                with self._tokenizing:
                    if any(row.take(token, self._ends, self.processor) for token in ids):
                        break
                    if finish_reason is not None:
                        row.finish(finish_reason == "stop", self.processor)
        except Exception as error:
            row.tell(error)
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify_all()

    def _encode(self, pairs: Sequence[Pair]) -> None:
        pixels = [pair.pixels for pair in pairs if pair.pixels is not None]
        if not pixels:
            return
        features = encode_pixels(self.model, torch.from_numpy(np.concatenate(pixels)))
        for pair, each in zip(pairs, features, strict=True):
            # Not a view of all, which would stay as long as one of them does.
            pair.features, pair.pixels = each.clone(), None
        self.metrics.encoded.inc(len(pairs))
