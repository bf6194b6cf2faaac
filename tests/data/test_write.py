"""Writing with a chat model, against a real HTTP server on this machine."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deltavlm_hf.cli import main
from deltavlm_hf.data import find_pairs, load_changechat, read_records
from deltavlm_hf.data.writing import Settings, describe, read_answer, write_dataset

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


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


@pytest.fixture
def pairs(tmp_path):
    """Four pairs with captions and masks; the last has no mask."""
    root = tmp_path / "levir"
    (root / "train" / "label").mkdir(parents=True)
    names = ["a", "b", "c", "d"]
    mask = np.zeros((60, 60), np.uint8)
    mask[2:12, 2:12] = 255
    for name in names[:3]:
        Image.fromarray(mask).save(root / "train" / "label" / f"{name}.png")
    captions = {f"{name}.png": [f"a house is built in scene {name}"] for name in names}
    (root / "captions.json").write_text(json.dumps(captions))
    return find_pairs(root, root / "captions.json")


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture
def write(endpoint, pairs, tmp_path):
    def write(folder: str = "out", *, max_tokens=None, tasks=("open", "dialogue"), again=False, **settings):
        return write_dataset(
            pairs,
            tmp_path / folder,
            Settings(**{"model": "m", "retries": 1, "timeout": 5, **settings}),
            base_url=endpoint.url,
            tasks=tasks,
            max_tokens=max_tokens,
            retry_set_aside=again,
        )

    return write


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.glob("*.json")}


def test_what_is_written_is_loaded(write, endpoint, pairs, tmp_path):
    summary = write()
    assert (summary.written, summary.requests, summary.tokens, summary.stopped_by) == (8, 8, 800, None)
    assert summary.records == {"open": 16, "dialogue": 4}
    records = list(read_records(tmp_path / "out" / "written_train_open.json"))
    assert (records[0].id, records[0].task, records[0].before) == ("a-open-0", "open", "train/A/a.png")
    assert records[0].turns == (("What of a, part 0?", "A road, 0."),) and records[0].changed
    images = tmp_path / "levir"
    for date in "AB":
        (images / "train" / date).mkdir()
        for pair in pairs:
            Image.new("RGB", (60, 60)).save(images / "train" / date / f"{pair.name}.png")
    rows = load_changechat(tmp_path / "out", images, split="train")
    assert Counter(rows["task"]) == {"open": 16, "dialogue": 4}
    body = endpoint.bodies[0]
    assert body["response_format"]["type"] == "json_schema" and body["authorization"] == f"Bearer {KEY}"


def test_what_the_model_is_told(pairs):
    notes = describe(pairs[0])
    assert "- a house is built in scene a" in notes
    assert "no new roads, 1 new building" in notes and "buildings: [top-left]" in notes
    assert "- building, top-left, 100 pixels, box (2, 2, 12, 12)" in notes
    assert describe(pairs[3]).splitlines() == [
        "Captions by people who saw both images:",
        "- a house is built in scene d",
    ]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Sure! Here are four questions.", "Invalid JSON"),
        ('{"turns": [{"question": "Why so?", "answer": "Yes."}', "Invalid JSON"),
        ("[]", "Input should be an object"),
        ('{"turns": [{"question": "Why so?"}]}', "turns.0.answer: Field required"),
        ('{"turns": [{"question": "Why so?", "answer": "  "}]}', "turns.0.answer: String should have at least 1"),
        ('{"turns": [{"question": "Why so?", "answer": 3}]}', "turns.0.answer: Input should be a valid string"),
        (json.dumps({"turns": [{"question": "Why so?", "answer": "x" * 601}]}), "at most 600 characters"),
        (conversation(3, "x"), "3 turns, expected 4"),
        (conversation(4, "x").replace("part 1", "PART 0"), "a question comes twice"),
    ],
)
def test_bad_answers_are_known(text, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        read_answer(text, "open", Settings("m"))


def test_the_example_is_no_answer():
    text = '{"turns": [{"question": "How many new houses are there?", "answer": "Three."}]}'
    with pytest.raises(ValueError, match="a turn is copied from the example"):
        read_answer(text, "open", Settings("m", questions=1))


def test_good_answers():
    expected = tuple((f"What of x, part {index}?", f"A road, {index}.") for index in range(4))
    for text in (conversation(4, "x"), f"```json\n{conversation(4, 'x')}\n```", f"\n```\n{conversation(4, 'x')}```\n"):
        assert read_answer(text, "open", Settings("m")) == expected
    assert len(read_answer(conversation(2, "x"), "dialogue", Settings("m"))) == 2
    with pytest.raises(ValueError, match="6 turns, expected 2 to 5"):
        read_answer(conversation(6, "x"), "dialogue", Settings("m"))


def test_garbage_is_asked_again_then_set_aside(write, endpoint, tmp_path):
    def script(body, number):
        if body["about"] == "a" and number < 3:
            return "I think that"
        return "no idea" if (body["about"], body["task"]) == ("b", "open") else None

    endpoint.script = script
    summary = write()
    assert (summary.written, summary.requests, summary.tokens) == (7, 8 + 2 + 2 + 2, 1400)
    ((aside),) = summary.set_aside
    assert (aside["pair"], aside["task"]) == ("b", "open") and "Invalid JSON" in aside["reason"]
    _, kept = lines(tmp_path / "out" / "written_train_set_aside.jsonl")
    assert kept == {**aside, "answer": "no idea", "tokens": 300, "notes": kept["notes"]}

    summary = write()  # what was set aside is not paid for again
    assert (summary.requests, summary.resumed) == (0, 8)
    endpoint.script = lambda body, number: None
    summary = write(again=True)
    assert (summary.requests, summary.written, summary.records["open"]) == (1, 1, 16)


@pytest.mark.parametrize("status, headers", [(429, {"Retry-After": "0.2"}), (500, {}), (503, {})])
def test_passing_faults_are_waited_for(write, endpoint, status, headers):
    endpoint.script = lambda body, number: (status, headers, '{"error": {"message": "busy"}}') if number == 1 else None
    summary = write(tasks=["open"])
    assert (summary.written, summary.failed, summary.requests) == (4, [], 4)
    assert set(endpoint.asked.values()) == {2}


def test_an_endpoint_that_does_not_recover(write, endpoint, tmp_path):
    endpoint.script = lambda body, number: (500, {}, '{"error": {"message": "out of memory"}}')
    summary = write(retries=0, concurrency=1)
    assert summary.stopped_by == "failures"
    assert len(summary.failed) == 5 and summary.left == 3
    assert "out of memory" in summary.failed[0]["reason"]
    endpoint.script = lambda body, number: None
    assert write().written == 8  # failures are no answers: they are asked again
    assert lines(tmp_path / "out" / "written_train_set_aside.jsonl")[1:] == []


def test_time_outs(write, endpoint):
    def script(body, number):
        if body["about"] == "c":
            time.sleep(0.8)

    endpoint.script = script
    summary = write(tasks=["open"], timeout=0.3, retries=0)
    assert summary.written == 3
    ((failed),) = summary.failed
    assert failed["pair"] == "c" and failed["reason"].startswith("APITimeoutError")


def test_a_page_in_place_of_json(write, endpoint):
    endpoint.script = lambda body, number: (200, {"Content-Type": "text/html"}, "<h1>Welcome</h1>")
    summary = write(tasks=["open"], attempts=1)
    assert len(summary.set_aside) + len(summary.failed) == 4 and summary.written == 0


@pytest.mark.parametrize(
    "odd",
    [
        completion("", choices=[{"index": 0, "message": None}]),
        completion("", choices=[{"index": 0}]),
        completion("", choices=[]),
        completion("", choices=[{"index": 0, "message": {"content": [{"type": "text", "text": "x"}]}}]),
        completion("half of a pair: \ud83d"),
        "[]",
        "null",
        "",
        b'{"choices": "\xff"}',
    ],
)
def test_odd_replies_do_not_cost_the_others(write, endpoint, odd):
    endpoint.script = lambda body, number: (200, {}, odd) if body["about"] == "a" else None
    summary = write(tasks=["open"], retries=0)
    assert (summary.written, summary.records["open"], summary.stopped_by) == (3, 12, None)
    assert [entry["pair"] for entry in summary.set_aside + summary.failed] == ["a"]


@pytest.mark.parametrize("status, hint", [(400, True), (422, True), (409, False)])
def test_a_refused_schema_is_told(write, endpoint, status, hint):
    endpoint.script = lambda body, number: (status, {}, '{"error": {"message": "unsupported field"}}')
    summary = write(tasks=["open"], retries=0)
    assert ["turn `json_schema` off" in entry["reason"] for entry in summary.failed] == [hint] * 4
    summary = write(tasks=["open"], retries=0, json_schema=False)
    assert not any("json_schema" in entry["reason"] for entry in summary.failed)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_the_run(write, endpoint, tmp_path, status):
    message = f"Incorrect key in Authorization: Bearer {KEY}"
    endpoint.script = lambda body, number: (status, {}, json.dumps({"error": {"message": message}}))
    with pytest.raises(
        ConnectionError, match="The endpoint refused to answer: .*Check the key in OPENAI_API_KEY"
    ) as error:
        write(concurrency=1)
    assert KEY not in str(error.value)
    assert sum(endpoint.asked.values()) <= 2


def test_the_key_is_kept_nowhere(write, endpoint, tmp_path):
    def script(body, number):
        if body["about"] == "a":
            return f"Authorization: Bearer {KEY}"
        if body["about"] == "b":
            return 500, {}, json.dumps({"error": {"message": f"bad {KEY}"}})
        return conversation(4, f"{KEY} and {body['about']}") if body["about"] == "c" else None

    endpoint.script = script
    summary = write(tasks=["open"], retries=0)
    assert len(summary.set_aside) == len(summary.failed) == 1 and summary.written == 2
    assert KEY not in repr(summary)
    files = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(files) >= 3
    for path in files:
        assert KEY not in path.read_text()


def test_the_key_is_found_in_escapes(write, endpoint, tmp_path):
    escaped = f"\\u{ord(KEY[0]):04x}{KEY[1:]}"
    endpoint.script = lambda body, number: conversation(4, body["about"]).replace("A road", f"A road {escaped}")
    assert write(tasks=["open"]).written == 4
    (record, *_) = read_records(tmp_path / "out" / "written_train_open.json")
    assert record.turns[0][1] == "A road ***, 0."
    for path in (tmp_path / "out").iterdir():
        assert KEY not in path.read_text()


class TestCredentialsInTheUrl:
    USER, PASSWORD, TOKEN = "me", "pa:ss/w@rd", "t0k&n"
    SECRETS = (PASSWORD, "pa%3Ass%2Fw%40rd", TOKEN, "t0k%26n", "bWU6cGE6c3Mvd0ByZA==")

    @pytest.fixture
    def url(self, endpoint) -> str:
        host = endpoint.url.removeprefix("http://")
        return f"http://me:pa%3Ass%2Fw%40rd@{host}?api_key=t0k%26n&api-version=2024-02"

    def is_kept_secret(self, text: str) -> bool:
        return not any(secret in text for secret in self.SECRETS)

    def test_they_are_sent_and_kept_nowhere(self, url, endpoint, pairs, tmp_path):
        def script(body, number):
            seen = f"{body['path']} with {body['authorization']}, {self.PASSWORD} and {self.TOKEN} of {url}"
            if body["about"] == "a":
                return seen
            if body["about"] == "b":
                return 500, {}, json.dumps({"error": {"message": seen}})
            return conversation(4, f"{self.PASSWORD} and {body['about']}") if body["about"] == "c" else None

        endpoint.script = script
        settings = Settings("m", retries=0)
        summary = write_dataset(pairs, tmp_path / "out", settings, base_url=url, tasks=["open"])
        for body in endpoint.bodies:
            assert body["authorization"] == "Basic bWU6cGE6c3Mvd0ByZA=="
            assert body["path"] == "/v1/chat/completions?api_key=t0k%26n&api-version=2024-02"
        assert len(summary.set_aside) == len(summary.failed) == 1 and summary.written == 2
        assert "/v1/chat/completions" in summary.failed[0]["reason"] and "2024-02" in summary.failed[0]["reason"]
        kept = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
        assert "*** and c" in kept and self.is_kept_secret(kept + repr(summary))

    @pytest.mark.parametrize("status", [401, 404])
    def test_a_refusal(self, url, status, endpoint, pairs, tmp_path, monkeypatch, capsys):
        endpoint.script = lambda body, number: (status, {}, json.dumps({"error": {"message": f"no {url} here"}}))
        levir = tmp_path / "levir"
        places = [
            "--images",
            str(levir),
            "--captions",
            str(levir / "captions.json"),
            "--output",
            str(tmp_path / "out"),
        ]
        command = ["data", "write", *places, "--model", "m"]
        assert main([*command, "--base-url", url]) == 1
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        assert main(command) == 1
        said = capsys.readouterr()
        assert self.is_kept_secret(said.out + said.err)
        assert said.err.count(f"the endpoint {endpoint.url}/ and the model 'm'") == 2

    @pytest.mark.parametrize(
        "url, shown",
        [
            ("me:secret@localhost/v1", "***@localhost/v1"),
            ("ftp://me:secret@localhost/v1?key=secret", "ftp://***@localhost/v1?***"),
            ("http://me:se/secret@localhost/v1", "http://***@localhost/v1"),
            ("http://me:secret@[::1/v1", "http://***@[::1/v1"),
            ("http://me:secret@localhost:port/v1", "http://***@localhost:port/v1"),
            ("http://me:secret@local\nhost/v1#secret", "http://***@local\nhost/v1?***"),
            ("http://me:secret@/v1", "http://***@/v1"),
        ],
    )
    def test_what_is_no_url(self, url, shown, pairs, tmp_path):
        with pytest.raises(ValueError) as error:
            write_dataset(pairs, tmp_path, Settings("m"), base_url=url)
        assert repr(shown) in str(error.value) and "secret" not in str(error.value)

    def test_nobody_is_there(self, pairs, tmp_path):
        url = "http://me:secret@127.0.0.1:1/v1?key=secret"
        summary = write_dataset(pairs, tmp_path, Settings("m", retries=0), base_url=url)
        assert summary.stopped_by == "failures" and "secret" not in repr(summary)


@pytest.mark.parametrize("key", ["x", "road", "EMPTY"])
def test_a_stand_in_for_a_key_changes_no_words(write, endpoint, tmp_path, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    text = "A box on bearer beams by the road, EMPTY now"
    endpoint.script = lambda body, number: conversation(4, body["about"]).replace("A road", text)
    assert write(tasks=["open"]).written == 4
    (record, *_) = read_records(tmp_path / "out" / "written_train_open.json")
    assert record.turns[0][1] == f"{text}, 0."


def test_the_budget_stops_the_run(write, endpoint):
    summary = write(max_tokens=250, concurrency=1)
    assert (summary.stopped_by, summary.requests, summary.tokens, summary.left) == ("budget", 3, 300, 5)
    assert (summary.written, summary.failed) == (3, [])
    summary = write(max_tokens=500, concurrency=1)
    assert (summary.stopped_by, summary.written, summary.resumed) == (None, 5, 3)


def test_bad_answers_are_not_asked_again_when_the_budget_is_spent(write, endpoint, tmp_path):
    endpoint.script = lambda body, number: "garbage"
    summary = write(max_tokens=150, concurrency=1, attempts=5)
    assert (summary.stopped_by, summary.requests, summary.tokens) == ("budget", 2, 200)
    assert (summary.set_aside, summary.failed, summary.left) == ([], [], 8)
    summary = write("other", max_tokens=150, concurrency=4, attempts=5)
    assert summary.stopped_by == "budget" and summary.requests <= 5  # four under way, and one before they came in
    endpoint.script = lambda body, number: None
    assert write(attempts=5).written == 8


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": None}])
def test_tokens_are_estimated_where_they_are_not_counted(write, endpoint, usage):
    endpoint.script = lambda body, number: (200, {}, completion(conversation(4, body["about"]), usage=usage))
    summary = write(tasks=["open"])
    said = sum(sum(len(message["content"]) for message in body["messages"]) for body in endpoint.bodies)
    assert summary.tokens == pytest.approx((said + 4 * len(conversation(4, "a"))) / 4, abs=4)


def test_no_more_requests_at_once_than_allowed(write, endpoint):
    endpoint.delay = 0.1
    write(concurrency=3)
    assert endpoint.busiest == 3


def test_no_key_is_needed_where_an_endpoint_is_named(write, endpoint, pairs, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert write(tasks=["open"], json_schema=False).written == 4
    assert "response_format" not in endpoint.bodies[0]
    with pytest.raises(ValueError, match="Set the environment variable OPENAI_API_KEY"):
        write_dataset(pairs, tmp_path / "none", Settings("m"))


SCRIPT = """
import sys
from deltavlm_hf.cli import main
sys.exit(main(sys.argv[1:]))
"""


def command(endpoint, tmp_path, folder: str) -> list[str]:
    levir = tmp_path / "levir"
    places = ["--images", str(levir), "--captions", str(levir / "captions.json"), "--output", str(tmp_path / folder)]
    options = ["--model", "m", "--base-url", endpoint.url, "--concurrency", "2"]
    return [sys.executable, "-c", SCRIPT, "data", "write", *places, *options]


def test_a_killed_run_goes_on(endpoint, pairs, tmp_path):
    whole = subprocess.run(command(endpoint, tmp_path, "whole"), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert json.loads(whole.stdout)["written"] == 8
    endpoint.asked.clear()
    endpoint.delay = 0.2
    killed = subprocess.Popen(command(endpoint, tmp_path, "killed"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    journal = tmp_path / "killed" / "written_train_written.jsonl"
    deadline = time.time() + 60
    while time.time() < deadline and not (journal.exists() and len(journal.read_bytes().splitlines()) >= 4):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    finished = {(entry["pair"], entry["task"]) for entry in lines(journal)[1:]}
    assert 3 <= len(finished) < 8
    with journal.open("a") as file:
        file.write('{"pair": "d", "ta')  # as if killed within a write
    endpoint.delay = 0.0
    resumed = subprocess.run(command(endpoint, tmp_path, "killed"), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    summary = json.loads(resumed.stdout)
    assert (summary["resumed"], summary["written"]) == (len(finished), 8 - len(finished))
    assert all(endpoint.asked[job] == 1 for job in finished)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_kill_costs_at_most_what_was_under_way(endpoint, write, tmp_path):
    """Kills at many moments: what is finished is never paid for again, and of the rest no more than is said."""
    kills, concurrency, attempts = 8, 3, 2
    endpoint.delay = 0.05
    endpoint.script = lambda body, number: "no JSON" if number % 2 and body["about"] in "ab" else None
    journal = tmp_path / "out" / "written_train_written.jsonl"
    random = np.random.default_rng(0)
    paid_when_finished: dict[tuple[str, str], int] = {}
    for _ in range(kills):
        process = os.fork()
        if not process:
            write(concurrency=concurrency, attempts=attempts)
            os._exit(0)
        time.sleep(random.uniform(0, 0.25))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        time.sleep(0.2)  # until the endpoint has counted what was under way
        for entry in lines(journal)[1:] if journal.exists() else []:
            paid_when_finished.setdefault((entry["pair"], entry["task"]), endpoint.asked[entry["pair"], entry["task"]])
    assert write(concurrency=concurrency, attempts=attempts).resumed == len(paid_when_finished)
    assert all(endpoint.asked[job] == paid for job, paid in paid_when_finished.items())
    needed = 4 + 4 * attempts
    assert needed <= sum(endpoint.asked.values()) <= needed + kills * concurrency * attempts


def test_an_interrupted_run_keeps_what_is_under_way(endpoint, pairs, tmp_path):
    endpoint.delay = 0.5
    process = subprocess.Popen(
        command(endpoint, tmp_path, "out"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's `&` has it ignored
    )
    deadline = time.time() + 60
    while time.time() < deadline and sum(endpoint.asked.values()) < 2:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    summary = json.loads(output)
    assert (process.returncode, summary["stopped_by"]) == (130, "interrupt")
    assert summary["written"] == sum(endpoint.asked.values()) == 8 - summary["left"]


def test_progress_of_other_settings_is_not_mixed_in(write, tmp_path):
    write(tasks=["open"])
    with pytest.raises(ValueError, match="was made with .*'model': 'm'.*go on with the same settings"):
        write(tasks=["open"], model="other")
    journal = tmp_path / "out" / "written_train_written.jsonl"
    journal.write_text(journal.read_text().replace('{"pair": "a"', '{"pai'))
    with pytest.raises(ValueError, match="written_train_written.jsonl, line .*, is damaged"):
        write(tasks=["open"])


def test_what_is_paid_for_is_kept_when_the_run_is_refused(write, endpoint, tmp_path):
    def script(body, number):
        if body["about"] == "b":
            time.sleep(0.2)
            return 401, {}, json.dumps({"error": {"message": "no credit"}})
        time.sleep(0.6)

    endpoint.script = script
    with pytest.raises(ConnectionError, match="no credit"):
        write(tasks=["open"], concurrency=3)
    assert {entry["pair"] for entry in lines(tmp_path / "out" / "written_train_written.jsonl")[1:]} == {"a", "c"}
    assert len(list(read_records(tmp_path / "out" / "written_train_open.json"))) == 8


def test_broken_masks_are_told_before_anything_is_asked(write, endpoint, pairs):
    whole = pairs[1].mask.read_bytes()
    pairs[1].mask.write_bytes(whole[:50])  # its head is whole
    with pytest.raises(ValueError, match="Cannot read the mask .*b.png"):
        write()
    assert not endpoint.asked


def test_a_pair_whose_notes_changed_is_asked_again(write, endpoint, pairs, tmp_path):
    write(tasks=["open", "open"])
    assert set(endpoint.asked.values()) == {1}
    mask = np.zeros((60, 60), np.uint8)
    mask[30:50] = 128
    Image.fromarray(mask).save(pairs[0].mask)
    assert (write(tasks=["open"]).resumed, endpoint.asked["a", "open"]) == (3, 2)
    assert len(list(read_records(tmp_path / "out" / "written_train_open.json"))) == 16


def test_an_endpoint_that_is_not_there(pairs, tmp_path, monkeypatch):
    summary = write_dataset(pairs, tmp_path, Settings("m", retries=0), base_url="http://127.0.0.1:1/v1")
    assert summary.stopped_by == "failures" and "Connection refused" in summary.failed[0]["reason"]
    with pytest.raises(ValueError, match="must begin with http:// or https://, got 'localhost:1'"):
        write_dataset(pairs, tmp_path, Settings("m"), base_url="localhost:1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk–dash")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has characters that no key has"):
        write_dataset(pairs, tmp_path, Settings("m"), base_url="http://127.0.0.1:1/v1")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"questions": 0}, "`questions` must be at least 1, got 0"),
        ({"turns": 1}, "`turns` must be at least 2, got 1"),
        ({"timeout": 0}, "`timeout` must be above 0"),
        ({"tasks": ["grid"]}, "a chat model can write are open, dialogue; got grid"),
    ],
)
def test_wrong_settings(write, wrong, message):
    with pytest.raises(ValueError, match=message):
        write(**wrong)


def test_without_the_package_openai(tmp_path):
    code = "import sys; sys.modules['openai'] = None; import deltavlm_hf.data.writing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert 'pip install "deltavlm-hf[llm]"' in done.stderr


@pytest.fixture(scope="module")
def smollm(smollm_folder, tmp_path_factory):
    """A real language model behind `transformers serve`: the URL of the endpoint and the model's name."""
    folder = tmp_path_factory.mktemp("smollm")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [str(Path(sys.executable).parent / "transformers"), "serve", str(smollm_folder), "--device", "cpu"]
    with (folder / "serve.log").open("w") as log:
        server = subprocess.Popen([*serve, "--host", "127.0.0.1", "--port", str(port)], stdout=log, stderr=log)
    try:
        for _ in range(240):
            assert server.poll() is None, (folder / "serve.log").read_text()
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", str(smollm_folder)
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_a_real_language_model(smollm, pairs, tmp_path):
    """Its prose is poor, most of it is set aside; every pair is accounted for all the same, also after a kill."""
    url, model = smollm
    levir = tmp_path / "levir"
    places = ["--images", str(levir), "--captions", str(levir / "captions.json"), "--output", str(tmp_path / "out")]
    options = ["--model", model, "--base-url", url, "--concurrency", "1", "--questions", "1", "--turns", "2"]
    limits = ["--attempts", "2", "--max-answer-tokens", "60", "--no-json-schema"]
    command = [sys.executable, "-m", "deltavlm_hf", "data", "write", *places, *options, *limits]

    def accounted() -> list[tuple[str, str]]:
        files = (tmp_path / "out" / f"written_train_{kind}.jsonl" for kind in ("written", "set_aside"))
        return [(entry["pair"], entry["task"]) for file in files if file.exists() for entry in lines(file)[1:]]

    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.time() + 240
    while time.time() < deadline and killed.poll() is None and len(accounted()) < 2:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    _, stderr = killed.communicate()
    before = accounted()
    assert 2 <= len(before) < 8, stderr

    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["resumed"] == len(before) and summary["failed"] == []
    assert summary["written"] + len(summary["set_aside"]) == 8 - len(before)
    assert summary["tokens"] > summary["requests"] * 100  # as the server counts them: prompts alone are longer
    assert sorted(accounted()) == sorted((pair.name, task) for pair in pairs for task in ("open", "dialogue"))
    for task, number in summary["records"].items():
        suffix = {"open": "open", "dialogue": "dialog"}[task]
        records = list(read_records(tmp_path / "out" / f"written_train_{suffix}.json"))
        assert len(records) == number
