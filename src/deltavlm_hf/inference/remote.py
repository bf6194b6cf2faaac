"""A language model in another process, such as vLLM's, which has its weights, its cache and its batches."""

import base64
import copy
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import httpx
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig

from ..modeling import DeltaVLMForConditionalGeneration
from .identity import EXPORT_FILE, fingerprint_of

logger = logging.getLogger(__name__)

KEY = "VLLM_API_KEY"  # as vLLM itself calls what clients have to show
CONNECT_SECONDS, SILENT_SECONDS = 10, 600  # of a server; what waits for its turn there hears nothing
# Of a way to generate, what a request calls it, and what is said where nothing is given, as in Transformers.
_SAID = {
    "max_new_tokens": ("max_tokens", 20),
    "min_new_tokens": ("min_tokens", 0),
    "top_k": ("top_k", 50),
    "top_p": ("top_p", 1.0),
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
}
_SAID_OTHERWISE = {"do_sample", "temperature", "eos_token_id", "suppress_tokens"}
_OF_BEAMS = {"num_beams", "length_penalty", "early_stopping"}  # of which it is told that there are none
_WITHOUT_EFFECT = {"pad_token_id", "bos_token_id", "use_cache", "transformers_version"}
_SUPPRESSED = -100  # the least that vLLM lets a score be changed by


class UnreachableError(ConnectionError):
    """The language model does not answer, whatever it is asked."""


class Piece(NamedTuple):
    """
    What comes of a prompt next.

    Attributes:
        number (`int`): which prompt.
        ids (`list[int]`): its next tokens.
        finish_reason (`str`, *optional*): `stop` or `length` with the last of them.
    """

    number: int
    ids: list[int]
    finish_reason: str | None


class RemoteLanguageModel(nn.Module):
    """
    In the place of a model's language model: the embeddings of prompts are here, all else is behind a URL.

    Args:
        embeddings (`nn.Module`): of the language model.
        url (`str`): of the API, `http://127.0.0.1:8001/v1`.

    Raises:
        ValueError: if it is no URL of http or https.
    """

    def __init__(self, embeddings: nn.Module, url: str):
        super().__init__()
        self.embeddings = embeddings
        self.url = _check_url(url)
        self.name = ""
        key = os.environ.get(KEY)
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(CONNECT_SECONDS, read=SILENT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,  # proxies are for other addresses
        )

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, *args, **kwargs) -> NoReturn:
        raise ValueError(
            f"The language model is at {self.url}: `answer`, `ask_pairs` and what builds on them ask it there; "
            "`forward` and `generate` need its weights, so load the model without `llm_url`."
        )

    def complete(self, prompts: Sequence[torch.Tensor], options: Mapping[str, Any]) -> Iterator[Piece]:
        """
        Has answers generated; whoever reads no further ends them.

        Args:
            prompts (`Sequence[torch.Tensor]` of shape `(L, d_llm)`): without padding.
            options (`Mapping`): of the request, see [`request_options`].

        Yields:
            [`Piece`], of all prompts as they come.

        Raises:
            UnreachableError: if the server does not answer, or not to the end.
            ValueError: if it refuses the request; with what it says.
        """
        body = {
            "model": self.name,
            "prompt_embeds": [_as_text(prompt) for prompt in prompts],
            "stream": True,
            "return_token_ids": True,
            **options,
        }
        waiting = len(prompts)
        try:
            with self._client.stream("POST", f"{self.url}/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    self._refuse(response)
                for event in _events(response):
                    if "error" in event:
                        raise UnreachableError(f"{self.url} has failed: {_message(event)}")
                    for choice in event.get("choices", []):
                        if choice.get("token_ids") is None:
                            raise ValueError(f"{self.url} does not say token ids: a newer vLLM does.")
                        waiting -= choice["finish_reason"] is not None
                        yield Piece(choice["index"], choice["token_ids"], choice["finish_reason"])
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if waiting:
            raise UnreachableError(f"{self.url} ended before its answers did: see its log.")

    def connect(self, made_of: str) -> None:
        """
        Finds out what the model there is called, whether it takes embeddings of this size, and, where the folder that
        it was loaded from can be seen, whether it is the language model of this model.

        Args:
            made_of (`str`): this model's [`fingerprint`].

        Raises:
            UnreachableError: if nothing answers there.
            ValueError: if it is something else; with what to do.
        """
        try:
            response = self._client.get(f"{self.url}/models")
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code != 200:
            self._refuse(response)
        try:
            card = response.json()["data"][0]
            self.name, root = str(card["id"]), Path(str(card.get("root") or card["id"]))
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"--llm-url {self.url}: no API in OpenAI's form is there. Does the URL end with /v1?"
            ) from error
        if _made_of(root) not in (None, made_of):
            raise ValueError(
                f"--llm-url {self.url}: {root} is the language model of another model than the one that is asked, or "
                "of an earlier state of it: export it anew (`deltavlm export-llm MODEL OUT`) and start vLLM on that."
            )
        weight = next(self.embeddings.parameters())
        try:
            for _ in self.complete([weight[:1].detach()], {"max_tokens": 1, "temperature": 0}):
                pass
        except ValueError as error:
            raise ValueError(
                f"--llm-url {self.url}: {error} What is needed there is vLLM with --enable-prompt-embeds, on the "
                "folder that `deltavlm export-llm` makes of this very model."
            ) from error

    def _unreachable(self, error: Exception) -> UnreachableError:
        return UnreachableError(
            f"--llm-url {self.url}: the language model does not answer ({type(error).__name__}: {error}). Is vLLM "
            "running, and is the address the one that it says?"
        )

    def _refuse(self, response: httpx.Response) -> NoReturn:
        if response.status_code == 401:
            raise ValueError(f"{self.url} asks for a key: set {KEY} to the one that it was started with.")
        try:
            said = _message(response.json())
        except ValueError:
            said = ""
        kind = UnreachableError if response.status_code >= 500 else ValueError
        raise kind(f"{self.url} answers {response.status_code}{': ' * bool(said)}{said}")


