"""The same questions about many pairs, to a file: what `deltavlm predict` does."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from tqdm import tqdm

from ..data.asked import questions_of
from ..data.classes import ROADS_AND_BUILDINGS, Classes, classes_of
from ..data.pairs import PairTable, find_pair_table
from ..journal import Journal
from .engines import choose_engine
from .identity import commit_of
from .loading import load_model
from .processes import keeping, process_state
from .results import check_columns, check_output, result_rows, write_rows
from .stream import Answered

logger = logging.getLogger(__name__)

_KEY = ("index",)
_ROWS_AT_ONCE = 256  # in which there may be images


@dataclass(frozen=True)
class PredictionRun:
    """
    What to ask of which pairs.

    Args:
        pairs (`str` or `Path`): a table or a folder, see [`find_pair_table`].
        questions (`Sequence[str]`): questions, or names of tasks, see [`questions_of`].
        output (`Path`): the file to write, `.jsonl`, `.csv` or `.parquet`.
        model (`str`, *optional*, defaults to `"small"`): folder or Hub id, `small` or `tiny`.
        device (`str`, *optional*, defaults to `"auto"`).
        max_new_tokens (`int`, *optional*): of an answer; by default the model's own.
        batch_size (`int`, *optional*, defaults to 32): pairs, and then questions, answered at once.
        workers (`int`, *optional*, defaults to 1): processes that read images; with 0 the model's own does.
        engine (`str`, *optional*, defaults to `"local"`): `ray` for the processes of a Ray cluster.
        ray_address, actors (*optional*): which cluster, and how many copies of the model in it, see [`Cluster`].
        llm_url (`str`, *optional*): where the language model is, see [`load_model`].
        limit (`int`, *optional*): only the first pairs.
        keep_going (`bool`, *optional*, defaults to `False`): the run is done with, whatever pairs failed: they are not
            kept to be asked again.
    """

    pairs: str | Path
    questions: Sequence[str]
    output: Path
    model: str = "small"
    device: str = "auto"
    max_new_tokens: int | None = None
    batch_size: int = 32
    workers: int = 1
    engine: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    actors: int | None = None
    llm_url: str | None = None
    limit: int | None = None
    keep_going: bool = False

    def dialogues(self, classes: Classes = ROADS_AND_BUILDINGS) -> list[tuple[str, ...]]:
        """Each question once, a dialogue with all its turns; about the classes that the model knows."""
        return list(dict.fromkeys(questions_of(question, classes) for question in self.questions))


@dataclass(frozen=True)
class Predicted:
    """
    What came of a run.

    Attributes:
        pairs (`int`): how many there were.
        failed (`int`): those without answers; why is in the column `error`.
    """

    pairs: int
    failed: int


def predict_pairs(run: PredictionRun) -> Predicted | None:
    """
    Asks a model the questions about every pair and writes the answers, see [`result_rows`]. Images are read in other
    processes, see [`stream_answers`]; under `torchrun` the processes share the pairs. What is answered is kept in
    `OUTPUT.journal`, so that a run that was killed goes on. That folder goes with the last pair, or stays while
    pairs have failed, which the next run asks again.

    Args:
        run ([`PredictionRun`]).

    Returns:
        [`Predicted`], in the main process; None in the others.

    Raises:
        ValueError: for pairs, questions or a model that cannot be used, or a journal of another run.
        BlockingIOError: if another run writes the same file.
        ConnectionError: if the language model at `llm_url` does not answer, or no longer: the run goes on from there.
    """
    check_output(run.output)
    pairs = find_pair_table(run.pairs).first(run.limit)
    if run.output.exists() and any(map(run.output.samefile, (run.pairs, *Path(run.pairs).glob("metadata.*")))):
        raise ValueError(f"{run.output} is the table of pairs itself: choose another --output.")
    if not run.dialogues():
        raise ValueError("There are no questions.")
    with keeping(run.output) as folder:
        return _predict(run, pairs, folder)


def _predict(run: PredictionRun, pairs: PairTable, folder: Path) -> Predicted | None:
    state = process_state()
    engine, device = choose_engine(run.engine, run.model, run.device, run.ray_address, run.actors, run.llm_url)
    model, processor = load_model(run.model, device, llm_url=run.llm_url)
    classes = classes_of(model.config)
    dialogues = run.dialogues(classes)
    check_columns(pairs.named(), classes)
    generate_kwargs: dict[str, Any] = {} if run.max_new_tokens is None else {"max_new_tokens": run.max_new_tokens}
    commit = commit_of(model)
    settings = {
        "model": run.model,
        "commit": commit,
        "questions": [list(turns) for turns in dialogues],
        "generate": generate_kwargs,
        "pairs": f"{len(pairs)}, {_digest(pairs)}",
    }
    journal = Journal(folder / "answers.jsonl", settings, _KEY)
    state.wait_for_everyone()  # before the first of them writes an answer
    waiting = _waiting(journal, len(pairs))
    if len(waiting) < len(pairs) and state.is_main_process:
        logger.warning("%d of %d pairs were answered by an earlier run.", len(pairs) - len(waiting), len(pairs))
    chunks = [waiting[start : start + run.batch_size] for start in range(0, len(waiting), run.batch_size)]
    mine = [index for chunk in chunks[state.process_index :: state.num_processes] for index in chunk]
    answers = engine(
        model,
        processor,
        pairs,
        dialogues,
        indices=mine,
        batch_size=run.batch_size,
        num_workers=run.workers,
        **generate_kwargs,
    )
    with tqdm(total=len(mine), desc="answers", unit="pair", disable=not state.is_main_process) as bar:
        while some := [_entry(answered) for answered in islice(answers, run.batch_size)]:
            journal.append(*some)
            bar.update(len(some))
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    entries = Journal(journal.path, settings, _KEY).entries
    found = [entries[index,] for index in range(len(pairs))]
    write_rows(run.output, result_rows(pairs.named(), dialogues, found, run.model, commit, classes))
    failed = sum("error" in entry for entry in entries.values())
    if not failed or run.keep_going:
        journal.path.unlink()
    return Predicted(len(pairs), failed)


def _digest(pairs: PairTable) -> str:
    """Tells one table from another, by all that is in it."""
    found = hashlib.sha256()
    for start in range(0, len(pairs), _ROWS_AT_ONCE):
        rows = pairs.rows.slice(start, _ROWS_AT_ONCE).combine_chunks()
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, rows.schema) as writer:
            writer.write_table(rows)
        found.update(sink.getvalue())
    return found.hexdigest()[:16]


def _waiting(journal: Journal, number: int) -> list[int]:
    """The pairs without answers, those that have failed before behind the others."""
    failed = [index for (index,), entry in journal.entries.items() if "error" in entry]
    return [index for index in range(number) if (index,) not in journal.entries] + sorted(failed)


def _entry(answered: Answered) -> dict[str, Any]:
    if answered.error is None:
        return {"index": answered.index, "answers": answered.answers}
    return {"index": answered.index, "error": f"{type(answered.error).__name__}: {answered.error}"}
