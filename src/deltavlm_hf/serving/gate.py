"""In front of the API: who may ask, how much may be sent at once, and what becomes of a client that leaves."""

import asyncio
import base64
import binascii
import secrets

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..app.bodies import SECONDS, again, drain
from .errors import ApiError
from .images import MAX_FILE
from .metrics import Metrics

MAX_BODY = 2 * MAX_FILE * 4 // 3 + (1 << 20)  # bytes: two images in base64, and text
MAX_BODIES = 512 << 20  # bytes of all requests that are here
MAX_REQUESTS = 512  # that are here
PAGE = "/page"
_OPEN = ("/", "/health", "/docs", "/openapi.json")  # without a key
_ASKS = "/v1/chat/completions"


class Gate:
    """
    Middleware (ASGI). A body is read here, whole and within bounds, before the API sees the request. When its client
    leaves, the request is cancelled, whatever it waits for. What is for the page needs the key as well; all else is
    seen to by its own guard.

    Args:
        app: the API.
        metrics ([`Metrics`]): what is counted.
        api_key (`str`, *optional*): what a client has to show.
        page (`bool`): whether there is a page, at [`PAGE`].
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, page: bool):
        self.app = app
        self.metrics = metrics
        self.api_key = api_key
        self.page = page
        self.requests = 0
        self.bytes = 0  # promised by all of them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        asks = scope["path"] == _ASKS
        of_page = self.page and f"{scope['path']}/".startswith(f"{PAGE}/")

        async def counting(message: Message) -> None:
            if asks and message["type"] == "http.response.start":
                self.metrics.requests.labels(message["status"]).inc()
            await send(message)

        try:
            self._check_key(scope, 'Basic realm="The password is the server\'s key"' if of_page else "Bearer")
            length = 0 if of_page else self._length(scope)
        except ApiError as error:
            await drain(receive, 2 * MAX_BODY)
            return await error.response()(scope, receive, counting)
        if of_page:
            return await self.app(scope, receive, send)
        self.requests += 1
        self.bytes += length
        try:
            await self._pass(scope, receive, counting)
        except ClientDisconnect:
            if asks:
                self.metrics.left.inc()
        finally:
            self.requests -= 1
            self.bytes -= length

    def _check_key(self, scope: Scope, challenge: str) -> None:
        """Programs give the key as it is; browsers ask for a name, which may be any, and a password."""
        if self.api_key is None or scope["path"] in _OPEN:
            return
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        key = key.strip()
        if scheme.lower() == b"basic":
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                key = b""
        elif scheme.lower() != b"bearer":
            key = b""
        if not secrets.compare_digest(key, self.api_key.encode()):
            raise ApiError(
                "Give the server's key: Authorization: Bearer KEY.", 401, code="invalid_api_key", challenge=challenge
            )

    def _length(self, scope: Scope) -> int:
        """The length of the body, if there is room for it."""
        headers = dict(scope["headers"])
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
            async with asyncio.timeout(SECONDS):
                body = await _read(receive)
        except TimeoutError:
            error = ApiError(f"The body did not come within {SECONDS} seconds.", 408)
            return await error.response()(scope, receive, send)
        answering = asyncio.ensure_future(self.app(scope, again(body, _nothing), send))
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


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    """What comes after a body; `_left` sees who leaves."""
    return await asyncio.Future()
