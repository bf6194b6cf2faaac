"""An endpoint that fails, refuses, is slow or not there; and secrets, which are kept and said nowhere."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from local_endpoint import KEY, completion, conversation, lines

from deltavlm_hf.cli import main
from deltavlm_hf.data import read_records
from deltavlm_hf.data.writing import Settings, write_dataset


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


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 70, "completion_tokens": 30, "total_tokens": None}])
def test_tokens_are_estimated_where_they_are_not_counted(write, endpoint, usage):
    endpoint.script = lambda body, number: (200, {}, completion(conversation(4, body["about"]), usage=usage))
    summary = write(tasks=["open"])
    said = sum(sum(len(message["content"]) for message in body["messages"]) for body in endpoint.bodies)
    assert summary.tokens == pytest.approx((said + 4 * len(conversation(4, "a"))) / 4, abs=4)


def test_no_key_is_needed_where_an_endpoint_is_named(write, endpoint, pairs, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert write(tasks=["open"], json_schema=False).written == 4
    assert "response_format" not in endpoint.bodies[0]
    with pytest.raises(ValueError, match="Set the environment variable OPENAI_API_KEY"):
        write_dataset(pairs, tmp_path / "none", Settings("m"))


def test_an_endpoint_that_is_not_there(pairs, tmp_path, monkeypatch):
    summary = write_dataset(pairs, tmp_path, Settings("m", retries=0), base_url="http://127.0.0.1:1/v1")
    assert summary.stopped_by == "failures" and "Connection refused" in summary.failed[0]["reason"]
    with pytest.raises(ValueError, match="must begin with http:// or https://, got 'localhost:1'"):
        write_dataset(pairs, tmp_path, Settings("m"), base_url="localhost:1")
    monkeypatch.setenv("OPENAI_API_KEY", "sk–dash")
    with pytest.raises(ValueError, match="OPENAI_API_KEY has characters that no key has"):
        write_dataset(pairs, tmp_path, Settings("m"), base_url="http://127.0.0.1:1/v1")


def test_without_the_package_openai(tmp_path):
    code = "import sys; sys.modules['openai'] = None; import deltavlm_hf.data.writing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ})
    assert 'pip install "deltavlm-hf[llm]", or in a checkout pip install -e ".[llm]"' in done.stderr


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
    limits = ["--attempts", "1", "--max-answer-tokens", "40", "--no-json-schema"]
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
