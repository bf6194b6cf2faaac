"""Runs of writing with a chat model, whole, stopped and killed, against a real HTTP server on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from local_endpoint import KEY, lines
from PIL import Image

from deltavlm_hf.data import load_changechat, read_records


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


def test_no_more_requests_at_once_than_allowed(write, endpoint):
    endpoint.delay = 0.1
    write(concurrency=3)
    assert endpoint.busiest == 3


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
