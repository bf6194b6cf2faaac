"""
A server with many clients: how much faster than one request at a time, whether each has its own answer, and whether
memory stays as it is.

    python benchmarks/serve.py --output docs/benchmarks

writes `serve.json` and `serve.md` there. `deltavlm serve` runs in a process of its own. In each round one client asks
one request after another, as do all clients together, and `ask_pairs` in this process; figures are medians over
rounds. Every request carries both images. All answers are compared with those of `ask_pairs`.

Beside other work, times say little, even in turns: the server's own processor time is measured as well.
"""

import argparse
import base64
import io
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import torch
import transformers
from PIL import Image

from deltavlm_hf.data.questions import INSTRUCTIONS
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import ask_pairs
from deltavlm_hf.inference.loading import load_model

QUESTIONS = list(INSTRUCTIONS.values())
SECONDS = 600


def body_of(model: str, pair: Sequence[Image.Image], question: str) -> bytes:
    parts: list[dict[str, Any]] = []
    for image in pair:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    parts.append({"type": "text", "text": question})
    return json.dumps({"model": model, "messages": [{"role": "user", "content": parts}]}).encode()


class Load:
    """Requests in their order, again and again, and what came of them."""

    def __init__(self, address: str, bodies: list[bytes], expected: list[str]):
        self.address = address
        self.bodies = bodies
        self.expected = expected
        self.number = self.wrong = 0
        self.lock = threading.Lock()

    def metric(self, name: str) -> int:
        text = httpx.get(f"{self.address}/metrics", timeout=SECONDS).text
        return int(float(re.search(rf"^deltavlm_{name} (\S+)$", text, re.MULTILINE)[1]))  # type: ignore[index]

    def batches(self) -> int:
        return self.metric("batch_rows_count")

    def ask(self, requests: int, clients: int) -> tuple[float, list[float]]:
        """Answers per second, and the seconds that each took."""
        took: list[float] = []
        left = requests

        def client(_: int) -> None:
            nonlocal left
            with httpx.Client(base_url=self.address, timeout=SECONDS) as http:
                while True:
                    with self.lock:
                        if left == 0:
                            return
                        left -= 1
                        number = self.number % len(self.bodies)
                        self.number += 1
                    start = time.perf_counter()
                    reply = http.post(
                        "/v1/chat/completions",
                        content=self.bodies[number],
                        headers={"Content-Type": "application/json"},
                    )
                    spent = time.perf_counter() - start
                    right = (
                        reply.status_code == 200
                        and reply.json()["choices"][0]["message"]["content"] == self.expected[number]
                    )
                    with self.lock:
                        took.append(spent)
                        self.wrong += not right

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        return requests / (time.perf_counter() - start), took


