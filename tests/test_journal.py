"""Journals: whole lines only, whatever is killed, and however many processes write."""

import json
import multiprocessing
import os
import signal

import pytest

from deltavlm_hf.journal import Journal

MADE_WITH = {"shape": [145, 128], "text": "ü" * 5000}  # longer than one write of a buffered file
PROCESSES, FILES, ENTRIES = 4, 15, 3


def write(folder, number, barrier):
    for file in range(FILES):
        barrier.wait()
        journal = Journal(folder / f"{file}.jsonl", MADE_WITH, ("name",))
        for entry in range(ENTRIES):
            journal.append({"name": f"{number}-{entry}", "text": "ü" * 5000})


def test_many_processes_open_and_write_at_once(tmp_path):
    fork = multiprocessing.get_context("fork")
    barrier = fork.Barrier(PROCESSES)
    processes = [fork.Process(target=write, args=(tmp_path, number, barrier)) for number in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    expected = {(f"{number}-{entry}",) for number in range(PROCESSES) for entry in range(ENTRIES)}
    for file in range(FILES):
        lines = (tmp_path / f"{file}.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(lines[0]) == MADE_WITH and len(lines) == 1 + len(expected)
        assert Journal(tmp_path / f"{file}.jsonl", MADE_WITH, ("name",)).entries.keys() == expected


def test_one_goes_on_where_another_was_killed_within_a_line(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = Journal(path, {}, ("name",))
    journal.append({"name": "one"})

    def die():
        with path.open("ab") as file:
            file.write(b'{"name": "tw')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL and path.read_text().endswith('"tw')
    journal.append({"name": "three"})
    assert list(Journal(path, {}, ("name",)).entries) == [("one",), ("three",)]


@pytest.mark.parametrize("rest", ["", '{"shape"'])
def test_killed_before_its_first_line_was_whole(tmp_path, rest):
    path = tmp_path / "journal.jsonl"
    path.write_text(rest)
    Journal(path, {"shape": 1}, ("name",)).append({"name": "one"})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"shape": 1}, {"name": "one"}]


def test_another_journal_or_a_damaged_one_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Journal(path, {"seed": 1}, ("name",)).append({"name": "one"})
    with pytest.raises(ValueError, match="was made with {'seed': 1}, not {'seed': 2}"):
        Journal(path, {"seed": 2}, ("name",))
    path.write_text(path.read_text().replace("one", 'o"ne'))
    with pytest.raises(ValueError, match="line 2, is damaged"):
        Journal(path, {"seed": 1}, ("name",))
