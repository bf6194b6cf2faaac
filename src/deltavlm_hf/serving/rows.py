"""
An answer on its way, as a row of a batch. Each row ends and samples by itself, whatever its neighbours do: one greedy
`generate` serves all, in which [`Choose`] puts a row's own draw first, and [`Follow`] reads what was chosen.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import LogitsProcessor, StoppingCriteria, TopKLogitsWarper, TopPLogitsWarper

from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from .pairs import Pair

# What becomes of a row: another piece of its text, an error, or, with None, its end.
Event = str | Exception | None


@dataclass(eq=False)
class Row:
    """
    A question, how it is to be answered, and the answer so far.

    Attributes:
        tell (`Callable`): called with each [`Event`], in the model's thread.
        max_tokens (`int`): the length of the answer.
        stop (`tuple[str, ...]`): texts before which it ends.
        temperature (`float`): 0 takes the likeliest token.
        top_k (`int`, *optional*), top_p (`float`): of which tokens is drawn.
        seed (`int`): of the draw.
        stream (`bool`): whether pieces are told.
        text (`str`): the answer, whole once it has ended.
        finish_reason (`str`, *optional*): `stop`, or `length` if there was more to say.
        gone (`bool`): whether nobody waits for it any more.
    """

    pair: Pair
    question: str
    history: Sequence[Turn]
    prompt_tokens: int
    max_tokens: int
    tell: Callable[[Event], None] = field(repr=False)
    stop: tuple[str, ...] = ()
    temperature: float = 0
    top_k: int | None = None
    top_p: float = 1
    seed: int = 0
    stream: bool = False
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    gone: bool = False
    _sent: str = ""

    def begin(self) -> None:
        """From the start; also where a batch has failed and the row is asked again by itself."""
        self.ids = []
        self._draw = torch.Generator().manual_seed(self.seed)
        warpers: list[LogitsProcessor] = [TopKLogitsWarper(self.top_k)] if self.top_k else []
        self._warpers = [*warpers, TopPLogitsWarper(self.top_p)] if self.top_p < 1 else warpers

    def sample(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores `(V,)` whose highest is a draw from those given (Gumbel's way)."""
        warped = scores[None] / self.temperature
        for warper in self._warpers:
            warped = warper(None, warped)
        waits = torch.empty(scores.shape).exponential_(generator=self._draw)
        return warped[0] - waits.clamp_min(torch.finfo(waits.dtype).tiny).log().to(scores.device)

    def take(self, token: int, ends: Sequence[int], processor: DeltaVLMProcessor) -> bool:
        """Adds a token; whether the answer has come to its end."""
        if self.gone:
            return True
        self.ids.append(token)
        ended = token in ends
        if ended or len(self.ids) >= self.max_tokens:
            self.finish(ended, processor)
        elif self.stream or self.stop:
            self._read(processor)
        return self.finish_reason is not None

    def finish(self, ended: bool, processor: DeltaVLMProcessor) -> None:
        """No more tokens come: the model has `ended` the answer, or it is as long as it may be."""
        if not self._stopped(processor):
            self._end(self._raw(processor).rstrip(), "stop" if ended else "length")

    def _read(self, processor: DeltaVLMProcessor) -> None:
        """Ends the answer before a stop text, or tells what is new and certain."""
        if self._stopped(processor) or not self.stream:
            return
        text = self._raw(processor)
        begun = [size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size])]
        text = text[: len(text) - max(begun, default=0)]
        self._send(text.rstrip("\ufffd").rstrip())  # \ufffd: a letter whose other bytes are still to come

    def _stopped(self, processor: DeltaVLMProcessor) -> bool:
        if not self.stop:
            return False
        text = self._raw(processor)
        cut = min((at for stop in self.stop if (at := text.find(stop)) >= 0), default=None)
        if cut is not None:
            self._end(text[:cut].rstrip(), "stop")
        return cut is not None

    def _raw(self, processor: DeltaVLMProcessor) -> str:
        return processor.batch_decode([self.ids], skip_special_tokens=True)[0].lstrip()

    def _end(self, text: str, reason: Literal["stop", "length"]) -> None:
        self.text, self.finish_reason = text, reason
        if self.stream:
            self._send(text)
        self.tell(None)

    def _send(self, text: str) -> None:
        if len(text) > len(self._sent):
            self.tell(text[len(self._sent) :])
            self._sent = text


class Choose(LogitsProcessor):
    """For rows that sample, the draw."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        drawn = [(number, row) for number, row in enumerate(self.rows) if row.temperature and not row.finish_reason]
        if drawn:
            scores = scores.clone()
            for number, row in drawn:
                scores[number] = row.sample(scores[number])
        return scores


class Follow(StoppingCriteria):
    """Gives each row its token as it comes, and ends rows that have come to their end or that nobody waits for."""

    def __init__(self, rows: Sequence[Row], ends: Sequence[int], processor: DeltaVLMProcessor):
        self.rows = rows
        self.ends = ends
        self.processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        done = [
            row.finish_reason is not None or row.take(token, self.ends, self.processor)
            for row, token in zip(self.rows, input_ids[:, -1].tolist(), strict=True)
        ]
        return torch.tensor(done, device=input_ids.device)
