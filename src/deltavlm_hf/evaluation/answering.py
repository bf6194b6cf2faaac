"""Answers for a whole data set: each pair is encoded once, a killed run goes on, processes share the work."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import torch
from PIL import Image
from tqdm import tqdm

from ..data.rows import turns_of, undecoded
from ..inference import answer, encode
from ..inference.processes import lock_folder, process_state
from ..inference.stream import read_ahead
from ..journal import Journal
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from ..processing.reading import read_image

logger = logging.getLogger(__name__)

Pair = tuple[Image.Image, Image.Image]
_KEY = ("index",)


class Answerer(Protocol):
    """What answers: a model, or a baseline."""

    def encode(self, pairs: Sequence[Pair]) -> Any:
        """What is needed of pairs of images, before and after, whatever will be asked."""

    def answer(
        self,
        encoded: Any,
        which: Sequence[int],
        questions: Sequence[str],
        histories: Sequence[Sequence[Turn] | None],
    ) -> list[str]:
        """Answers a batch of questions, each about the encoded pair with the number in `which`."""


class ModelAnswerer:
    """
    A DeltaVLM and its processor.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        generate_kwargs: for `generate`, beside the model's own defaults.
    """

    def __init__(self, model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, **generate_kwargs):
        self.model = model
        self.processor = processor
        self.generate_kwargs = generate_kwargs

    def encode(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """Pair features `(P, 2N, D)`."""
        return encode(self.model, self.processor, pairs)

    def answer(self, encoded, which, questions, histories) -> list[str]:
        return answer(
            self.model,
            self.processor,
            questions,
            histories,
            pair_features=encoded[list(which)],
            **self.generate_kwargs,
        )


def predict(
    answerer: Answerer,
    rows: datasets.Dataset,
    folder: str | Path,
    settings: dict[str, Any],
    *,
    batch_size: int = 8,
    num_workers: int = 0,
    own_history: bool = True,
    verbatim_questions: bool = False,
) -> list[dict[str, Any]]:
    """
    Answers every turn of every row.

    Questions are asked in the form of training, `q: <question>`; a dialogue turn by turn. Under `torchrun` each
    process takes its share of the pairs. What is answered is appended to `predictions.*.jsonl` after each batch of
    pairs, so that a run that was killed goes on; rows that failed are asked again.

    Args:
        answerer ([`Answerer`]): the model or baseline.
        rows (`Dataset`): see [`load_changechat`], not unrolled.
        folder (`str` or `Path`): where predictions go.
        settings (`dict`): what names the run; a folder with predictions of another is refused.
        batch_size (`int`, *optional*, defaults to 8): pairs encoded at once, and questions asked at once.
        num_workers (`int`, *optional*, defaults to 0): processes that read images, ahead of what answers.
        own_history (`bool`, *optional*, defaults to `True`): put the model's own earlier answers before the next
            question of a dialogue, not the right ones.
        verbatim_questions (`bool`, *optional*, defaults to `False`): ask a question that stands alone without the
            `q: `, as the authors' published evaluation does. Dialogues keep their form.

    Returns:
        `list[dict]`: for each row `index`, `id`, `task` and either `answers`, one for each turn, or `error`, the
        reason why there are none. All processes get all of them.

    Raises:
        ValueError: if the folder has predictions of something else.
        BlockingIOError: if another run is answering into the folder.
    """
    form = {"own_history": own_history, "verbatim_questions": verbatim_questions}
    with lock_folder(Path(folder)):
        return _predict(answerer, rows, Path(folder), settings, batch_size, num_workers, **form)


def _predict(
    answerer: Answerer,
    rows: datasets.Dataset,
    folder: Path,
    settings: dict[str, Any],
    batch_size: int,
    num_workers: int,
    **form: bool,
) -> list[dict[str, Any]]:
    state = process_state()
    settings = {**settings, "rows": digest_rows(rows), **form}
    before = _read(folder, settings)
    if before and state.is_main_process:
        logger.warning("%d answers are taken from an earlier run: %s", len(before), folder)
    state.wait_for_everyone()
    journal = Journal(folder / f"predictions.{state.process_index}.jsonl", settings, _KEY)

    rows = undecoded(rows.with_format(None))
    chunks = list(_chunks(group_by_pair(rows), batch_size))
    mine = chunks[state.process_index :: state.num_processes]
    waiting = [[[i for i in pair if "answers" not in before.get(i, {})] for pair in chunk] for chunk in mine]
    waiting = [[pair for pair in chunk if pair] for chunk in waiting]
    total = sum(len(pair) for chunk in waiting for pair in chunk)
    first = [pair[0] for chunk in waiting for pair in chunk]
    images = read_ahead(_ImageReader(rows), first, num_workers, ahead=2 * batch_size)
    with tqdm(total=total, desc="answers", unit="record", disable=not state.is_main_process) as bar:
        for chunk in waiting:
            read = list(zip(chunk, islice(images, len(chunk)), strict=True))
            try:
                entries = list(_answer_chunk(answerer, rows, read, batch_size, **form))
            except Exception:  # find out which of the pairs it was
                entries = [entry for each in read for entry in _answer_pair(answerer, rows, each, batch_size, **form)]
            for entry in entries:
                journal.append(entry)
                bar.update()
    state.wait_for_everyone()
    found = _read(folder, settings)
    return [found[index] for index in range(len(rows))]


def _read(folder: Path, settings: dict[str, Any]) -> dict[int, dict]:
    """What all processes of all runs have written; an answer goes before an error."""
    entries: dict[int, dict] = {}
    for path in sorted(folder.glob("predictions.*.jsonl")):
        for (index,), entry in Journal(path, settings, _KEY).entries.items():
            if "answers" in entry or index not in entries:
                entries[index] = entry
    return entries


def digest_rows(rows: datasets.Dataset) -> str:
    """Tells one list of questions from another."""
    texts = rows.with_format(None).select_columns(["id", "turns"])
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()[:16]


def group_by_pair(rows: datasets.Dataset) -> list[list[int]]:
    """The rows of each pair, which need not stand together."""
    pairs: dict[Any, list[int]] = {}
    for index, row in enumerate(rows.select_columns(["before", "after"])):
        pairs.setdefault(pair_key(row), []).append(index)
    return list(pairs.values())


def pair_key(row: dict) -> tuple:
    """What tells the pair of a row from others, its images undecoded: their bytes or, without, their paths."""
    return tuple(hash(image["bytes"]) if image["bytes"] else image["path"] for image in (row["before"], row["after"]))


def _chunks(pairs: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


@dataclass(frozen=True)
class _ImageReader:
    """Reads a row's pair; rows are [`undecoded`]."""

    rows: datasets.Dataset

    def __call__(self, index: int) -> Pair:
        row = self.rows[index]
        before, after = (read_image(row[date]).copy() for date in ("before", "after"))  # copies have no open file
        return before, after


