"""`deltavlm predict`: many pairs by one command, killed, in two processes, with images that are none."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import csv, parquet

from deltavlm_hf import ask_pairs, tiny
from deltavlm_hf.cli import main
from deltavlm_hf.data.questions import FOLLOW_UPS, INSTRUCTIONS
from deltavlm_hf.data.scenes import generate_scene
from deltavlm_hf.inference import answer
from deltavlm_hf.inference.results import columns_of

SEED = 4_600_005  # beyond all that the shipped model was trained or tested on
QUESTIONS = ["binary", "count", "grid", "How many buildings were built?"]
ASKED = [INSTRUCTIONS[task] for task in QUESTIONS[:3]] + QUESTIONS[3:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five generated pairs, in A and B."""
    folder = tmp_path_factory.mktemp("scenes")
    for number in range(5):
        scene = generate_scene(SEED + number)
        for date, image in (("A", scene.before), ("B", scene.after)):
            (folder / date).mkdir(exist_ok=True)
            Image.fromarray(image).save(folder / date / f"{number}.png")
    return folder


def command(pairs: Path, output: Path, *options, questions=QUESTIONS) -> list[str]:
    fixed = ["--model", "tiny", "--device", "cpu", "--workers", "0"]
    return list(map(str, ["predict", pairs, "--questions", *questions, "--output", output, *fixed, *options]))


def rows_of(output: Path) -> list[dict]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(command(folder, output)) == 0
    assert list(output.parent.iterdir()) == [output]
    return output


def test_answers_are_those_of_ask_pairs(whole, folder, tiny_model, tiny_processor):
    pairs = [[folder / date / f"{number}.png" for date in "AB"] for number in range(5)]
    expected = list(ask_pairs(tiny_model, tiny_processor, pairs, ASKED))
    rows = rows_of(whole)
    assert [row["answer"] for row in rows] == [text for answers in expected for text in answers]
    assert [row["question"] for row in rows] == ASKED * 5
    assert [(row["name"], row["before"]) for row in rows[::4]] == [(str(n), f"A/{n}.png") for n in range(5)]
    assert {(row["model"], row["error"]) for row in rows} == {("tiny", None)} and len(rows[0]["commit"]) == 16
    binary, count, grid, free = zip(*(rows[start : start + 4] for start in range(0, 20, 4)), strict=True)
    assert {row["changed"] for row in binary} == {True, False}
    assert all(row["answer"].startswith("yes" if row["changed"] else "no") for row in binary)
    assert any(row["buildings"] for row in count) and all(row["roads"] is not None for row in count)
    assert any(row["building_cells"] for row in grid) and {row["task"] for row in free} == {"open"}


def test_every_form_of_output_has_the_same_rows(whole, folder, tmp_path):
    for suffix in ("csv", "parquet", "jsonl"):
        assert main(command(folder, tmp_path / f"answers.{suffix}")) == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == whole.read_bytes()  # twice the same bytes
    table = parquet.read_table(tmp_path / "answers.parquet")
    assert table.to_pylist() == rows_of(whole)
    assert [table.schema.field(name).type for name in columns_of().names] == columns_of().types
    types = {name: pa.string() for name in table.column_names}
    read = csv.read_csv(
        tmp_path / "answers.csv",
        convert_options=csv.ConvertOptions(
            column_types=types | {name: columns_of().field(name).type for name in ("changed", "roads", "buildings")},
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    ).to_pylist()
    for row in read:
        for name in ("road_cells", "building_cells"):
            row[name] = None if row[name] is None else json.loads(row[name])
    assert read == rows_of(whole)


def test_a_table_with_columns_of_its_own_and_the_fixed_dialogue(folder, tmp_path, tiny_model, tiny_processor):
    date = [{"year": 2020, "month": None}]
    rows = [{"before": "A/1.png", "id": "007", "after": "B/1.png", "dates": date}] * 2
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "questions.txt").write_text("\nWhat changed?\ndialogue\nWhat changed?\n")
    options = ["--output", str(tmp_path / "a.jsonl"), "--model", "tiny", "--limit", "1", "--workers", "0"]
    file = str(tmp_path / "questions.txt")
    assert main(["predict", str(folder / "pairs.jsonl"), "--questions-file", file, *options]) == 0
    found = rows_of(tmp_path / "a.jsonl")
    assert [row["task"] for row in found] == ["caption", *["dialogue"] * 3]
    assert all(row.items() >= rows[0].items() for row in found)
    history: list = []
    for row, turn in zip(found[1:], (INSTRUCTIONS["binary"], *FOLLOW_UPS), strict=True):
        images = [(folder / "A" / "1.png", folder / "B" / "1.png")]
        assert (row["question"], [row["answer"]]) == (
            turn,
            answer(tiny_model, tiny_processor, [turn], [history], images),
        )
        history.append((turn, row["answer"]))
    assert isinstance(found[1]["changed"], bool) and isinstance(found[2]["buildings"], int)


