"""The endpoint that a chat model answers at: where it is, what must not be kept or said of it, and one request."""

import base64
import os
import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, quote, quote_plus, unquote, urlsplit

import openai

from .prompts import Settings, response_format

_SHORTEST_KEY = 8  # what is shorter is a stand-in for servers without keys, and may be a word of an answer
_SECRET_PARAMETERS = re.compile(r"key|token|secret|pass|pwd|auth|sig|cred|code", re.IGNORECASE)


class NoAnswerError(Exception):
    """The endpoint failed; another request may be answered. The message holds no secrets."""


@dataclass(frozen=True)
class Endpoint:
    """The client, and what must not be kept or said."""

    client: openai.OpenAI
    url: str
    secrets: tuple[str, ...]

    def complete(self, messages: Any, settings: Settings) -> tuple[str, int]:
        """
        The text that the model answers with, and what it cost in tokens.

        Raises:
            NoAnswerError: if none came, after all retries.
            ConnectionError: if the endpoint refuses the key or does not know the model: nothing else will be answered.
        """
        options: dict[str, Any] = {"response_format": response_format()} if settings.json_schema else {}
        try:
            completion = self.client.chat.completions.create(
                model=settings.model,
                messages=messages,
                max_tokens=settings.max_answer_tokens,
                temperature=settings.temperature,
                **options,
            )
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise ConnectionError(
                f"The endpoint refused to answer: {self.redact_message(str(error))}. Check the key in "
                f"OPENAI_API_KEY, the endpoint {self.url} and the model {settings.model!r}."
            ) from None
        except (openai.APIError, ValueError) as error:  # ValueError: what came is no JSON
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            hint = ""
            if settings.json_schema and isinstance(error, openai.BadRequestError | openai.UnprocessableEntityError):
                hint = "; if the endpoint does not take `response_format`, turn `json_schema` off"
            reason = self.redact_message(f"{error}{cause}")
            raise NoAnswerError(f"{type(error).__name__}: {reason}{hint}") from None
        text = self.redact(_content(completion))
        total = getattr(getattr(completion, "usage", None), "total_tokens", None)
        characters = sum(len(message["content"]) for message in messages) + len(text)
        return text, total if isinstance(total, int) and total > 0 else characters // 4

    def redact(self, text: str) -> str:
        """What the endpoint sent, without secrets."""
        for secret in self.secrets:
            text = text.replace(secret, "***")
        return text

    def redact_message(self, text: str) -> str:
        """A message of the endpoint without secrets, and without any other that it shows as a header."""
        text = self.redact(text.encode(errors="replace").decode())
        return re.sub(r"(?i)(bearer|basic)\s+[\w.~+/=-]+", r"\1 ***", text)


def connect(base_url: str | None, settings: Settings) -> Endpoint:
    """
    The endpoint at an address, by default that of `OPENAI_BASE_URL` or OpenAI's own, with the key of `OPENAI_API_KEY`.

    Raises:
        ValueError: if there is no key where one is needed, or the address is no URL.
    """
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
    return Endpoint(client, _without_secrets(str(client.base_url)), tuple(sorted(set(secrets), key=len, reverse=True)))


def _read_url(url: str) -> tuple[dict[str, Any], list[str]]:
    """What the client is to send to the endpoint, and the secrets in it."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"The endpoint must begin with http:// or https://, got {_without_secrets(url)!r}.")
    try:
        parts = urlsplit(url)
        if not url.isprintable() or not parts.hostname or parts.port == 0:  # asking for the port raises as well
            raise ValueError
    except ValueError:  # which quotes what it could not read
        raise ValueError(f"The endpoint {_without_secrets(url)!r} is no URL.") from None
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


def _without_secrets(url: str) -> str:
    """A URL for messages: without user, password and parameters, wherever they may be."""
    return re.sub(r"[?#].*", "?***", re.sub(r"^(\w+://)?.*@", r"\1***@", url, flags=re.DOTALL), flags=re.DOTALL)


def _content(completion: Any) -> str:
    """The text of an answer, empty where there is none: the client passes on whatever JSON the endpoint sends."""
    try:
        content = completion.choices[0].message.content
    except (AttributeError, LookupError, TypeError):
        content = None
    return str(content or "").encode(errors="replace").decode()  # halves of surrogate pairs fit in no file
