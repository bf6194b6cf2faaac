"""A client's images: from `image_url` to the model's pixels, within bounds, before anything is decoded."""

import asyncio
import base64
import binascii
import re
from collections.abc import Sequence

import httpx
import numpy as np

from ..inference.asking import pair_pixels
from ..processing import DeltaVLMImageProcessor
from ..processing.reading import READING_ERRORS, image_size, why_unreadable
from .errors import ApiError

DATES = ("before", "after")
MAX_FILE = 16 << 20  # bytes of one image
MAX_PIXELS = 25_000_000  # of one image
FETCH_SECONDS = 20

_DATA = re.compile(r"data:[\w.+/-]{0,100}(;[\w.+=-]{1,100}){0,4};base64,", re.IGNORECASE)


def read_data_url(url: str, date: str) -> bytes:
    """
    The file in a `data:` URL.

    Raises:
        ApiError: if it is not of that form, or too large.
    """
    head = _DATA.match(url)
    if head is None:
        raise ApiError(f"{date}: expected data:image/png;base64,... got {url[:40]!r}.", param="messages")
    if len(url) - head.end() > MAX_FILE * 4 // 3 + 4:
        raise too_large(date)
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(f"{date}: the image is no base64 ({error}).", param="messages") from error


class Fetcher:
    """
    Fetches images from hosts that are allowed, and from no other: redirects are not followed.

    Args:
        hosts (`Sequence[str]`): names, with `:port` where it is not the scheme's own.
    """

    def __init__(self, hosts: Sequence[str]):
        self.hosts = {host.lower() for host in hosts}
        self.client = httpx.AsyncClient(follow_redirects=False, timeout=FETCH_SECONDS, trust_env=False)

    async def fetch(self, url: str, date: str) -> bytes:
        """
        The file behind a URL.

        Raises:
            ApiError: if its host is not allowed, or it cannot be fetched within bounds.
        """
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL as error:
            raise ApiError(f"{date}: {url[:40]!r} is no URL.", param="messages") from error
        if parsed.scheme not in ("http", "https") or parsed.netloc.decode().lower() not in self.hosts:
            raise ApiError(
                f"{date}: nothing is fetched from {url[:60]!r}; send the image as data:image/png;base64,...",
                param="messages",
                code="url_not_allowed",
            )
        content = bytearray()
        try:
            async with asyncio.timeout(FETCH_SECONDS), self.client.stream("GET", parsed) as response:
                if response.status_code != 200:
                    raise ApiError(f"{date}: the image's host answered {response.status_code}.", param="messages")
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > MAX_FILE:
                        raise too_large(date)
        except (httpx.HTTPError, TimeoutError) as error:
            raise ApiError(
                f"{date}: the image could not be fetched ({type(error).__name__}).", param="messages"
            ) from error
        return bytes(content)


def read_pixels(image_processor: DeltaVLMImageProcessor, files: Sequence[bytes]) -> np.ndarray:
    """
    The pixels `(1, 2, 3, H, W)` of two files.

    Raises:
        ApiError: if one cannot be read, or its header promises too many pixels.
    """
    for date, file in zip(DATES, files, strict=True):
        if len(file) > MAX_FILE:
            raise too_large(date)
        try:
            width, height = image_size(file)
        except READING_ERRORS as error:
            raise _unreadable(date, error) from error
        if width * height > MAX_PIXELS:
            raise ApiError(
                f"{date}: {width} x {height} pixels; at most {MAX_PIXELS:,} in all are taken.",
                param="messages",
                code="image_too_large",
            )
    try:
        return pair_pixels(image_processor, tuple(files))
    except READING_ERRORS as error:
        date = "after" if str(error).startswith("pair 1, after") else "before"
        raise _unreadable(date, error) from error


def too_large(date: str) -> ApiError:
    return ApiError(
        f"{date}: an image has at most {MAX_FILE >> 20} MB.", 413, param="messages", code="image_too_large"
    )


def _unreadable(date: str, error: Exception) -> ApiError:
    return ApiError(f"{date}: {why_unreadable(error)}.", param="messages", code="invalid_image")
