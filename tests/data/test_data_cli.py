"""`deltavlm data …`, as a user calls it."""

import json
import os
import subprocess
import sys

import pytest

from deltavlm_hf.cli import main


@pytest.fixture
def deltavlm(tmp_path):
    def run(*arguments) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-m", "deltavlm_hf", "data", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)

    return run


def test_build_check_show(deltavlm, changechat, tmp_path):
    images = changechat / "images"
    built = deltavlm("build", "--images", images, "--output", "out", "--min-area", 2, "--min-cell-area", 2)
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout)["records"] == {"binary": 4, "count": 4, "grid": 4, "dialogue": 4}

    checked = deltavlm("check", "out", "--images", images, "--json", "deep/report.json")
    assert (checked.returncode, checked.stdout.splitlines()[-1]) == (0, "No problems.")
    assert json.loads((tmp_path / "deep" / "report.json").read_text())["problems"] == []

    shown = deltavlm("show", "out", "--images", images, "--task", "grid", "--number", 3, "--output", "sheet.html")
    assert (shown.returncode, shown.stdout) == (0, "sheet.html: 3 records\n"), shown.stderr
    assert (tmp_path / "sheet.html").read_text().count("<article>") == 3

    again = deltavlm("build", "--images", images, "--output", "out")
    assert again.returncode == 1 and "changechat_train.json exists" in again.stderr
    assert deltavlm("build", "--images", images, "--output", "out", "--overwrite").returncode == 0


@pytest.fixture
def called(tmp_path, monkeypatch, capsys):
    """The same in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*arguments) -> tuple[int, str, str]:
        code = main(["data", *map(str, arguments)])
        return code, *capsys.readouterr()

    return call


def test_check_finds_what_is_wrong(called, changechat, tmp_path):
    (changechat / "images" / "train" / "A" / "train_000001.png").unlink()
    code, out, _ = called("check", changechat, "--json", "report.json")
    assert code == 1
    assert "missing image: 1\n  train/A/train_000001.png: no such file" in out
    assert json.loads((tmp_path / "report.json").read_text())["problems_by_kind"]["missing image"] == 1
    assert "missing image" not in called("check", changechat, "--no-images")[1]


def test_generated_scenes_are_shown(called, tmp_path):
    code, out, err = called("show", "--number", 7, "--seed", 4_000_000)
    assert (code, out) == (0, "records.html: 7 records\n"), err
    assert "scene_4000001-caption" in (tmp_path / "records.html").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["check", "no-such-folder"], "no-such-folder is neither a folder here nor"),
        (["show", "no-such-folder"], "no-such-folder is neither a folder here nor"),
        (["build", "--images", "none", "--output", "out"], "The folder none does not exist"),
        (["build", "--images", ".", "--output", "out", "--captions", "none.json"], "none.json"),
    ],
)
def test_errors_are_one_line(called, arguments, message):
    code, _, err = called(*arguments)
    assert code == 1 and message in err
    assert len(err.strip().splitlines()) == 1, err