def move_language_model(model: DeltaVLMForConditionalGeneration, url: str) -> None:
    """
    Puts a language model that another process has in the place of a model's own, of which only the embeddings stay.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): changed in place; its settings say how to generate there too.
        url (`str`): of vLLM's API, `http://127.0.0.1:8001/v1`.

    Raises:
        UnreachableError: if nothing answers there.
        ValueError: if it is no URL, something else than this model's language model answers there, or the model's way
            to generate has settings that it is not told.
    """
    request_options(model.generation_config)
    beams = model.generation_config.num_beams or 1
    if beams > 1:
        logger.warning("The model answers by %d beams; behind --llm-url the likeliest token is taken.", beams)
    remote = RemoteLanguageModel(copy.deepcopy(model.get_input_embeddings()), url)
    remote.connect(fingerprint_of(model))
    model.language_model = remote


def request_options(config: GenerationConfig) -> dict[str, Any]:
    """
    A way to generate, as requests say it. All of it is said, so that nothing depends on a server's own defaults.

    Raises:
        ValueError: for settings that would be passed over.
    """
    given = {name for name, value in config.to_diff_dict().items() if value and not name.startswith("_")}
    if unknown := sorted(given - _SAID.keys() - _SAID_OTHERWISE - _OF_BEAMS - _WITHOUT_EFFECT):
        raise ValueError(f"A language model behind --llm-url cannot be told {', '.join(unknown)}: leave it out.")
    said = {}
    for name, (word, default) in _SAID.items():
        value = getattr(config, name)
        said[word] = default if value is None else value
    return {
        **said,
        "temperature": (config.temperature or 1.0) if config.do_sample else 0.0,
        "stop_token_ids": end_ids(config),
        "logit_bias": {str(token): _SUPPRESSED for token in config.suppress_tokens or []},
    }


def end_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


def generate_remotely(
    model: DeltaVLMForConditionalGeneration, prompts: Sequence[torch.Tensor], options: dict[str, Any]
) -> torch.Tensor:
    """
    Whole answers as token ids `(B, L)`, padded on the right.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): with a [`RemoteLanguageModel`].
        prompts (`Sequence[torch.Tensor]` of shape `(L, d_llm)`): without padding.
        options (`dict`): of `generate`, beside the model's own defaults.

    Raises:
        UnreachableError: if the language model does not answer.
        ValueError: if it refuses to, or for options that it cannot be told.
    """
    given = options.get("generation_config")
    config = copy.deepcopy(model.generation_config if given is None else given)
    unknown = config.update(**{name: value for name, value in options.items() if name != "generation_config"})
    if unknown:
        raise ValueError(f"A language model behind --llm-url cannot be told {', '.join(unknown)}: leave it out.")
    answers: list[list[int]] = [[] for _ in prompts]
    for piece in model.language_model.complete(prompts, request_options(config)):
        answers[piece.number] += piece.ids
    ids = [torch.tensor(each, dtype=torch.long) for each in answers]
    return pad_sequence(ids, batch_first=True, padding_value=config.pad_token_id or 0)


def _check_url(url: str) -> str:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--llm-url {url}: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"--llm-url {url}: expected a URL such as http://127.0.0.1:8001/v1.")
    return url.rstrip("/")


def _as_text(prompt: torch.Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(prompt.cpu().clone(), buffer)  # of a view all that it is a view of would be saved
    return base64.b64encode(buffer.getvalue()).decode()


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """Server-sent events, up to the one that says that all is told."""
    for line in response.iter_lines():
        data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
        if data == "[DONE]":
            return
        if data:
            try:
                yield dict(json.loads(data))
            except (ValueError, TypeError) as error:
                raise UnreachableError(f"{response.url} does not speak as vLLM does: {data:.60}") from error


def _message(answer: Any) -> str:
    """What an error in OpenAI's form says."""
    try:
        return str(answer["error"]["message"])[:500]
    except (LookupError, TypeError):
        return str(answer)[:500]


def _made_of(folder: Path) -> str | None:
    """Of which model a folder's language model is, where that can be seen."""
    try:
        return str(json.loads((folder / EXPORT_FILE).read_text())["of"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
