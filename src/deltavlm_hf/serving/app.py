"""The API: its addresses, and how a request becomes rows and rows an answer."""

import asyncio
import copy
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from .. import __version__
from ..data.classes import classes_of
from ..inference.asking import check_options
from ..inference.remote import RemoteLanguageModel
from ..inference.turns import Turns
from ..modeling import DeltaVLMForConditionalGeneration
from ..processing import DeltaVLMProcessor
from ..processing.conversation import Turn
from .batcher import Batcher
from .errors import ApiError, add_handlers, as_api_error, described
from .gate import PAGE, Gate
from .images import DATES, Fetcher, read_data_url, read_pixels
from .messages import ChatRequest, Replies, read_messages
from .metrics import Metrics
from .pairs import Pair, Pairs
from .rows import Event, Row

READERS = 2  # threads that decode images
LEAST_TEMPERATURE = 0.01  # below, the likeliest token is taken


@dataclass(frozen=True)
class Settings:
    """
    How a model is served.

    Attributes:
        name (`str`): what the model is called.
        batch_size (`int`): answers made at once.
        wait_ms (`int`): milliseconds that a question waits for others to share its batch.
        max_waiting (`int`): answers that may wait for their batch.
        max_tokens (`int`): the longest answer that may be asked for.
        keep_minutes (`int`): how long a pair is known after it was asked about.
        keep_pairs (`int`): pairs that are known at most.
        allow_urls (`Sequence[str]`): hosts that images are fetched from.
        api_key (`str`, *optional*): what clients have to show.
        page (`bool`): whether there is a page for people too. One per process.
        note (`str`, *optional*): what the page says of the model's answers.
    """

    name: str
    batch_size: int = 32
    wait_ms: int = 10
    max_waiting: int = 128
    max_tokens: int = 512
    keep_minutes: int = 10
    keep_pairs: int = 256
    allow_urls: Sequence[str] = ()
    api_key: str | None = None
    page: bool = False
    note: str | None = None


def make_app(model: DeltaVLMForConditionalGeneration, processor: DeltaVLMProcessor, settings: Settings) -> FastAPI:
    """
    Makes the API as an ASGI application, for uvicorn or another server. The model belongs to it as long as it runs.

    Args:
        model ([`DeltaVLMForConditionalGeneration`]): on any device.
        processor ([`DeltaVLMProcessor`]): the model's.
        settings ([`Settings`]): how it is served.

    Raises:
        ValueError: if the model's own way to generate does not give one answer to each question.
        ValueError: for a page, if the model's language model is in vLLM.
        ImportError: for a page, if the packages for it are not installed.
    """
    if settings.page and isinstance(model.language_model, RemoteLanguageModel):
        raise ValueError("The page asks the language model in this process: leave out --page or --llm-url.")
    metrics = Metrics()
    turns = Turns()
    service = Service(model, processor, settings, metrics, turns)

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[None]:
        service.batcher.start()
        try:
            yield
        finally:
            await anyio.to_thread.run_sync(service.batcher.close)
            await service.fetcher.client.aclose()

    app = FastAPI(
        title="DeltaVLM",
        version=__version__,
        description="What changed between two images of one place, asked in OpenAI's form.",
        lifespan=running,
        redoc_url=None,
        middleware=[Middleware(Gate, metrics=metrics, api_key=settings.api_key, page=settings.page)],
    )
    add_handlers(app)
    key = [Depends(HTTPBearer(auto_error=False))] if settings.api_key else []  # for `/docs`; `Gate` checks
    keyless = [401] if settings.api_key else []

    @app.post(
        "/v1/chat/completions",
        dependencies=key,
        responses=described(400, *keyless, 404, 408, 411, 413, 429, 500),
    )
    async def complete(asked: ChatRequest) -> Response:
        """One answer or more to a question about two images."""
        return await service.complete(asked)

    @app.get("/v1/models", dependencies=key, responses=described(*keyless))
    async def models() -> dict[str, Any]:
        """The model."""
        return {"object": "list", "data": [service.model_card]}

    @app.get("/v1/models/{name:path}", dependencies=key, responses=described(*keyless, 404))
    async def one_model(name: str) -> dict[str, Any]:
        """The model, by its name."""
        service.check_name(name)
        return service.model_card

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server takes requests."""
        return {"status": "ok"}

    @app.get("/metrics", dependencies=key, responses=described(*keyless), response_class=PlainTextResponse)
    async def read_metrics() -> Response:
        """What is counted, for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        if settings.page:
            return RedirectResponse(f".{PAGE}/")
        return JSONResponse({"message": "This is an API in OpenAI's form, at /v1. See /docs; --page adds a page."})

    app.state.close_pages = lambda: None
    if settings.page:
        from ..app.page import build, mount

        page = build(model, copy.deepcopy(processor), note=settings.note, turns=turns)
        app.state.close_pages = mount(app, page, PAGE)
    return app