def start(model: str, wait_ms: int) -> tuple[subprocess.Popen, str]:
    """The server and its address, once it has a model."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "deltavlm_hf", "serve", model, "--port", port, "--wait-ms", str(wait_ms)]
    server = subprocess.Popen(command)
    address = f"http://127.0.0.1:{port}"
    while True:
        if server.poll() is not None:
            sys.exit(server.returncode)
        with suppress(httpx.HTTPError):
            if httpx.get(f"{address}/health", timeout=SECONDS).status_code == 200:
                return server, address
        time.sleep(0.5)


def processor_time(process: int) -> float:
    """Seconds so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_of(process: int) -> float:
    """Resident, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]


def share(took: list[float], part: float) -> float:
    return sorted(took)[min(int(part * len(took)), len(took) - 1)]


def table(setting: dict[str, Any], found: dict[str, Any]) -> str:
    lines = ["# A server, measured", "", f"Written by `{setting['command']}`; ratios of ways that took turns.", ""]
    lines += [f"- {name}: {value}" for name, value in setting.items() if name != "command"]
    lines += [
        "",
        f"| {setting['clients']} clients at once | |",
        "|---|---|",
        f"| answers per second, times those of one request at a time (aim: 3) | {found['speed']:.2f} |",
        f"| answers in a second of the server's processor time, the same | {found['work']:.2f} |",
        f"| answers per second, times those of `ask_pairs` one at a time | {found['over ask_pairs']:.2f} |",
        f"| one request at a time, times as long as `ask_pairs` takes | {found['alone over ask_pairs']:.2f} |",
        f"| median time of an answer, times that of one alone | {found['p50']:.2f} |",
        f"| p95 time of an answer, times the median of one alone | {found['p95']:.2f} |",
        f"| answers in a batch, on average | {found['rows of a batch']:.1f} |",
        f"| requests | {found['requests']:,} |",
        f"| of these lost, or answered otherwise than by `ask_pairs` | {found['wrong']} |",
        f"| pairs encoded, of {found['pairs']} | {found['encoded']} |",
        f"| the server's memory after the last round, times that after the first | {found['memory']:.3f} |",
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=2000, help="of all clients together, over all rounds")
    parser.add_argument("--alone", type=int, default=40, help="requests one at a time, in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--side", type=int, default=256, help="pixels of an image")
    parser.add_argument("--wait-ms", type=int, default=10)
    parser.add_argument("--output", type=Path, help="folder for serve.json and serve.md")
    args = parser.parse_args()
    model, processor = load_model(args.model, "cpu")
    pairs = []
    for seed in range(args.pairs):
        scene = generate_scene(seed)
        images = (Image.fromarray(date).resize((args.side, args.side)) for date in (scene.before, scene.after))
        pairs.append(tuple(images))
    answers = list(ask_pairs(model, processor, pairs, QUESTIONS))
    asked = [(pair, question) for question in range(len(QUESTIONS)) for pair in range(len(pairs))]

    bodies = [body_of(args.model, pairs[pair], QUESTIONS[question]) for pair, question in asked]
    expected = [answers[pair][question] for pair, question in asked]
    server, address = start(args.model, args.wait_ms)
    try:
        load = Load(address, bodies, expected)
        rates: dict[str, list[float]] = {"one": [], "many": [], "here": []}
        spent: dict[str, list[float]] = {"one": [], "many": []}
        sizes: dict[str, list[float]] = {"one": [], "many": []}
        work: dict[str, list[float]] = {"one": [], "many": []}  # the server's, for an answer
        memory = []
        load.ask(2 * args.clients, args.clients)  # warm
        for number in range(args.rounds):
            for way, requests, clients in (
                ("one", args.alone, 1),
                ("many", args.requests // args.rounds, args.clients),
            ):
                before, worked = load.batches(), processor_time(server.pid)
                rate, took = load.ask(requests, clients)
                sizes[way].append(requests / (load.batches() - before))
                rates[way].append(rate)
                work[way].append((processor_time(server.pid) - worked) / requests)
                spent[way] += took
            began = time.perf_counter()
            for pair, question in asked[number * args.alone :][: args.alone]:
                list(ask_pairs(model, processor, [pairs[pair]], [QUESTIONS[question]]))
            rates["here"].append(args.alone / (time.perf_counter() - began))
            memory.append(memory_of(server.pid))
        encoded = load.metric("pairs_encoded_total")
    finally:
        server.terminate()
        server.wait()

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))

    alone = statistics.median(spent["one"])
    found = {
        "speed": ratio("many", "one"),
        "work": statistics.median(one / many for one, many in zip(work["one"], work["many"], strict=True)),
        "over ask_pairs": ratio("many", "here"),
        "alone over ask_pairs": ratio("here", "one"),
        "p50": statistics.median(spent["many"]) / alone,
        "p95": share(spent["many"], 0.95) / alone,
        "rows of a batch": statistics.median(sizes["many"]),
        "requests": load.number,
        "wrong": load.wrong,
        "pairs": len(pairs),
        "encoded": encoded,
        "memory": memory[-1] / memory[0],
    }
    setting = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, OMP_NUM_THREADS "
        f"{os.environ.get('OMP_NUM_THREADS', 'unset')}",
        "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
        "asked": f"{args.model}, {len(QUESTIONS)} questions about {args.pairs} pairs of {args.side} pixels a side",
        "clients": args.clients,
        "rounds": f"{args.rounds}, of {args.alone} requests one at a time and {args.requests // args.rounds} at once",
        "wait": f"{args.wait_ms} ms",
    }
    text = table(setting, found)
    if args.output is None:
        print(text)
        return
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "serve.json").write_text(json.dumps({**setting, "found": found}, indent=1) + "\n")
    (args.output / "serve.md").write_text(text)


if __name__ == "__main__":
    main()
