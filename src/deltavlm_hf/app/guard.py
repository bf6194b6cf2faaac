"""
In front of the page: what a visitor may reach, how much of it at once, and for how long anything of them is kept.

gradio offers ways in that the page does not need, some of which do work outside its queue (functions called directly,
addresses fetched for a visitor, recordings cut with ffmpeg) or keep what was said (links to a conversation). Here only
the page's own routes are open, every one that runs a function goes through the queue, and each visitor has bounds.
"""

import asyncio
import atexit
import json
import logging
import os
import re
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio.to_thread
from gradio_client.utils import strip_invalid_filename_characters
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from ..inference import ChangeSession
from .bodies import again, drain

logger = logging.getLogger(__name__)

MAX_FILE = 32 << 20  # bytes of one upload
MAX_BODY = 1 << 20  # bytes of any other request
MAX_WAITING = 64  # jobs in the queue
MAX_WAITING_OF_ADDRESS = 48  # waiting and running; visitors behind one router share an address
MAX_WAITING_OF_SESSION = 8  # as many as the page has buttons that ask
MAX_REQUESTS_OF_ADDRESS = 512  # open at once; a page that is looked at holds one or two
MAX_STORED = 4 << 30  # bytes of uploads that are kept at a time
MAX_STORED_OF_ADDRESS = 1 << 30
LEAST_STORED = 1 << 19  # what an upload counts at least, so that the number of small ones is bounded as well
MAX_SESSIONS = 200  # visitors that are remembered; the one unseen for longest is forgotten for another

SWEEP_SECONDS = 15  # how often is looked for what can go
FILE_SECONDS = 180  # that a file is kept, unless a visitor who is there or a waiting job needs it
LEAVE_SECONDS = 180  # that a visitor is remembered after closing the page, or after a call by program
IDLE_SECONDS = 1800  # that a visitor is remembered who leaves the page open and does nothing
DEAD_SECONDS = 3600  # after which a folder that no server has touched is one of a server that was killed

_TEMP = Path(os.environ.get("GRADIO_TEMP_DIR") or Path(tempfile.gettempdir()) / "gradio")
_PREFIX = "deltavlm-page-"
_API = "/gradio_api"
_FILE = f"{_API}/file="
_READ = re.compile(
    r"/|/(config|logout)/?|/(theme\.css|favicon\.ico|robots\.txt|manifest\.json)|/(assets|static|svelte)/.+"
    rf"|{_API}/((info|app_id|login_check)/?|openapi\.json|theme\.css|startup-events|queue/(data|status))"
    rf"|{_API}/(heartbeat/[\w-]{{1,64}}|call/(v2/)?ask/[\w-]{{1,64}}|file=.+)"
)
_JOIN = re.compile(rf"{_API}/(queue/join|call/(v2/)?ask)/?")
_POST = re.compile(rf"/login/?|{_API}/(upload|reset/?)|{_JOIN.pattern}")


