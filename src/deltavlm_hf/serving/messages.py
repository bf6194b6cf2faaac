"""The API's messages: what a client asks, as the model takes it; answers, as a client takes them."""

import secrets
import time
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ..data.asked import meaning_of
from ..data.classes import Classes
from ..data.questions import question_task
from ..processing.conversation import Turn, read_chat
from .errors import ApiError
from .rows import Row

MAX_MESSAGES = 256
MAX_TEXT = 32_768  # characters of all messages together; of long dialogues the model reads the last turns
MAX_CHOICES = 8
MAX_STOPS = 4

_Text = Annotated[str, Field(strict=True)]
_Flag = Annotated[bool, Field(strict=True)]
_Tokens = Annotated[int, Field(strict=True, ge=1, le=2**20)]
_Stop = Annotated[str, Field(strict=True, min_length=1, max_length=256)]


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        return {key: value for key, value in given.items() if value is not None} if isinstance(given, dict) else given


class ImageUrl(_Asked):
    url: _Text
    detail: _Text = "auto"


def _letters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("half of a surrogate pair is no letter") from error
    return text


class TextPart(_Asked):
    type: Literal["text"]
    text: Annotated[_Text, AfterValidator(_letters)]


class ImagePart(_Asked):
    type: Literal["image_url"]
    image_url: ImageUrl


def _parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Message(_Asked):
    role: _Text
    content: Annotated[list[Annotated[TextPart | ImagePart, Field(discriminator="type")]], BeforeValidator(_parts)]
    name: _Text | None = None


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


class StreamOptions(_Asked):
    include_usage: _Flag = False


class ChatRequest(_Asked):
    """A question about a pair. What is not here is refused, for it would have no effect."""

    model: _Text
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = Field(None, description="The newer name of `max_tokens`.")
    temperature: Annotated[float, Field(strict=True, ge=0, le=2)] | None = Field(
        None, description="0 takes the likeliest token, more samples. By default as the model generates."
    )
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    seed: Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[_Stop], BeforeValidator(_listed)] = Field([], max_length=MAX_STOPS)
    n: Annotated[int, Field(strict=True, ge=1, le=MAX_CHOICES)] = 1
    stream: _Flag = False
    stream_options: StreamOptions = StreamOptions()
    user: _Text | None = Field(None, description="Without effect.")
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    pair_id: _Text | None = Field(None, description="Of an earlier answer, in place of the images.")
    parsed: _Flag = Field(False, description="With what the answer means, in the columns of `deltavlm predict`.")


def read_messages(asked: ChatRequest) -> tuple[list[str], str, list[Turn]]:
    """
    The images' URLs (two, or none beside a `pair_id`), the question and the turns before it.

    Raises:
        ApiError: if the messages are not of this form.
    """
    messages = [message.model_dump(exclude_none=True) for message in asked.messages]
    try:
        images, question, history, answer = read_chat(messages)
    except ValueError as error:
        raise ApiError(str(error), param="messages") from error
    if answer is not None:
        raise ApiError("The last message is an assistant's: end with a user's question.", param="messages")
    if not question.strip():
        raise ApiError("The last message has no question: add a text.", param="messages")
    if (length := len(question) + sum(len(text) for turn in history for text in turn)) > MAX_TEXT:
        raise ApiError(f"The messages have {length} characters, at most {MAX_TEXT} are taken.", param="messages")
    if not images and asked.pair_id is None:
        raise ApiError(
            "There are no images: put two `image_url` parts into a message, before and after, or give the `pair_id` "
            "of an earlier answer.",
            param="messages",
        )
    if images and asked.pair_id is not None:
        raise ApiError("Give two images or a `pair_id`: not both.", param="pair_id")
    return images, question, history


class Replies:
    """
    What is sent of one request's answers.

    Args:
        asked ([`ChatRequest`]): the request.
        pair_id (`str`): what the pair is called.
        rows (`list[Row]`): for each choice its row.
        classes ([`Classes`]): what the model counts and places.
    """

    def __init__(self, asked: ChatRequest, pair_id: str, rows: list[Row], classes: Classes):
        self.asked = asked
        self.rows = rows
        self.classes = classes
        self.common = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
            "pair_id": pair_id,
        }

    def usage(self) -> dict[str, int]:
        prompt, completion = self.rows[0].prompt_tokens, sum(len(row.ids) for row in self.rows)
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def whole(self) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": row.text, **self._meaning(row)},
                "finish_reason": row.finish_reason,
                "logprobs": None,
            }
            for index, row in enumerate(self.rows)
        ]
        return {**self.common, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def first(self, index: int) -> dict[str, Any]:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str) -> dict[str, Any]:
        return self._chunk(index, {"content": text})

    def last(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return self._chunk(index, self._meaning(row), row.finish_reason)

    def usage_chunk(self) -> dict[str, Any]:
        return {**self.common, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self.common, "object": "chat.completion.chunk", "choices": [choice]}

    def _meaning(self, row: Row) -> dict[str, Any]:
        if not self.asked.parsed:
            return {}
        task, meaning = question_task(row.question, self.classes), meaning_of(row.question, row.text, self.classes)
        return {"parsed": {"task": task, **meaning}}
