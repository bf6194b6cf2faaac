"""Open questions and dialogues about pairs, written by a chat model behind any OpenAI-compatible endpoint."""

import base64
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

from filelock import FileLock, Timeout

from ..journal import Journal
from .build import FILE_SUFFIX, SPLITS, Pair, facts_of, pair_changed
from .questions import Turns, format_count, format_grid
from .records import Record, write_records
from .rules import CELLS, LEVIR, Facts, Thresholds, find_objects, load_mask, read_facts

try:
    import openai
    from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
except ImportError as error:
    raise ImportError('Writing with a chat model needs more packages: pip install "deltavlm-hf[llm]"') from error

WRITTEN_TASKS = ("open", "dialogue")

_FORMAT = 1  # of the progress file
_MAX_FAILURES = 5  # one after another, then the endpoint is taken to be gone
_SHORTEST_KEY = 8  # what is shorter is a stand-in for servers without keys, and may be a word of an answer
_SECRET_PARAMETERS = re.compile(r"key|token|secret|pass|pwd|auth|sig|cred|code", re.IGNORECASE)

_SYSTEM = """You write questions about what changed between two satellite images of one place, and their answers, to \
teach a model that sees the images. You do not see them; you get notes about them. Rules:
- Ask and answer as if you saw both images. Never mention notes, captions, counts given to you, boxes or pixels.
- Say only what the notes say or what surely follows from them.
- Keep each answer to one or two sentences.
- Answer with one JSON object and nothing else: {"turns": [{"question": "...", "answer": "..."}, ...]}"""
_REQUESTS = {
    "open": "Write {questions} questions that stand alone, each different in kind: what, where, how many, why it may "
    "matter, what stayed.",
    "dialogue": "Write a conversation of 2 to {turns} questions, each going on from the answers before it.",
}

# One worked example goes before each request, as the authors' in-context examples did.
_EXAMPLE_NOTES = """Captions by people who saw both images:
- a road with three houses on it replaces the trees
- three villas are built along a new road
Counted: 1 new road, 3 new buildings
Cells of a 3x3 grid with change: roads: [center-left, center-center] buildings: [top-left, center-left]"""
_EXAMPLE = {
    "open": (
        ("What replaced the trees?", "A road with three houses along it."),
        ("Where were the houses built?", "In the top left and on the left of the center."),
        ("How many new houses are there?", "Three."),
        ("What may the new road be for?", "It gives access to the houses that were built beside it."),
        ("Did the right side of the scene change?", "No, nothing was built there."),
        ("Is the new road longer than one cell?", "Yes, it runs from the left into the center."),
    ),
    "dialogue": (
        ("Has the area been developed?", "Yes, trees gave way to a road and houses."),
        ("How many houses are there?", "Three houses were built."),
        ("Do they lie along the road?", "Yes, they stand along the new road."),
    ),
}


class Turn(BaseModel):
    """A question with its answer, as the model must write it."""

    model_config = ConfigDict(extra="forbid")

    question: Annotated[str, StringConstraints(strip_whitespace=True, min_length=3, max_length=300)]
    answer: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=600)]


class Conversation(BaseModel):
    """The JSON object that the model must answer with."""

    model_config = ConfigDict(extra="forbid")

    turns: list[Turn]