def _answer_pair(
    answerer: Answerer, rows: datasets.Dataset, read: tuple[list[int], Pair | Exception], batch_size: int, **form: bool
) -> list[dict[str, Any]]:
    """Answers all rows about one pair, or says for each why not."""
    try:
        return list(_answer_chunk(answerer, rows, [read], batch_size, **form))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        found = [{"index": index, **{key: rows[index][key] for key in ("id", "task")}} for index in read[0]]
        return [{**entry, "error": reason} for entry in found]


def _answer_chunk(
    answerer: Answerer,
    rows: datasets.Dataset,
    read: list[tuple[list[int], Pair | Exception]],
    batch_size: int,
    **form: bool,
) -> Iterator[dict[str, Any]]:
    """Answers all rows about some pairs, as read; what fails is told apart and does not stop the others."""
    images: list[Pair] = []
    which: dict[int, int] = {}  # row -> number of its pair among the images
    errors: dict[int, str] = {}
    for pair, what in read:
        if isinstance(what, Exception):
            errors.update(dict.fromkeys(pair, f"{type(what).__name__}: {what}"))
        else:
            which.update(dict.fromkeys(pair, len(images)))
            images.append(what)
    records = {index: rows[index] for pair, _ in read for index in pair}
    turns = {index: turns_of(row) for index, row in records.items()}
    answers: dict[int, list[str]] = {index: [] for index in which}
    encoded = answerer.encode(images) if images else None
    for turn in range(max((len(turns[index]) for index in which), default=0)):
        asked = [index for index in which if index not in errors and len(turns[index]) > turn]
        asked.sort(key=lambda index: _prompt_length(turns[index], turn))  # of like length: less padding
        for start in range(0, len(asked), batch_size):
            batch = asked[start : start + batch_size]
            questions = [turns[index][turn][0] for index in batch]
            histories = [_history(turns[index], answers[index], turn, **form) for index in batch]
            try:
                texts = answerer.answer(encoded, [which[index] for index in batch], questions, histories)
                for index, text in zip(batch, texts, strict=True):
                    answers[index].append(text)
            except Exception:  # find out which of them it was
                for index, question, history in zip(batch, questions, histories, strict=True):
                    try:
                        answers[index] += answerer.answer(encoded, [which[index]], [question], [history])
                    except Exception as error:
                        errors[index] = f"{type(error).__name__}: {error}"
    for index, row in records.items():
        entry = {"index": index, "id": row["id"], "task": row["task"]}
        yield {**entry, "error": errors[index]} if index in errors else {**entry, "answers": answers[index]}


def _history(
    turns: list[Turn], answers: list[str], turn: int, own_history: bool, verbatim_questions: bool
) -> list[Turn] | None:
    if verbatim_questions and len(turns) == 1:
        return None
    if not own_history:
        return turns[:turn]
    return [(question, answer) for (question, _), answer in zip(turns[:turn], answers, strict=True)]


def _prompt_length(turns: list[Turn], turn: int) -> int:
    """Characters up to a turn's question; of the turns before it, right answers stand for the model's own."""
    return sum(len(question) + len(answer) for question, answer in turns[:turn]) + len(turns[turn][0])
