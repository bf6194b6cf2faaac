"""Bodies of requests, for what stands in front of an application (ASGI)."""

import asyncio
from contextlib import suppress

from starlette.types import Message, Receive

SECONDS = 60  # for sending a body


async def drain(receive: Receive, most: int) -> None:
    """Reads what is not wanted, up to so many bytes: a client that still writes would not see the reply."""
    with suppress(TimeoutError):
        async with asyncio.timeout(SECONDS):
            while most > 0:
                message = await receive()
                most -= len(message.get("body", b""))
                if not message.get("more_body"):
                    return


def again(body: bytes, then: Receive) -> Receive:
    """What has been read, to be read once more; after that, what `then` receives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        return messages.pop() if messages else await then()

    return receive
