"""What decodes behind `--llm-url`: vLLM, from an environment of its own, or a server that speaks as vLLM does."""

import base64
import io
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

PYTHON = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
SECONDS = 600  # for slow machines; time never fails a test before


class Server(ThreadingHTTPServer):
    """
    A language model of a folder by Transformers, in the form of vLLM's completions.

    Attributes:
        takes_embeddings (`bool`): as with `--enable-prompt-embeds`.
        key (`str`, *optional*): what clients have to show.
        breaks_after (`int`, *optional*): tokens after which a stream is cut.
    """

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = str(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.lock = threading.Lock()
        self.takes_embeddings, self.key, self.breaks_after = True, None, None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def answer(self, asked: dict, prompt: torch.Tensor) -> list[int]:
        options = {"do_sample": False}
        if asked["temperature"]:
            options = {"do_sample": True, "temperature": asked["temperature"], "top_p": asked["top_p"]}
            options["top_k"] = asked["top_k"] or None
        with self.lock, torch.inference_mode():
            if "seed" in asked:
                torch.manual_seed(asked["seed"])
            return self.model.generate(
                inputs_embeds=prompt[None],
                max_new_tokens=asked["max_tokens"],
                min_new_tokens=asked["min_tokens"],
                repetition_penalty=asked["repetition_penalty"],
                eos_token_id=asked["stop_token_ids"] or None,
                sequence_bias={(int(token),): float(bias) for token, bias in asked["logit_bias"].items()} or None,
                suppress_tokens=None,
                **options,
            )[0].tolist()


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        card = {"id": self.server.folder, "object": "model", "root": self.server.folder}
        known = self.path == "/v1/models"
        self._send(200 if known else 404, {"object": "list", "data": [card]} if known else {"detail": "Not Found"})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            self._send(401, {"error": "Unauthorized"})
            return
        if not self.server.takes_embeddings:
            self._refuse("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
            return
        files = [io.BytesIO(base64.b64decode(prompt, validate=True)) for prompt in asked["prompt_embeds"]]
        prompts = [torch.load(file, weights_only=True) for file in files]
        size = self.server.model.config.hidden_size
        if found := {prompt.shape[1] for prompt in prompts} - {size}:
            self._refuse(f"`prompt_embeds` hidden_size {found.pop()} does not match the model's hidden_size {size}.")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.end_headers()
        defaults = {"min_tokens": 0, "repetition_penalty": 1.0, "stop_token_ids": [], "logit_bias": {}}
        asked = defaults | asked
        for index, prompt in enumerate(prompts):
            ids = self.server.answer(asked, prompt)
            for number, token in enumerate(ids):
                if number == self.server.breaks_after:
                    return
                reason = "stop" if token in asked["stop_token_ids"] else "length"
                choice = {"index": index, "text": "", "token_ids": [token]}
                choice["finish_reason"] = reason if number == len(ids) - 1 else None
                self._event(json.dumps({"object": "text_completion", "choices": [choice]}))
        self._event("[DONE]")

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())

    def _refuse(self, message: str) -> None:
        self._send(400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})

    def _send(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def transformers_server(folder) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join(SECONDS)


@contextmanager
def vllm_server(folder, *options: str) -> Iterator[str]:
    """vLLM itself; its URL."""
    if not PYTHON.exists():
        pytest.skip("there is no .venv-vllm: make test-vllm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--dtype", "float32"]
    command += ["--enable-prompt-embeds", "--enforce-eager", "--host", "127.0.0.1", "--port", str(port), *options]
    given = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = Path(folder).with_name("vllm.log")
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**given, "VLLM_CPU_KVCACHE_SPACE": "1"})
    try:
        end = time.monotonic() + SECONDS
        while True:
            assert process.poll() is None and time.monotonic() < end, log.read_text()[-5000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(SECONDS)