def test_a_broken_image_costs_its_own_rows(whole, folder, tmp_path, capsys):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "B" / "2.png").write_bytes(b"no image")
    output, journal = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.journal"
    assert main(command(broken, output, "--batch-size", 2)) == 1
    assert "1 of them have no answers, the column `error` says why" in capsys.readouterr().err
    rows, expected = rows_of(output), rows_of(whole)
    assert rows[:8] + rows[12:] == expected[:8] + expected[12:]
    assert all(row["error"].startswith("ValueError: after image: cannot read ") for row in rows[8:12])
    assert all(row["answer"] is row["changed"] is row["road_cells"] is None for row in rows[8:12])

    kept = (journal / "answers.jsonl").read_text().splitlines()
    assert main(command(broken, output)) == 1  # asks this one again
    added = (journal / "answers.jsonl").read_text().splitlines()[len(kept) :]
    assert [json.loads(line)["index"] for line in added] == [2]
    shutil.copy(folder / "B" / "2.png", broken / "B" / "2.png")
    assert main(command(broken, output)) == 0
    assert output.read_bytes() == whole.read_bytes() and not journal.exists()
    (broken / "B" / "2.png").unlink()
    (broken / "B" / "2.png").mkdir()
    table = broken / "pairs.csv"
    table.write_text("before,after\n" + "".join(f"A/{number}.png,B/{number}.png\n" for number in range(5)))
    assert main(command(table, output, "--keep-going")) == 0
    assert sum(row["error"] is not None for row in rows_of(output)) == 4 and not journal.exists()


@pytest.fixture(scope="module")
def many(folder) -> Path:
    """Thirty pairs, one of which cannot be read."""
    path = folder / "many.csv"
    lines = [f"A/{number % 5}.png,B/{number % 5 if number != 20 else 'gone'}.png,{number}" for number in range(30)]
    path.write_text("\n".join(["before,after,number", *lines, ""]))
    return path


@pytest.fixture(scope="module")
def many_answers(many, tmp_path_factory) -> bytes:
    output = tmp_path_factory.mktemp("many") / "answers.parquet"
    assert main(command(many, output, "--batch-size", 2)) == 1
    return output.read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on(many, many_answers, tmp_path):
    output = tmp_path / "answers.parquet"
    run = [sys.executable, "-m", "deltavlm_hf", *command(many, output, "--batch-size", 2, "--workers", 1)]
    journal = tmp_path / "answers.parquet.journal" / "answers.jsonl"
    killed = subprocess.Popen(run, stderr=subprocess.DEVNULL)
    deadline = time.time() + 120
    while time.time() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 4):
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = journal.read_bytes()
    assert 4 < before.count(b"\n") < 31 and not output.exists()
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 1 and "pairs were answered by an earlier run" in done.stderr, done.stderr
    assert journal.read_bytes().startswith(before[: before.rfind(b"\n") + 1])
    indices = [json.loads(line)["index"] for line in journal.read_text().splitlines()[1:]]
    assert sorted(indices) == list(range(30))  # none was asked twice
    assert output.read_bytes() == many_answers


@pytest.mark.slow
def test_two_processes_write_what_one_does(many, many_answers, tmp_path):
    output = tmp_path / "answers.parquet"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    options = ["-m", "deltavlm_hf", *command(many, output, "--batch-size", 2, "--workers", 1)]
    done = subprocess.run([*launch, *options], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("1 of them have no answers") == 1, done.stderr
    assert output.read_bytes() == many_answers


def test_another_run_is_refused(whole, folder, tmp_path, capsys):
    """Where a journal is: with other questions, pairs or settings; never a finished file."""
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "A" / "4.png").write_bytes(b"")
    output = tmp_path / "answers.jsonl"
    assert main(command(broken, output, questions=["binary"])) == 1
    before = output.read_bytes()
    model = shutil.copytree(tiny(), tmp_path / "model")
    capsys.readouterr()
    for options in ({"questions": ["count"]}, {"limit": 3}, {"max-new-tokens": 5}, {"model": model}):
        given = [part for name, value in options.items() if name != "questions" for part in (f"--{name}", value)]
        questions = options.get("questions", ["binary"])
        assert main(command(broken, output, *given, questions=questions)) == 1
        said = capsys.readouterr().err
        assert "answers.jsonl was made with {" in said and "go on with the same settings or choose another" in said
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("pairs", "questions", "output", "message"),
    [
        ("gone", ["binary"], "a.csv", "gone does not exist; expected a table"),
        (".", ["binary"], "a.txt", "a.txt: expected a name that ends with .jsonl, .csv, .parquet"),
        (".", ["open"], "a.csv", "The task `open` has no fixed question"),
        (".", [""], "a.csv", "A question is empty"),
        (".", [INSTRUCTIONS["caption"] * 3000], "a.csv", "tokens, but only"),
        ("own.csv", ["binary"], "a.csv", "has the columns answer, changed, which answers have too"),
        ("own.jsonl", ["binary"], "own.jsonl", "own.jsonl is the table of pairs itself"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_asked(pairs, questions, output, message, folder, tmp_path, capsys):
    data = Path(shutil.copytree(folder, tmp_path / "data"))
    (data / "own.csv").write_text("before,after,answer,changed\nA/1.png,B/1.png,no,true\n")
    (data / "own.jsonl").write_text('{"before": "A/1.png", "after": "B/1.png"}\n')
    there = sorted(data.rglob("*"))
    assert main(command(data / pairs, data / output, questions=questions)) == 1
    said = capsys.readouterr().err
    (error,) = [line for line in said.splitlines() if line.startswith("deltavlm: error: ")]
    assert message in error
    assert sorted(data.rglob("*")) == there
