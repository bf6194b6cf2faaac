"""An OpenAI-shaped endpoint on this machine: a real HTTP server."""

import json
import re
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

KEY = "sk-very-secret-0123456789"


def conversation(number: int, about: str) -> str:
    turns = [{"question": f"What of {about}, part {index}?", "answer": f"A road, {index}."} for index in range(number)]
    return json.dumps({"turns": turns})


class Endpoint:
    """
    An OpenAI-shaped server that answers well, or as `script(body, number)` says: a text, or a status with headers and
    a body. `asked` counts requests by what they are about.
    """

    def __init__(self):
        self.script = lambda body, number: None
        self.asked: Counter[tuple[str, str]] = Counter()
        self.bodies: list[dict] = []
        self.busy = self.busiest = 0
        self.delay = 0.0
        self.lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                notes = body["messages"][-1]["content"]
                about = re.search(r"scene (\w+)", notes)[1]
                task = "open" if "stand alone" in notes else "dialogue"
                with endpoint.lock:
                    endpoint.busy += 1
                    endpoint.busiest = max(endpoint.busiest, endpoint.busy)
                    endpoint.asked[about, task] += 1
                    number = endpoint.asked[about, task]
                    sent = {"authorization": self.headers.get("Authorization"), "path": self.path}
                    endpoint.bodies.append({**body, **sent})
                time.sleep(endpoint.delay)
                answer = endpoint.script({**body, **sent, "about": about, "task": task}, number)
                if answer is None:
                    answer = conversation(4 if task == "open" else 3, about)
                with endpoint.lock:
                    endpoint.busy -= 1
                try:
                    self.reply(*(answer if isinstance(answer, tuple) else (200, {}, completion(answer))))
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has gone: it timed out or was killed

            def reply(self, status: int, headers: dict, content: str | bytes) -> None:
                data = content if isinstance(content, bytes) else content.encode()
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def completion(text: str, **changes) -> str:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
    content = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    usage = {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": 100}
    return json.dumps({**content, "usage": usage, **changes})


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