@dataclass(frozen=True)
class Settings:
    """
    How to ask. `model`, `questions` and `turns` shape the data: a run goes on only with the same.

    Args:
        model (`str`): the model's name at the endpoint.
        questions (`int`, *optional*, defaults to 4): open questions for each pair. (ChangeChat-105k has 26,600 for
            6,815.)
        turns (`int`, *optional*, defaults to 5): of a dialogue, at most; at least 2.
        attempts (`int`, *optional*, defaults to 3): how often to ask before a bad answer is set aside.
        retries (`int`, *optional*, defaults to 5): after 429, 5xx, a time-out or a lost connection, with exponential
            back-off or as long as the server says.
        timeout (`float`, *optional*, defaults to 120): seconds for one request.
        concurrency (`int`, *optional*, defaults to 4): requests under way at once.
        max_answer_tokens (`int`, *optional*, defaults to 1000): for one answer.
        temperature (`float`, *optional*, defaults to 0.7).
        json_schema (`bool`, *optional*, defaults to `True`): send the schema as `response_format`. Turn it off for
            endpoints that refuse it; answers are checked all the same.

    Raises:
        ValueError: if a number is out of range.
    """

    model: str
    questions: int = 4
    turns: int = 5
    attempts: int = 3
    retries: int = 5
    timeout: float = 120.0
    concurrency: int = 4
    max_answer_tokens: int = 1000
    temperature: float = 0.7
    json_schema: bool = True

    def __post_init__(self):
        least = {"questions": 1, "turns": 2, "attempts": 1, "retries": 0, "concurrency": 1, "max_answer_tokens": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"`{name}` must be at least {value}, got {getattr(self, name)}.")
        if not self.timeout > 0:
            raise ValueError(f"`timeout` must be above 0 seconds, got {self.timeout}.")

    @property
    def made_with(self) -> dict[str, Any]:
        return {"format": _FORMAT, "model": self.model, "questions": self.questions, "turns": self.turns}


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
class _Meter:
    """What all requests of a run have cost so far, and whether more may be made."""

    limit: int | None
    spent: int = 0
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, tokens: int) -> None:
        with self.lock:
            self.spent += tokens

    @property
    def used_up(self) -> bool:
        return self.limit is not None and self.spent >= self.limit


