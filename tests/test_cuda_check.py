"""
The check of a CUDA card, where there is none: that it says so, that its code runs at small size on the CPU, and that
it loses nothing when a check fails, hangs or dies.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import cuda_check
import pytest
import torch

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "cuda_check.py"

# A worker that does by a check's name what checks of its kind do; in all else it is as `cuda_worker.py`.
WORKER = """
import argparse, json, os, signal, sys, time
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("names", nargs="+")
parser.add_argument("--folder")
parser.add_argument("--events", type=Path)
parser.add_argument("--rehearse")
args = parser.parse_args()

def emit(event):
    with args.events.open("a") as file:
        file.write(json.dumps(event) + "\\n")

BEHAVIOUR
emit({"machine": {"processor": "some"}})
for name in args.names:
    emit({"start": name, "what": "what it does"})
    emit({"row": {"what": "process", "value": os.getpid(), "unit": "", "must": "", "ok": None}})
    if name == "attention":
        print("a last word", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "training":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    failed = {"status": "failed", "reason": "an error", "seconds": 1.0}
    emit({"end": failed if name == "parity_bfloat16" else {"status": "passed", "seconds": 1.0}})
    if name == "parity_bfloat16":
        break
"""


def run(*args: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, str(script), *args], capture_output=True, text=True, env=environment)


@pytest.mark.skipif(cuda_check.driver_has_card(), reason="there is a card here")
def test_without_a_card_nothing_is_run():
    before = sorted((ROOT / "docs" / "benchmarks").iterdir())
    done = run()
    assert (done.returncode, done.stdout) == (0, "No CUDA device here: nothing was run.\n")
    assert sorted((ROOT / "docs" / "benchmarks").iterdir()) == before


@pytest.mark.slow
def test_every_check_runs_at_small_size_on_the_cpu(tmp_path):
    done = run("--rehearse", "--output", str(tmp_path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert done.stdout.count("none of") == 2  # at the start and at the end
    found = json.loads((tmp_path / "cuda_rehearsal.json").read_text())
    assert found["rehearsal"] is True and found["machine"]["torch"] == torch.__version__
    assert list(found["checks"]) == list(cuda_check.CHECKS)
    for name, check in found["checks"].items():
        assert check["status"] == "passed", name
        assert check["what"] and check["rows"] and check["seconds"] > 0
    asked = [row for check in found["checks"].values() for row in check["rows"] if row["ok"] is not None]
    assert len(asked) > 60 and all(row["ok"] for row in asked)
    table = (tmp_path / "cuda_rehearsal.md").read_text()
    assert table.startswith("# A rehearsal on the CPU at small size: none of these figures means anything")
    assert all(f"| {name} |" in table for name in cuda_check.CHECKS)
    assert not list(tmp_path.glob("*.partial"))


def test_a_check_that_raises_fails_with_its_reason(tmp_path):
    import cuda_worker

    def wrong(run):
        """Something that does not work."""
        run.at_most("a figure", 0.5, 1.0)
        raise RuntimeError("no such kernel")

    def far_off(run):
        """Something that works badly."""
        run.at_most("a figure", float("nan"), 1.0)
        with run.attempt("a part"):
            raise RuntimeError("no such part")
        run.at_most("another", 0.5, 1.0)

    def lacks(run):
        """Something for which a library is missing."""
        raise cuda_worker.NotRun("a library is not here: not run")

    events = []
    given = cuda_worker.Run(tmp_path, "float32", events.append)
    assert not cuda_worker.perform(given, "wrong", wrong)
    assert not cuda_worker.perform(given, "far_off", far_off)
    assert cuda_worker.perform(given, "lacks", lacks)
    ends = [event["end"] for event in events if "end" in event]
    assert [end["status"] for end in ends] == ["failed", "failed", "not run"]
    assert ends[0]["reason"] == "RuntimeError: no such kernel" and "in wrong" in ends[0]["traceback"]
    assert ends[1]["reason"] == (
        "a figure is nan, must be at most 1; a part is RuntimeError: no such part, must be no error"
    )
    assert ends[2]["reason"] == "a library is not here: not run"
    rows = [event["row"]["ok"] for event in events if "row" in event]
    assert rows == [True, False, False, True]
    json.dumps(events, allow_nan=False)


@pytest.fixture
def tree(tmp_path):
    """The command in a tree of its own: `make(requirements, behaviour)` gives the script."""

    def make(requirements: str = "packaging", behaviour: str = "") -> Path:
        (tmp_path / "benchmarks").mkdir()
        script = Path(shutil.copy(SCRIPT, tmp_path / "benchmarks"))
        (tmp_path / "benchmarks" / "cuda_worker.py").write_text(WORKER.replace("BEHAVIOUR", behaviour))
        lines = "".join(f"\n    {line}" for line in requirements.split())
        (tmp_path / "setup.cfg").write_text(f"[options]\ninstall_requires ={lines}\n")
        return script

    return make


def test_what_fails_dies_or_hangs_costs_the_others_nothing(tmp_path, tree):
    tree()
    names = ["parity_float32", "parity_bfloat16", "attention", "training", "four_bit"]
    limits = {name: 60 for name in names} | {"training": 1}
    report = cuda_check.Report(tmp_path / "out" / "cuda.json", False, limits)
    worker = [sys.executable, str(tmp_path / "benchmarks" / "cuda_worker.py")]
    cuda_check.run_checks(report, limits, time.monotonic() + 60, worker, tmp_path, stop_after=1)
    found = json.loads((tmp_path / "out" / "cuda.json").read_text())["checks"]
    assert {name: found[name]["status"] for name in found} == {
        "parity_float32": "passed",
        "parity_bfloat16": "failed",
        "attention": "failed",
        "training": "failed",
        "four_bit": "passed",
    }
    assert found["parity_bfloat16"]["reason"] == "an error"
    assert found["attention"]["reason"] == "its process ended (SIGKILL): a last word"
    assert found["training"]["reason"].startswith("did not end within 1 s")
    processes = [check["rows"][0]["value"] for check in found.values()]
    assert len(set(processes)) == 4  # another one after each that failed
    assert not any(Path("/proc", str(number)).exists() for number in processes)
    table = (tmp_path / "out" / "cuda.md").read_text()
    assert "| training | what it does |  |  | **failed** did not end within 1 s: |" in table


def test_when_the_time_is_over_the_rest_is_not_run(tmp_path, tree):
    tree()
    limits = {"training": 60, "four_bit": 60}
    report = cuda_check.Report(tmp_path / "out" / "cuda.json", False, limits)
    worker = [sys.executable, str(tmp_path / "benchmarks" / "cuda_worker.py")]
    cuda_check.run_checks(report, limits, time.monotonic() + 2, worker, tmp_path, stop_after=1)
    assert [(check["status"], check["reason"]) for check in report.checks.values()] == [
        ("failed", "no time was left: ended"),
        ("not run", "no time was left"),
    ]


def test_ended_from_outside_it_keeps_what_it_knows(tmp_path, tree):
    script = tree()
    command = [sys.executable, str(script), "--rehearse", "--only", "parity_float32", "training"]
    process = subprocess.Popen([*command, "--output", str(tmp_path)], stdout=subprocess.DEVNULL)
    file = tmp_path / "cuda_rehearsal.json"

    def rows() -> list:
        checks = json.loads(file.read_text())["checks"] if file.exists() else {}
        return checks.get("training", {}).get("rows", [])

    until = time.monotonic() + 60
    while not rows() and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    checks = json.loads(file.read_text())["checks"]
    assert checks["parity_float32"]["status"] == "passed" and checks["training"]["status"] == "running"
    assert not Path("/proc", str(rows()[0]["value"])).exists()


def test_one_check_leaves_what_is_there_of_the_others(tmp_path, tree):
    script = tree()
    for name in ("four_bit", "parity_float32"):
        done = run("--rehearse", "--only", name, "--output", str(tmp_path), script=script)
        assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "cuda_rehearsal.json"
    found = json.loads(file.read_text())
    assert list(found["checks"]) == ["parity_float32", "four_bit"]
    file.write_text(json.dumps({**found, "machine": {"processor": "another"}}))
    done = run("--rehearse", "--only", "four_bit", "--output", str(tmp_path), script=script)
    assert done.returncode == 1 and "has figures of another machine or other versions" in done.stderr


def test_it_says_what_a_machine_lacks(tmp_path, tree):
    done = run("--rehearse", script=tree("packaging>=20 transformers>=99,<100 no-such-package>=1"))
    assert done.returncode == 2
    lines = done.stdout.splitlines()
    assert lines[0] == "Nothing was run: this machine lacks what the check needs."
    assert (
        lines[1].startswith("  transformers>=99,<100 (here: ") and lines[2] == "  no-such-package>=1 (not installed)"
    )
    assert '-m pip install "transformers>=99,<100" "no-such-package>=1"' in lines[3]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"--fetch-wheels --python-version {version} transformers no-such-package; then" in lines[4]
    assert not (tmp_path / "build").exists()


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(path, text)
    return wheel


def test_wheels_that_were_brought_along_are_used(tmp_path, tree):
    script = tree("no-such-package>=1", "import no_such_package; assert no_such_package.brought")
    make_wheel(tmp_path / "wheels", "no_such_package", "1.5", {"no_such_package.py": "brought = True\n"})
    arguments = ("--rehearse", "--only", "four_bit", "--output", str(tmp_path / "out"))
    done = run(*arguments, script=script)
    assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "wheels" / "no_such_package-1.5-py3-none-any.whl").rename(
        tmp_path / "wheels" / "no_such_package-1.5-cp27-cp27m-manylinux1_x86_64.whl"
    )
    done = run(*arguments, script=script)
    assert done.returncode == 2 and "is not a supported wheel" in done.stdout


def test_bitsandbytes_is_cut_to_one_cuda(tmp_path):
    libraries = ("cpu", "cuda118", "cuda128", "cuda130", "cuda132", "rocm72", "xpu2026")
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": name for name in libraries}
    wheel = make_wheel(tmp_path, "bitsandbytes", "0.50.2", {**files, "bitsandbytes/__init__.py": "here = True\n"})
    cuda_check.slim(wheel, "13")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = archive.read("bitsandbytes-0.50.2.dist-info/RECORD").decode()
    kept = ["cpu", "cuda130", "cuda132"]
    assert [name for name in names if name.endswith(".so")] == [f"bitsandbytes/libbitsandbytes_{n}.so" for n in kept]
    assert [line.split(",")[0] for line in record.splitlines()] == names
    assert list(tmp_path.iterdir()) == [wheel]


def test_names_of_platforms():
    assert "manylinux_2_28_x86_64" in cuda_check.platform_tags("linux_x86_64")
    assert "manylinux2014_aarch64" in cuda_check.platform_tags("linux_aarch64")
    assert cuda_check.platform_tags("win_amd64") == ["win_amd64"]
