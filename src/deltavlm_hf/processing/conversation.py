"""
A conversation in the forms that it has on its way: a user's messages, its turns, the prompt that a template makes.

    messages -> read_chat -> images, question, turns, answer    a user's chat, taken apart
    turns, question -> write_chat -> render -> prompt           what models are trained on
    messages -> render -> prompt                                a user's chat, only to be looked at
"""

import re
from collections.abc import Sequence
from typing import Any

from .chat_template import render_chat

IMAGE_SOURCES = ("image", "url", "path", "base64")

# The authors' form of a conversation: "q: <question 1> a: <answer 1> q: <question 2>", then the answer.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if not loop.first %}{{ ' ' }}{% endif -%}
    {%- if message['role'] == 'user' %}{{ 'q: ' }}{% elif not loop.last %}{{ 'a: ' }}{% endif -%}
    {%- if message['content'] is string -%}
        {{ message['content'] }}
    {%- else -%}
        {%- for block in message['content'] if block['type'] == 'text' %}{{ block['text'] }}{% endfor -%}
    {%- endif -%}
{%- endfor -%}"""

_END_OF_TEXT = "THE FINAL MESSAGE GOES ON "  # the space tells whether a template trims texts

Turn = tuple[str, str]


def normalize_text(text: str) -> str:
    """
    The authors' text normaliser, which the released weights saw in training: lower case, `.!"()*#:;~` become spaces,
    spaces are squeezed. Their cut after 50 words is left out: in a long dialogue it removes the question itself.
    """
    text = re.sub(r"([.!\"()*#:;~])", " ", text.lower())
    return re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")


def read_chat(messages: Any) -> tuple[list, str, list[Turn], str | None]:
    """
    Images, the current question, the turns before it and its answer, if it has one.

    Raises:
        ValueError: if a message is not of the form that `apply_chat_template` describes.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ValueError(f"A chat needs at least one message, a user's; got {messages!r:.60}.")
    images, texts = [], []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"Message {index} must be a dict with 'role' and 'content', got {message!r:.60}.")
        expected = "assistant" if index % 2 else "user"
        if message.get("role") != expected:
            raise ValueError(
                f"Message {index} has the role {message.get('role')!r}, expected {expected!r}: questions and answers "
                "take turns. There are no system or tool messages; say it in the question."
            )
        for name in ("tool_calls", "function_call"):
            if message.get(name):
                raise ValueError(f"Message {index} has {name!r}: DeltaVLM knows no tools.")
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, (list, tuple)):
            raise ValueError(f"Message {index} needs 'content', a string or a list of blocks; got {content!r:.60}.")
        text = ""
        for block in blocks:
            kind = block.get("type") if isinstance(block, dict) else None
            if kind == "text" and isinstance(block.get("text"), str):
                text += block["text"]
            elif kind == "image":
                images.append(next((block[key] for key in IMAGE_SOURCES if block.get(key) is not None), None))
            elif kind == "image_url":
                url = block.get("image_url")
                images.append(url.get("url") if isinstance(url, dict) else url)
            else:
                raise ValueError(
                    f"Message {index} has a block of type {kind!r}, expected {{'type': 'text', 'text': ...}} or an "
                    f"image; got {block!r:.80}."
                )
        texts.append(text)
    if len(images) not in (0, 2):
        raise ValueError(f"A chat needs two images, before and after; got {len(images)}.")
    answer = texts.pop() if len(texts) % 2 == 0 else None
    question = texts.pop()
    return images, question, list(zip(texts[::2], texts[1::2], strict=True)), answer


def write_chat(turns: Sequence[Turn], question: str) -> list[dict[str, str]]:
    """
    The messages of a dialogue that ends with a question.

    Raises:
        ValueError: if a turn is not a question with its answer.
    """
    messages = []
    for turn in turns:
        is_pair = isinstance(turn, (tuple, list)) and len(turn) == 2
        if not is_pair or not all(isinstance(text, str) for text in turn):
            raise ValueError(f"`history` must hold (question, answer) pairs, got {turn!r:.80}.")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": question}]


def _marked(message: dict) -> dict:
    """A message with a mark at the end of its text."""
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + _END_OF_TEXT}
    last = max((index for index, block in enumerate(content) if block["type"] == "text"), default=None)
    if last is None:
        raise ValueError("`continue_final_message`: the final message has no text to go on with.")
    blocks = list(content)
    blocks[last] = {**blocks[last], "text": blocks[last]["text"] + _END_OF_TEXT}
    return {**message, "content": blocks}


def _for_template(message: dict) -> dict:
    """As templates expect it: without keys that say nothing, images in one form."""
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(message["content"], str):
        return message
    blocks = []
    for block in message["content"]:
        if block["type"] == "image_url":
            url = block.get("image_url")
            block = {"type": "image", "url": url.get("url") if isinstance(url, dict) else url}
        blocks.append(block)
    return {**message, "content": blocks}


def render(template: str, messages: list[dict], continue_final_message: bool = False, **variables: Any) -> str:
    """
    The prompt that a chat template makes of messages, as `apply_chat_template` of transformers, but within bounds.

    Args:
        template (`str`): in the language of Jinja.
        messages (`list[dict]`).
        continue_final_message (`bool`, *optional*): whether the prompt ends where the final message does.
        variables: what else the template may refer to.

    Raises:
        ValueError: if the template fails, or computes too much, see `chat_template.py`.
    """
    variables = {"add_generation_prompt": False, **variables}
    messages = [_for_template(message) for message in messages]
    if not continue_final_message:
        return render_chat(template, messages, **variables)
    prompt = render_chat(template, [*messages[:-1], _marked(messages[-1])], **variables)
    kept, found, rest = prompt.rpartition(_END_OF_TEXT.strip())
    if not found:
        raise ValueError("`continue_final_message`: the chat template leaves the final message out.")
    return kept if rest.startswith(" ") else kept.rstrip()