@dataclass(frozen=True)
class _Endpoint:
    """The client, and what must not be kept or said."""

    client: openai.OpenAI
    url: str
    secrets: tuple[str, ...]

    def strike(self, text: str) -> str:
        """What the endpoint sent, without secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def strike_message(self, text: str) -> str:
        """A message of the endpoint without secrets, and without any other that it shows as a header."""
        text = self.strike(text.encode(errors="replace").decode())
        return re.sub(r"(?i)(bearer|basic)\s+[\w.~+/=-]+", r"\1 ***", text)


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
    endpoint = _connect(base_url, settings)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{name}_{split}"
    try:
        with FileLock(f"{stem}_written.lock", timeout=0):
            written, set_aside = (
                Journal(Path(f"{stem}_{kind}.jsonl"), settings.made_with, key=("pair", "task"))
                for kind in ("written", "set_aside")
            )
            summary = Summary()
            finished = {**({} if retry_set_aside else set_aside.entries), **written.entries}
            jobs = [
                _Job(pair, task, notes)
                for pair, notes in zip(pairs, _describe_all(pairs, thresholds, binary_masks), strict=True)
                for task in dict.fromkeys(tasks)
            ]
            waiting = [job for job in jobs if finished.get(job.key, {}).get("notes") != job.digest]
            summary.resumed = len(jobs) - len(waiting)
            try:
                _run(waiting, endpoint, written, set_aside, summary, settings, max_tokens, progress)
            finally:
                for task in dict.fromkeys(tasks):
                    path = Path(f"{stem}{FILE_SUFFIX[task]}.json")
                    of_task = [job for job in jobs if job.task == task]
                    records = _records(of_task, written, lambda pair: facts_of(pair, thresholds, binary_masks))
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


def _describe_all(pairs: Sequence[Pair], thresholds: Thresholds, binary_masks: bool) -> list[str]:
    """The notes about all pairs, before anything is asked: what is wrong with masks is told now, and at once."""
    notes, problems = [], []
    for pair in pairs:
        try:
            notes.append(describe(pair, thresholds, binary_masks))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if problems[5:] else ""))
    return notes


def _run(
    jobs: list[_Job],
    endpoint: _Endpoint,
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
    meter = _Meter(max_tokens)
    with ThreadPoolExecutor(settings.concurrency) as pool:
        while True:
            if meter.used_up:
                summary.stopped_by = summary.stopped_by or "budget"
            while summary.stopped_by is None and refusal is None and len(running) < settings.concurrency:
                job = next(waiting, None)
                if job is None:
                    break
                running[pool.submit(_ask, endpoint, settings, job.notes, job.task, meter)] = job
            if not running:
                break
            meter.closed = summary.stopped_by is not None or refusal is not None
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
                summary.requests += outcome.requests
                summary.tokens += outcome.tokens
                if outcome.cut_short:
                    summary.left += 1
                    continue
                entry: dict[str, Any] = {"pair": job.pair.name, "task": job.task}
                kept = {"notes": job.digest, "tokens": outcome.tokens}
                if outcome.turns is not None:
                    written.append({**entry, **kept, "turns": outcome.turns})
                    summary.written += 1
                elif outcome.answered:
                    bad = {**entry, "reason": outcome.reason}
                    set_aside.append({**bad, **kept, "answer": outcome.raw})
                    summary.set_aside.append(bad)
                else:
                    summary.failed.append({**entry, "reason": outcome.reason})
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


def _connect(base_url: str | None, settings: Settings) -> _Endpoint:
    base_url = base_url or os.environ.get("OPENAI_BASE_URL") or None
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii():
        raise ValueError("OPENAI_API_KEY has characters that no key has; set it again.")
    if not key and base_url is None:
        raise ValueError("Set the environment variable OPENAI_API_KEY, or name an endpoint that needs no key.")
    options: dict[str, Any] = {}
    secrets = [key] if len(key) >= _SHORTEST_KEY else []
    if base_url is not None:
        options, found = _read_url(base_url)
        secrets += found
    client = openai.OpenAI(api_key=key or "none", timeout=settings.timeout, max_retries=settings.retries, **options)
    return _Endpoint(client, _shown(str(client.base_url)), tuple(sorted(set(secrets), key=len, reverse=True)))


def _read_url(url: str) -> tuple[dict[str, Any], list[str]]:
    """What the client is to send to the endpoint, and the secrets in it."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The endpoint must begin with http:// or https://, got {_shown(url)!r}.")
    try:
        parts = urlsplit(url)
        if not url.isprintable() or not parts.hostname or parts.port == 0:  # asking for the port raises as well
            raise ValueError
    except ValueError:  # which quotes what it could not read
        raise ValueError(f"The endpoint {_shown(url)!r} is no URL.") from None
    options: dict[str, Any] = {"base_url": f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"}
    secrets = []
    if parts.username is not None:
        user, password = parts.username, parts.password or ""
        pair = base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()
        options["default_headers"] = {"Authorization": f"Basic {pair}"}
        secrets += [pair, password or user, unquote(password or user)]
    query = parse_qsl(parts.query)
    if query:
        options["default_query"] = dict(query)
    for name, value in query:
        if _SECRET_PARAMETERS.search(name):
            secrets += [value, quote(value, safe=""), quote_plus(value)]
    return options, [secret for secret in secrets if len(secret) > 2]


def _shown(url: str) -> str:
    """A URL for messages: without user, password and parameters, wherever they may be."""
    return re.sub(r"[?#].*", "?***", re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _ask(endpoint: _Endpoint, settings: Settings, notes: str, task: str, meter: _Meter) -> _Outcome:
    request = _REQUESTS[task].format(questions=settings.questions, turns=settings.turns)
    _, most = _numbers(task, settings)
    example = [Turn(question=question, answer=answer) for question, answer in _EXAMPLE[task][:most]]
    messages: Any = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": f"Notes:\n{_EXAMPLE_NOTES}\n\n{request}"},
        {"role": "assistant", "content": Conversation(turns=example).model_dump_json()},
        {"role": "user", "content": f"Notes:\n{notes}\n\n{request}"},
    ]
    options: dict[str, Any] = {}
    if settings.json_schema:
        schema = {"name": "conversation", "schema": Conversation.model_json_schema(), "strict": False}
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    outcome = _Outcome()
    for attempt in range(settings.attempts):
        if attempt and (meter.closed or meter.used_up):
            outcome.cut_short = True
            return outcome
        try:
            completion = endpoint.client.chat.completions.create(
                model=settings.model,
                messages=messages,
                max_tokens=settings.max_answer_tokens,
                temperature=settings.temperature,
                **options,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConnectionError(
                f"The endpoint refused to answer: {endpoint.strike_message(str(error))}. Check the key in "
                f"OPENAI_API_KEY, the endpoint {endpoint.url} and the model {settings.model!r}."
            ) from None
        except (openai.APIError, ValueError) as error:  # ValueError: what came is no JSON
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            hint = ""
            if settings.json_schema and isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
                hint = "; if the endpoint does not take `response_format`, turn `json_schema` off"
            outcome.answered = False
            outcome.reason = f"{type(error).__name__}: {endpoint.strike_message(f'{error}{cause}')}{hint}"
            return outcome
        raw = endpoint.strike(_content(completion))
        total = getattr(getattr(completion, "usage", None), "total_tokens", None)
        said = sum(len(message["content"]) for message in messages) + len(raw)
        tokens = total if isinstance(total, int) and total > 0 else said // 4
        meter.add(tokens)
        outcome.requests += 1
        outcome.tokens += tokens
        try:
            turns = read_answer(raw, task, settings)
        except ValueError as error:
            outcome.reason, outcome.raw = endpoint.strike(str(error)), raw
        else:
            # Once more: JSON may have escapes in which the key was not seen.
            outcome.turns = tuple((endpoint.strike(question), endpoint.strike(answer)) for question, answer in turns)
            return outcome
    return outcome


def _content(completion: Any) -> str:
    """The text of an answer, empty where there is none: the client passes on whatever JSON the endpoint sends."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        content = None
    return str(content or "").encode(errors="replace").decode()  # halves of surrogate pairs fit in no file


def read_answer(text: str, task: str, settings: Settings) -> Turns:
    """
    Checks a model's answer.

    Args:
        text (`str`): the answer: one JSON object of [`Conversation`]'s form, perhaps in a Markdown code block.
        task (`str`): `open` or `dialogue`.
        settings ([`Settings`]): how many turns there must be.

    Raises:
        ValueError: if it is not usable; the message says why.
    """
    fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", text, re.DOTALL)
    try:
        conversation = Conversation.model_validate_json(fenced[1] if fenced else text)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where}: {first['msg']}" if where else first["msg"]) from None
    turns = tuple((turn.question, turn.answer) for turn in conversation.turns)
    least, most = _numbers(task, settings)
    if not least <= len(turns) <= most:
        wanted = least if least == most else f"{least} to {most}"
        raise ValueError(f"{len(turns)} turns, expected {wanted}")
    if len({question.lower() for question, _ in turns}) < len(turns):
        raise ValueError("a question comes twice")
    if set(turns) & set(_EXAMPLE[task]):
        raise ValueError("a turn is copied from the example")
    return turns


def _numbers(task: str, settings: Settings) -> tuple[int, int]:
    """How many turns there must be, at least and at most."""
    return (settings.questions, settings.questions) if task == "open" else (2, settings.turns)


def describe(pair: Pair, thresholds: Thresholds = LEVIR, binary_masks: bool = False) -> str:
    """What the model is told about a pair: captions, counts, cells, and each object's cell, size and box."""
    lines = []
    if pair.captions:
        lines += ["Captions by people who saw both images:", *(f"- {caption}" for caption in pair.captions)]
    if pair.mask is not None:
        mask = load_mask(pair.mask, binary_masks)
        facts = read_facts(mask, thresholds)
        lines += [f"Counted: {format_count(facts)}", f"Cells of a 3x3 grid with change: {format_grid(facts)}"]
        objects = find_objects(mask, thresholds)
        if objects:
            height, width = mask.shape
            lines.append(f"New objects (left, top, right, bottom in pixels of {width} x {height}):")
            lines += [f"- {item.kind}, {CELLS[item.cell]}, {item.area} pixels, box {item.box}" for item in objects]
    return "\n".join(lines)


def _records(jobs: list[_Job], written: Journal, facts: Callable[[Pair], Facts | None]) -> Iterator[Record]:
    for job in jobs:
        pair, task = job.pair, job.task
        entry = written.entries.get(job.key)
        if entry is not None and entry["notes"] == job.digest:
            turns = tuple((question, answer) for question, answer in entry["turns"])
            changed = pair_changed(pair, None if pair.captions else facts(pair))
            parts = [(turn,) for turn in turns] if task == "open" else [turns]
            for number, part in enumerate(parts):
                identity = f"{pair.name}-{task}" + (f"-{number}" if task == "open" else "")
                yield Record(identity, task, pair.before, pair.after, part, changed)
