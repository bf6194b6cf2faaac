"""A run that has a chat model write about many pairs: what is finished is kept at once, and never asked again."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from ...journal import Journal
from ..build import FILE_SUFFIX, SPLITS, Pair, facts_of, pair_changed, refuse_other_classes
from ..classes import ROADS_AND_BUILDINGS, Classes, write_classes
from ..questions import Turns
from ..records import Record, write_records
from ..rules import LEVIR, Facts, Thresholds
from .endpoint import Endpoint, NoAnswerError, connect
from .prompts import WRITTEN_TASKS, Settings, describe, make_messages, read_answer

_MAX_FAILURES = 5  # one after another, then the endpoint is taken to be gone


@dataclass
class Summary:
    """
    What came of a run.

    Attributes:
        written (`int`): conversations or sets of questions that this run added.
        resumed (`int`): those that earlier runs had finished or set aside.
        set_aside (`list[dict]`): those whose answers stayed bad in this run: `pair`, `task`, `reason`.
        failed (`list[dict]`): those that the endpoint did not answer, to be asked again by the next run.
        left (`int`): those not asked, or not asked again after a bad answer, because the run stopped.
        requests (`int`): answers that were paid for, bad ones too.
        tokens (`int`): of questions and answers in this run, as the endpoint counts them; where it does not, a quarter
            of the characters.
        stopped_by (`str`, *optional*): `"budget"`, `"failures"` or `"interrupt"`; None for a whole run.
        records (`dict[str, int]`): records by task in the files, earlier runs' included.
        files (`list[str]`): annotations for [`load_changechat`].
    """

    written: int = 0
    resumed: int = 0
    set_aside: list[dict] = field(default_factory=list)
    failed: list[dict] = field(default_factory=list)
    left: int = 0
    requests: int = 0
    tokens: int = 0
    stopped_by: Literal["budget", "failures", "interrupt"] | None = None
    records: dict[str, int] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


@dataclass
class _Outcome:
    """What asking about one pair gave: turns, or the reason why not."""

    turns: Turns | None = None
    reason: str = ""
    raw: str = ""  # the last bad answer
    answered: bool = True  # else the endpoint failed
    cut_short: bool = False  # the run stopped while attempts were left
    requests: int = 0
    tokens: int = 0


@dataclass
class _Budget:
    """What all requests of a run have cost so far, and whether more may be made."""

    limit: int | None
    spent: int = 0
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tokens: int) -> None:
        with self.lock:
            self.spent += tokens

    @property
    def exhausted(self) -> bool:
        return self.limit is not None and self.spent >= self.limit


def write_dataset(
    pairs: Sequence[Pair],
    output: str | Path,
    settings: Settings,
    *,
    base_url: str | None = None,
    split: str = "train",
    name: str = "written",
    tasks: Sequence[str] = WRITTEN_TASKS,
    thresholds: Thresholds = LEVIR,
    binary_masks: bool = False,
    classes: Classes = ROADS_AND_BUILDINGS,
    max_tokens: int | None = None,
    retry_set_aside: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """
    Has a chat model write open questions and free dialogues about pairs, as the authors did: from text alone, that is
    captions, counts, cells and the place of each object.

    Every finished pair is appended to `NAME_SPLIT_written.jsonl` at once. A run that was stopped goes on where it was,
    and what is finished is never asked again, unless what there is to say about a pair has changed. Ctrl-C waits for
    what is under way; a kill loses it, though the endpoint may charge for it: for each of at most `concurrency` pairs
    the requests made so far, at most `attempts` (and what the client sent again, see `retries`). Answers that stay bad
    are set aside with the reason in `NAME_SPLIT_set_aside.jsonl`. At the end annotations are written:
    `NAME_SPLIT_open.json`, `NAME_SPLIT_dialog.json`.

    The key comes from the environment (`OPENAI_API_KEY`). It and the credentials in `base_url` are struck out of all
    that is kept or said; a key unless it is too short to be one (below 8 characters).

    Args:
        pairs (`Sequence[Pair]`): see [`find_pairs`].
        output (`str` or `Path`): the folder to write to.
        settings ([`Settings`]): model and manner.
        base_url (`str`, *optional*): the endpoint, such as `http://localhost:8000/v1`. Defaults to `OPENAI_BASE_URL`
            or OpenAI's own. It may hold a user and password, sent as such in place of the key, and parameters.
        split (`str`, *optional*, defaults to `"train"`): `train`, `val` or `test`.
        name (`str`, *optional*, defaults to `"written"`): how file names begin.
        tasks (`Sequence[str]`, *optional*): `open`, `dialogue` or both.
        thresholds ([`Thresholds`], *optional*): what is too small to count.
        binary_masks (`bool`, *optional*, defaults to `False`): masks have one class, taken for buildings.
        classes ([`Classes`], *optional*): what masks mark, see [`build_dataset`].
        max_tokens (`int`, *optional*): the budget of this run. Once it is spent nothing more is asked; what is under
            way is waited for and kept, so that the last requests can go beyond it.
        retry_set_aside (`bool`, *optional*, defaults to `False`): ask again what earlier runs set aside.
        progress (*optional*): called with the number of finished pairs and tasks, and of all.

    Returns:
        [`Summary`].

    Raises:
        ValueError: for an unknown task or split, no key, masks that cannot be read, progress made with other settings,
            or a progress file that was damaged before its last line.
        ConnectionError: if the endpoint refuses the key or does not know the model.
        BlockingIOError: if another run writes to the same files.
    """
    if not tasks or set(tasks) - set(WRITTEN_TASKS):
        raise ValueError(f"Tasks that a chat model can write are {', '.join(WRITTEN_TASKS)}; got {', '.join(tasks)}.")
    if split not in SPLITS:
        raise ValueError(f"Unknown split {split!r}, expected one of {', '.join(SPLITS)}.")
    refuse_other_classes(output, classes)
    endpoint = connect(base_url, settings)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}_{split}"
    try:
        with FileLock(f"{stem}_written.lock", timeout=0):
            written, set_aside = (
                Journal(Path(f"{stem}_{kind}.jsonl"), settings.journal_header, key=("pair", "task"))
                for kind in ("written", "set_aside")
            )
            summary = Summary()
            finished = {**({} if retry_set_aside else set_aside.entries), **written.entries}
            jobs = [
                _Job(pair, task, notes)
                for pair, notes in zip(pairs, _describe_all(pairs, thresholds, binary_masks, classes), strict=True)
                for task in dict.fromkeys(tasks)
            ]
            waiting = [job for job in jobs if finished.get(job.key, {}).get("notes") != job.digest]
            summary.resumed = len(jobs) - len(waiting)
            write_classes(folder, classes)
            try:
                _run(waiting, endpoint, written, set_aside, summary, settings, max_tokens, progress)
            finally:
                for task in dict.fromkeys(tasks):
                    path = Path(f"{stem}{FILE_SUFFIX[task]}.json")
                    of_task = [job for job in jobs if job.task == task]
                    records = _records(
                        of_task, written, lambda pair: facts_of(pair, thresholds, binary_masks, classes)
                    )
                    summary.records[task] = write_records(path, records)
                    summary.files.append(str(path))
    except Timeout:
        raise BlockingIOError(f"Another run is writing to {stem}_*; wait for it or choose another folder.") from None
    return summary


@dataclass(frozen=True)
class _Job:
    """One thing to ask for; what is finished is so for these very notes."""

    pair: Pair
    task: str
    notes: str

    @property
    def key(self) -> tuple[str, str]:
        return self.pair.name, self.task

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.notes.encode()).hexdigest()[:16]


def _describe_all(pairs: Sequence[Pair], thresholds: Thresholds, binary_masks: bool, classes: Classes) -> list[str]:
    """The notes about all pairs, before anything is asked: what is wrong with masks is told now, and at once."""
    notes, problems = [], []
    for pair in pairs:
        try:
            notes.append(describe(pair, thresholds, binary_masks, classes))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""))
    return notes


def _run(
    jobs: list[_Job],
    endpoint: Endpoint,
    written: Journal,
    set_aside: Journal,
    summary: Summary,
    settings: Settings,
    max_tokens: int | None,
    progress: Callable[[int, int], None] | None,
) -> None:
    """
    Asks for all jobs, so many at once, and keeps every outcome as it comes. Only this thread writes. What stops the
    run is raised after everything under way has come in.
    """
    waiting = iter(jobs)
    running: dict[Future[_Outcome], _Job] = {}
    finished = failures = 0
    refusal: Exception | None = None
    budget = _Budget(max_tokens)
    with ThreadPoolExecutor(settings.concurrency) as pool:
        while True:
            if budget.exhausted:
                summary.stopped_by = summary.stopped_by or "budget"
            while summary.stopped_by is None and refusal is None and len(running) < settings.concurrency:
                job = next(waiting, None)
                if job is None:
                    break
                running[pool.submit(_ask, endpoint, settings, job, budget)] = job
            if not running:
                break
            budget.closed = summary.stopped_by is not None or refusal is not None
            try:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                if summary.stopped_by == "interrupt":
                    raise
                summary.stopped_by = "interrupt"  # what is under way is paid for: keep it
                continue
            for future in done:
                job = running.pop(future)
                try:
                    outcome = future.result()
                except Exception as error:
                    refusal = error
                    continue
                _keep(outcome, job, written, set_aside, summary)
                if outcome.cut_short:
                    continue
                failures = 0 if outcome.answered else failures + 1
                if failures >= _MAX_FAILURES:
                    summary.stopped_by = "failures"
                finished += 1
                if progress is not None:
                    progress(finished, len(jobs))
    if refusal is not None:
        raise refusal
    summary.left += sum(1 for _ in waiting)
    if summary.stopped_by == "budget" and not summary.left:
        summary.stopped_by = None  # the last answer spent it


def _keep(outcome: _Outcome, job: _Job, written: Journal, set_aside: Journal, summary: Summary) -> None:
    """An outcome goes to its journal and into the summary."""
    summary.requests += outcome.requests
    summary.tokens += outcome.tokens
    entry: dict[str, Any] = {"pair": job.pair.name, "task": job.task}
    kept = {"notes": job.digest, "tokens": outcome.tokens}
    if outcome.cut_short:
        summary.left += 1
    elif outcome.turns is not None:
        written.append({**entry, **kept, "turns": outcome.turns})
        summary.written += 1
    elif outcome.answered:
        bad = {**entry, "reason": outcome.reason}
        set_aside.append({**bad, **kept, "answer": outcome.raw})
        summary.set_aside.append(bad)
    else:
        summary.failed.append({**entry, "reason": outcome.reason})


def _ask(endpoint: Endpoint, settings: Settings, job: _Job, budget: _Budget) -> _Outcome:
    """Asks until an answer is usable, `settings.attempts` times at most."""
    messages = make_messages(job.notes, job.task, settings)
    outcome = _Outcome()
    for attempt in range(settings.attempts):
        if attempt and (budget.closed or budget.exhausted):
            outcome.cut_short = True
            return outcome
        try:
            raw, tokens = endpoint.complete(messages, settings)
        except NoAnswerError as error:
            outcome.answered = False
            outcome.reason = str(error)
            return outcome
        budget.add(tokens)
        outcome.requests += 1
        outcome.tokens += tokens
        try:
            turns = read_answer(raw, job.task, settings)
        except ValueError as error:
            outcome.reason, outcome.raw = endpoint.redact(str(error)), raw
        else:
            # Once more: JSON may have escapes in which the key was not seen.
            outcome.turns = tuple((endpoint.redact(question), endpoint.redact(answer)) for question, answer in turns)
            return outcome
    return outcome


def _records(jobs: list[_Job], written: Journal, facts: Callable[[Pair], Facts | None]) -> Iterator[Record]:
    for job in jobs:
        pair, task = job.pair, job.task
        entry = written.entries.get(job.key)
        if entry is not None and entry["notes"] == job.digest:
            turns = tuple(map(tuple, entry["turns"]))
            changed = pair_changed(pair, None if pair.captions else facts(pair))
            parts = [(turn,) for turn in turns] if task == "open" else [turns]
            for number, part in enumerate(parts):
                identity = f"{pair.name}-{task}" + (f"-{number}" if task == "open" else "")
                yield Record(identity, task, pair.before, pair.after, part, changed)
