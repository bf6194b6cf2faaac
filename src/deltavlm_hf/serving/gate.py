"""In front of the API: who may ask, how much may be sent at once, and what becomes of a client that leaves."""

import asyncio
import secrets
from contextlib import suppress

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .images import MAX_FILE
from .metrics import Metrics

MAX_BODY = 2 * MAX_FILE * 4 // 3 + (1 << 20)  # bytes: two images in base64, and text
MAX_BODIES = 512 << 20  # bytes of all requests that are here
MAX_REQUESTS = 512  # that are here
BODY_SECONDS = 60  # for sending a body
_OPEN = ("/health", "/docs", "/openapi.json")  # without a key
_ASKS = "/v1/chat/completions"


class Gate:
    """
    Middleware (ASGI). A body is read here, whole and within bounds, before the API sees the request. When its client
    leaves, the request is cancelled, whatever it waits for.

    Args:
        app: the API.
        metrics ([`Metrics`]): what is counted.
        api_key (`str`, *optional*): what a client has to show.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None):
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.requests = 0
        self.bytes = 0  # promised by all of them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asks = scope["path"] == _ASKS

        async def counting(message: Message) -> None:
            if asks and message["type"] == "http.response.start":
                self.metrics.requests.add(value=str(message["status"]))
            await send(message)

        try:
            length = self._check(scope)
        except ApiError as error:
            await _drain(receive)
            return await error.response()(scope, receive, counting)
        self.requests += 1
        self.bytes += length
        try:
            await self._pass(scope, receive, counting)
        except ClientDisconnect:
            if asks:
                self.metrics.left.add()
        finally:
            self.requests -= 1
            self.bytes -= length

    def _check(self, scope: Scope) -> int:
        """The length of the body, if the request may come in."""
        headers = dict(scope["headers"])
        if self.api_key is not None and scope["path"] not in _OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self.api_key.encode()):
                raise ApiError("Give the server's key: Authorization: Bearer KEY.", 401, code="invalid_api_key")
        length = 0
        if scope["method"] not in ("GET", "HEAD"):
            said = headers.get(b"content-length", b"")
            if not said.isdigit() or b"transfer-encoding" in headers:
                raise ApiError("Say how long the request is (Content-Length).", 411)
            length = int(said)
            if length > MAX_BODY:
                raise ApiError(f"A request has at most {MAX_BODY >> 20} MB.", 413, code="request_too_large")
            if self.requests >= MAX_REQUESTS or self.bytes + length > MAX_BODIES:
                raise ApiError("Busy: much is being sent. Try again in a moment.", 429, code="busy", retry_after=1)
        return length

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnect if the client leaves before the reply is whole."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive)
        except TimeoutError:
            error = ApiError(f"The body did not come within {BODY_SECONDS} seconds.", 408)
            return await error.response()(scope, receive, send)
        answering = asyncio.ensure_future(self.app(scope, _again(body), send))
        del body
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:  # also where this request is cancelled itself, at a shutdown that lasts too long
            leaving.cancel()
            if not answering.done():
                answering.cancel()
        try:
            await answering
        except asyncio.CancelledError:
            raise ClientDisconnect from None


async def _read(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


async def _drain(receive: Receive) -> None:
    """Reads what is not wanted, within bounds: a client that still writes would not see the reply."""
    with suppress(TimeoutError):
        async with asyncio.timeout(BODY_SECONDS):
            left = 2 * MAX_BODY
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _again(body: bytes) -> Receive:
    """What has been read, to be read once more; after that, nothing comes."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop()

    return again