class Service:
    """What the addresses do."""

    def __init__(
        self,
        model: DeltaVLMForConditionalGeneration,
        processor: DeltaVLMProcessor,
        settings: Settings,
        metrics: Metrics,
        turns: Turns,
    ):
        check_options(model, {})
        self.settings = settings
        self.metrics = metrics
        self.generation = model.generation_config
        self.classes = classes_of(model.config)
        # Tokenizers are not for several threads at once: the model's thread has one, requests have another.
        self.processor = copy.deepcopy(processor)
        self.batcher = Batcher(
            model, processor, metrics, settings.batch_size, settings.wait_ms / 1000, settings.max_waiting, turns
        )
        self.pairs = Pairs(settings.keep_pairs, settings.keep_minutes * 60)
        self.fetcher = Fetcher(settings.allow_urls)
        self.readers = anyio.CapacityLimiter(READERS)
        self.model_card = {
            "id": settings.name,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "deltavlm-hf",
        }
        metrics.watch("waiting", "Answers that wait for their batch.", lambda: len(self.batcher))
        metrics.watch("pairs_kept", "Pairs that are known.", lambda: len(self.pairs))

    def check_name(self, name: str) -> None:
        if name != self.settings.name:
            raise ApiError(
                f"There is no model {name[:60]!r} here, only {self.settings.name!r}.",
                404,
                param="model",
                code="model_not_found",
            )

    async def complete(self, asked: ChatRequest) -> Response:
        start = time.monotonic()
        self.check_name(asked.model)
        urls, question, history = read_messages(asked)
        options = self._options(asked)
        prompt_tokens = self._count(question, history)
        pair = self._find(asked.pair_id) if asked.pair_id is not None else await self._read(urls)

        loop = asyncio.get_running_loop()
        events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

        def tell(index: int, event: Event) -> None:  # in the model's thread
            loop.call_soon_threadsafe(events.put_nowait, (index, event))

        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        rows = [
            Row(
                pair,
                question,
                history,
                prompt_tokens,
                tell=partial(tell, index),
                seed=_wrapped(seed + index),
                **options,
            )
            for index in range(asked.n)
        ]
        replies = Replies(asked, pair.id, rows, self.classes)
        self.batcher.add(rows)

        def end() -> None:
            self.batcher.drop(rows)
            if all(row.finish_reason for row in rows):
                self.metrics.seconds.observe(time.monotonic() - start)
            self.metrics.tokens.inc(sum(len(row.ids) for row in rows))

        if asked.stream:
            return _Stream(_lines(replies, events, asked), end)
        try:
            waiting = len(rows)
            while waiting:
                _, event = await events.get()
                if isinstance(event, Exception):
                    raise as_api_error(event)
                waiting -= event is None
        finally:
            end()
        return JSONResponse(replies.whole())

    def _options(self, asked: ChatRequest) -> dict[str, Any]:
        """Of a row: what was asked for, and else as the model generates by itself."""
        given = [number for number in (asked.max_tokens, asked.max_completion_tokens) if number is not None]
        most = self.settings.max_tokens
        if given and min(given) > most:
            name = "max_tokens" if asked.max_tokens is not None else "max_completion_tokens"
            raise ApiError(f"`{name}` is {min(given)}, at most {most} are given.", param=name)
        own = self.generation
        samples = bool(own.do_sample)
        temperature = (own.temperature or 1.0) if samples else 0.0
        if asked.temperature is not None:
            temperature = asked.temperature if asked.temperature >= LEAST_TEMPERATURE else 0.0
        top_p = asked.top_p if asked.top_p is not None else (own.top_p or 1.0) if samples else 1.0
        return {
            "max_tokens": min(given) if given else min(own.max_new_tokens or most, most),
            "stop": tuple(asked.stop),
            "temperature": temperature,
            "top_k": own.top_k if samples else None,
            "top_p": top_p,
            "stream": asked.stream,
        }

    def _count(self, question: str, history: Sequence[Turn]) -> int:
        """The prompt's tokens. A question that does not fit is refused here, by itself."""
        try:
            return len(self.processor(text=[question], history=[history])["input_ids"][0])
        except ValueError as error:
            raise ApiError(
                str(error).removeprefix("text 1: "), param="messages", code="context_length_exceeded"
            ) from error

    def _find(self, id: str) -> Pair:
        pair = self.pairs.get(id)
        if pair is None:
            raise ApiError(
                f"This pair is not known, or no longer: pairs are kept for {self.settings.keep_minutes} minutes. "
                "Send its images again.",
                404,
                param="pair_id",
                code="pair_not_found",
            )
        self.metrics.reused.inc()
        return pair

    async def _read(self, urls: Sequence[str]) -> Pair:
        """The pair of two URLs; of files that are known nothing is decoded."""
        files = [
            await self._in_thread(read_data_url, url, date)
            if url[:5].lower() == "data:"
            else await self.fetcher.fetch(url, date)
            for url, date in zip(urls, DATES, strict=True)
        ]
        id = await self._in_thread(self.pairs.name, files)
        pair = self.pairs.get(id)
        if pair is not None:
            self.metrics.reused.inc()
            return pair
        return self.pairs.keep(id, await self._in_thread(read_pixels, self.processor.image_processor, files))

    async def _in_thread(self, work: Callable, *arguments: Any) -> Any:
        return await anyio.to_thread.run_sync(work, *arguments, limiter=self.readers)


class _Stream(StreamingResponse):
    """Server-sent events; when they end, or nobody reads them any more, `end` is called."""

    def __init__(self, lines: AsyncIterator[str], end: Callable[[], None]):
        super().__init__(lines, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def _lines(replies: Replies, events: asyncio.Queue[tuple[int, Event]], asked: ChatRequest) -> AsyncIterator[str]:
    for index in range(asked.n):
        yield _line(replies.first(index))
    waiting = asked.n
    while waiting:
        index, event = await events.get()
        if isinstance(event, Exception):
            yield _line(as_api_error(event).body())
            return
        if event is None:
            yield _line(replies.last(index))
            waiting -= 1
        else:
            yield _line(replies.piece(index, event))
    if asked.stream_options.include_usage:
        yield _line(replies.usage_chunk())
    yield "data: [DONE]\n\n"


def _line(what: dict[str, Any]) -> str:
    return f"data: {json.dumps(what)}\n\n"


def _wrapped(seed: int) -> int:
    """Within the 64 bits that a generator takes."""
    return seed if seed < 2**63 else seed - 2**64
