"""A visitor of the page, wherever that is served."""

import json
import uuid
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

SECONDS = 300  # for slow machines; time never fails a test before


class Visitor:
    """Speaks to the page as its own script does; `gradio_client` would not do what is tried here."""

    def __init__(self, url: str, address: str = "203.0.113.1", **options):
        self.session = uuid.uuid4().hex
        # The proxy of a server is trusted when it runs on the same machine.
        # The server closes connections after 5 idle seconds; by default httpx may still use them in that moment.
        self.http = httpx.Client(
            base_url=url,
            timeout=SECONDS,
            headers={"X-Forwarded-For": address},
            limits=httpx.Limits(keepalive_expiry=2),
            **options,
        )
        functions = self.http.get("config").raise_for_status().json()["dependencies"]
        self.numbers = {function["api_name"]: function["id"] for function in functions}

    def upload(self, data: bytes | Path, name: str = "image.png") -> dict:
        data = data.read_bytes() if isinstance(data, Path) else data
        sent = self.http.post("gradio_api/upload", files={"files": (name, data)})
        assert sent.status_code == 200, sent.text
        return {"path": sent.json()[0], "meta": {"_type": "gradio.FileData"}}

    def join(self, function: str, data: list, **more) -> httpx.Response:
        call = {"data": data, "fn_index": self.numbers[function], "session_hash": self.session, **more}
        return self.http.post("gradio_api/queue/join", json=call)

    def run(self, function: str, data: list, told: Callable[[], None] = lambda: None, **more) -> dict:
        """What comes last; an error has the key `error`. `told` is called once it is waited for."""
        joined = self.join(function, data, **more)
        assert joined.status_code == 200, joined.text
        with self.http.stream("GET", "gradio_api/queue/data", params={"session_hash": self.session}) as stream:
            told()
            for line in stream.iter_lines():
                message = json.loads(line.removeprefix("data:") or "{}")
                if message.get("event_id") == joined.json()["event_id"] and message["msg"] == "process_completed":
                    return message["output"]
        raise AssertionError("The stream ended before the answer.")

    @contextmanager
    def page_open(self):
        with self.http.stream("GET", f"gradio_api/heartbeat/{self.session}") as stream:
            beats = stream.iter_bytes()
            next(beats)
            yield

    def file(self, upload: dict) -> int:
        for _ in range(3):
            # A file that is deleted between the server's look and its reading costs the connection, not an answer.
            with suppress(httpx.ReadError, httpx.RemoteProtocolError):
                return self.http.get(f"gradio_api/file={upload['path']}").status_code
        raise AssertionError("The server closed three connections without an answer.")
