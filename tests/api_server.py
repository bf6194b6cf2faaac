"""The API, served in this process or by the command, and what is sent to it."""

import base64
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import uvicorn
from PIL import Image

from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.serving import Settings, listen, make_app

SECONDS = 120  # for slow machines; time never fails a test before


@contextmanager
def serving(model, processor, **settings) -> Iterator[str]:
    """Served by a thread of this process; its address."""
    listening = listen("127.0.0.1", 0)
    app = make_app(model, processor, Settings("tiny", **settings))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(SECONDS)
        listening.close()
    assert not thread.is_alive()


@contextmanager
def command(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen, str]]:
    """Served by `deltavlm serve tiny`: the process and its address."""
    command = [sys.executable, "-m", "deltavlm_hf", "serve", "tiny", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    said = []
    try:
        while not said or not (found := re.search(r"http://\S+:\d+", said[-1])):
            said.append(process.stderr.readline())
            assert said[-1], "".join(said)
        yield process, found[0]
    finally:
        process.kill()
        process.communicate()


def until(there) -> None:
    end = time.monotonic() + SECONDS
    while not there():
        assert time.monotonic() < end
        time.sleep(0.01)


def make_pair(seed: int) -> tuple[np.ndarray, np.ndarray]:
    scene = generate_scene(4_900_000 + seed, 96)
    return scene.before, scene.after


def as_file(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(file: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(file).decode()}"


def image_part(file: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(file)}}


def ask_about(files, question: str, *turns: tuple[str, str]) -> list[dict]:
    """Messages: a question about images, which stand before the first turn."""
    texts = [text for turn in turns for text in turn] + [question]
    messages = [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]
    messages[0]["content"] = [*map(image_part, files), {"type": "text", "text": texts[0]}]
    return messages