def exit_on_sigterm() -> None:
    """Has the process end by itself when it is told to, so that the visitors' files are cleared."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def make_folder() -> Path:
    """
    A folder for all files of the page and its visitors, known to gradio as `GRADIO_TEMP_DIR`, so that nothing else
    is served and all of it can be cleared. One page per process: gradio reads the environment again and again.
    """
    _TEMP.mkdir(parents=True, exist_ok=True)
    for old in _TEMP.glob(_PREFIX + "*"):
        with suppress(FileNotFoundError):  # another server, starting, was faster
            if time.time() - old.lstat().st_mtime > DEAD_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_TEMP)).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    return folder


@dataclass
class Visit:
    """What is known of one visitor: the images, and, when there are both, the conversation about them."""

    files: list[str]  # as uploaded
    session: ChangeSession | None = None
    about: dict[str, Any] = field(default_factory=dict)  # what the page is told of the pair
    turns: list[dict[str, Any]] = field(default_factory=list)  # as the page shows them
    note: str = ""  # what is to be known of answers about these images
    seed: int | None = None  # of a generated pair
    large: bool = False  # whether its middle can be scanned
    stop: threading.Event = field(default_factory=threading.Event)


class Guard:
    """
    Stands around gradio's app (ASGI), wherever that is mounted.

    An address is the one that uvicorn tells: that of the connection, or, from a proxy that `FORWARDED_ALLOW_IPS`
    trusts, the last one in `X-Forwarded-For` that is no such proxy.

    Args:
        page (`gradio.Blocks`): what is served.
    """

    def __init__(self, page: Any):
        self.page = page
        self.requests: Counter[str] = Counter()  # open ones, of each address
        self.joining: list[tuple[str, str | None]] = []  # address and session of jobs on their way into the queue
        self.stored: deque[tuple[float, str, int]] = deque()  # when, address and bytes of the latest uploads
        self.looking: Counter[str] = Counter()  # sessions whose page is open
        self.folder = Path(os.environ["GRADIO_TEMP_DIR"])
        self.own = {str(path) for path in self.folder.rglob("*")}  # the examples

    def around(self, app: ASGIApp) -> ASGIApp:
        """As a middleware of gradio's app."""
        self.app = app
        return self

    @asynccontextmanager
    async def running(self, app: Any) -> AsyncIterator[None]:
        """As long as the server runs: the lifespan of gradio's app."""
        sweeping = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeping.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        address = _address(scope)
        if self.requests[address] >= MAX_REQUESTS_OF_ADDRESS:
            return await _refuse(429, "Too many requests at once from this address.")(scope, receive, send)
        self.requests[address] += 1
        try:
            await self._pass(address, scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            self.requests[address] -= 1
            if not self.requests[address]:
                del self.requests[address]

    async def _pass(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], _path(scope)
        if path == f"{_API}/upload_progress":  # of uploads that gradio takes; the page asks for it all the same
            return await Response(b'data: {"msg": "done"}\n\n', media_type="text/event-stream")(scope, receive, send)
        if method in ("GET", "HEAD") and _READ.fullmatch(path):
            if path.startswith(_FILE):
                file = Path(os.path.normpath(path.removeprefix(_FILE)))
                if not file.is_relative_to(self.folder):  # gradio would fetch addresses, and serve other folders
                    return await _refuse(403, "Only files of this page are served.")(scope, receive, send)
                if not file.is_file():
                    return await _refuse(404, "This file is no longer here.")(scope, receive, send)
            if path.startswith(f"{_API}/heartbeat/"):
                await self._look(path.rpartition("/")[2], scope, receive, send)
            else:
                await self.app(scope, receive, send)
        elif method == "POST" and _POST.fullmatch(path):
            await self._post(address, scope, receive, send)
        else:
            await _refuse(404, "There is nothing here. Programs ask through the queue: see gradio_client.")(
                scope, receive, send
            )

    async def _post(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if not length.isdigit() or b"transfer-encoding" in headers:  # which would be of any length
            return await _refuse(411, "Say how long the request is (Content-Length).")(scope, receive, send)
        path = _path(scope)
        upload = path == f"{_API}/upload"
        most = MAX_FILE if upload else MAX_BODY
        if int(length) > most + (1 << 16):  # form and field names
            await drain(receive, 2 * most)
            return await _refuse(413, f"At most {most >> 20} MB are taken.")(scope, receive, send)
        if upload:
            await (await self._upload(address, int(length), Request(scope, receive)))(scope, receive, send)
        elif _JOIN.fullmatch(path):
            await self._join(address, scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _upload(self, address: str, length: int, request: Request) -> Response:
        """In place of gradio's own route, which takes a thousand files at once and leaves what breaks off."""
        now = time.monotonic()
        while self.stored and now - self.stored[0][0] > FILE_SECONDS + SWEEP_SECONDS:
            self.stored.popleft()
        counted = max(length, LEAST_STORED)
        of_address = counted + sum(size for _, who, size in self.stored if who == address)
        if of_address > MAX_STORED_OF_ADDRESS or counted + sum(size for _, _, size in self.stored) > MAX_STORED:
            await drain(request.receive, length)
            return _refuse(429, "Busy: many images have been uploaded just now. Try again in a few minutes.")
        self.stored.append((now, address, counted))
        try:
            async with request.form(max_files=2, max_fields=2) as form:
                files = [file for file in form.getlist("files") if isinstance(file, UploadFile)]
                if not files:
                    return _refuse(400, "Send a file, as the field `files` of a form.")
                return JSONResponse([await anyio.to_thread.run_sync(_store, file, self.folder) for file in files])
        except HTTPException as error:  # what starlette makes of a malformed form
            return _refuse(error.status_code, error.detail)

    async def _join(self, address: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A job for the queue, if this visitor has not too many there."""
        body = await Request(scope, receive).body()
        try:
            job = json.loads(body)
        except (ValueError, RecursionError):
            job = None
        session = job.get("session_hash") if isinstance(job, dict) else None
        if not isinstance(job, dict) or not (session is None or isinstance(session, str) and 0 < len(session) <= 64):
            return await _refuse(400, "This is no call of a function.")(scope, receive, send)
        waiting = [*self.joining]
        waiting += [(_address(event.request.scope), event.session_hash) for event in self._events()]
        if sum(who == address for who, _ in waiting) >= MAX_WAITING_OF_ADDRESS or (
            session is not None and sum(whose == session for _, whose in waiting) >= MAX_WAITING_OF_SESSION
        ):
            text = "Busy: many of your questions wait already. Ask again when some have been answered."
            return await _refuse(429, text)(scope, receive, send)
        if _path(scope).startswith(f"{_API}/queue/"):
            if type(job.get("fn_index")) is not int or job["fn_index"] not in self.page.fns:
                return await _refuse(404, "There is no such function.")(scope, receive, send)
            # The rest of what gradio would take reaches into its own objects (batches, events, tokens).
            job = {key: job[key] for key in ("data", "fn_index", "session_hash") if key in job}
            body = json.dumps(job).encode()
        self.joining.append((address, session))
        try:
            await self.app(_of_length(scope, body), again(body, receive), send)
        finally:
            self.joining.remove((address, session))

    def _events(self) -> list[Any]:
        """gradio's jobs, waiting and running."""
        return list(self.page._queue.event_ids_to_events.values())

    async def _look(self, session: str, scope: Scope, receive: Receive, send: Send) -> None:
        """A page holds this request open as long as it is open itself."""
        self.looking[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.looking[session] -= 1
            if not self.looking[session]:
                del self.looking[session]
            if session in self.page.state_holder:
                self.page.state_holder.time_last_used[session] = datetime.now()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                await anyio.to_thread.run_sync(_clear, self.folder, self._forget() | self.own)
            except Exception:  # the next round tries again
                logger.exception("What visitors left behind could not be cleared")

    def _forget(self) -> set[str]:
        """Forgets who is gone; gives the files that are still needed."""
        holder, queue = self.page.state_holder, self.page._queue
        needed: set[str] = set()
        working: set[str] = set()
        for event in self._events():
            working.add(event.session_hash)
            needed.update(str(item.get("path")) for item in event.data.data if isinstance(item, dict))
        now = datetime.now()
        for session in {*holder.session_data, *queue.pending_messages_per_session, *queue.pending_event_ids_session}:
            unseen = (now - holder.time_last_used.get(session, datetime.min)).total_seconds()
            if session not in working and unseen > (IDLE_SECONDS if session in self.looking else LEAVE_SECONDS):
                for kept in (
                    holder.session_data,
                    holder.time_last_used,
                    queue.pending_messages_per_session,
                    queue.pending_event_ids_session,
                    self.page.pending_streams,
                    self.page.pending_diff_streams,
                ):
                    kept.pop(session, None)
        for files in self.page.temp_file_sets:  # gradio's notes of what `delete_cache` would clear
            files.clear()
        visits = [value for state in holder.session_data.values() for value in state.state_data.values()]
        return needed.union(*(visit.files for visit in visits if isinstance(visit, Visit)))


def _clear(folder: Path, needed: set[str]) -> None:
    os.utime(folder)  # its server lives
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        try:
            if str(path) not in needed and time.time() - path.lstat().st_ctime > FILE_SECONDS:
                path.rmdir() if path.is_dir() else path.unlink()
        except OSError:  # a folder that is not empty, a file that is gone
            pass


def _store(file: UploadFile, folder: Path) -> str:
    """The path of an upload, which nobody can guess."""
    name = strip_invalid_filename_characters(Path(file.filename or "").name).lstrip(".") or "image"
    path = folder / secrets.token_hex(16) / name
    path.parent.mkdir()
    with open(path, "wb") as target:
        shutil.copyfileobj(file.file, target)
    return str(path)


def _address(scope: Scope) -> str:
    return scope["client"][0] if scope["client"] else ""


def _path(scope: Scope) -> str:
    """Within gradio's app."""
    path, above = scope["path"], scope.get("root_path", "")
    return path.removeprefix(above) if path.startswith(f"{above}/") else path


def _refuse(status: int, text: str) -> Response:
    return JSONResponse({"detail": text}, status_code=status)


def _of_length(scope: Scope, body: bytes) -> Scope:
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}
