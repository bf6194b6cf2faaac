"""What a chat model is asked about a pair, and what its answer must be."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from ..build import Pair
from ..classes import NEW, ROADS_AND_BUILDINGS, Classes
from ..questions import Turns, format_count, format_grid
from ..rules import CELLS, LEVIR, Thresholds, find_objects, load_mask, read_facts

WRITTEN_TASKS = ("open", "dialogue")

_FORMAT = 1  # of the progress file

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
    def journal_header(self) -> dict[str, Any]:
        """What runs that go on with each other's work have in common."""
        return {"format": _FORMAT, "model": self.model, "questions": self.questions, "turns": self.turns}


def make_messages(notes: str, task: str, settings: Settings) -> list[dict[str, str]]:
    """The chat that asks for one pair's questions: the rules, one worked example, and the notes about the pair."""
    request = _REQUESTS[task].format(questions=settings.questions, turns=settings.turns)
    _, most = _turns_wanted(task, settings)
    example = [Turn(question=question, answer=answer) for question, answer in _EXAMPLE[task][:most]]
    return [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": f"Notes:\n{_EXAMPLE_NOTES}\n\n{request}"},
        {"role": "assistant", "content": Conversation(turns=example).model_dump_json()},
        {"role": "user", "content": f"Notes:\n{notes}\n\n{request}"},
    ]


def response_format() -> dict[str, Any]:
    """The schema of [`Conversation`], as endpoints take it."""
    schema = {"name": "conversation", "schema": Conversation.model_json_schema(), "strict": False}
    return {"type": "json_schema", "json_schema": schema}


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
    least, most = _turns_wanted(task, settings)
    if not least <= len(turns) <= most:
        wanted = least if least == most else f"{least} to {most}"
        raise ValueError(f"{len(turns)} turns, expected {wanted}")
    if len({question.lower() for question, _ in turns}) < len(turns):
        raise ValueError("a question comes twice")
    if set(turns) & set(_EXAMPLE[task]):
        raise ValueError("a turn is copied from the example")
    return turns


def _turns_wanted(task: str, settings: Settings) -> tuple[int, int]:
    """How many turns there must be, at least and at most."""
    return (settings.questions, settings.questions) if task == "open" else (2, settings.turns)


def describe(
    pair: Pair,
    thresholds: Thresholds = LEVIR,
    binary_masks: bool = False,
    classes: Classes = ROADS_AND_BUILDINGS,
) -> str:
    """What the model is told about a pair: captions, counts, cells, and each object's cell, size and box."""
    lines = []
    if pair.captions:
        lines += ["Captions by people who saw both images:", *(f"- {caption}" for caption in pair.captions)]
    if pair.mask is not None:
        mask = load_mask(pair.mask, binary_masks, classes)
        facts = read_facts(mask, thresholds, classes)
        lines += [f"Counted: {format_count(facts)}", f"Cells of a 3x3 grid with change: {format_grid(facts)}"]
        objects = find_objects(mask, thresholds, classes)
        if objects:
            height, width = mask.shape
            kind = "New" if all(each.how == NEW for each in classes) else "Changed"
            lines.append(f"{kind} objects (left, top, right, bottom in pixels of {width} x {height}):")
            lines += [f"- {item.kind}, {CELLS[item.cell]}, {item.area} pixels, box {item.box}" for item in objects]
    return "\n".join(lines)
