"""
What works on a CUDA card, and how fast: one table (Markdown) and one JSON file.

    make cuda-check                                            # about ten minutes on one card of 80 GB
    python benchmarks/cuda_check.py --only attention four_bit  # some of it; figures of the others stay
    python benchmarks/cuda_check.py --rehearse                 # small, on the CPU; no figure means anything

Without a card nothing is run. Each check (`cuda_worker.py`) has a limit of time, and runs in a process whose end costs
the others nothing; what is known is written after each row. Exit code 0: all passed. 1: some failed. 2: something is
missing, nothing was run. 3: none failed, but some were not run.

The machine needs PyTorch for its card and what setup.cfg names. Where there is no package index, bring wheels/ along,
which on another machine

    make cuda-wheels ARGS="--python-version 3.12"              # of the machine with the card

fills with what is usually missing. It goes before what is installed, for this command alone.
"""

import argparse
import configparser
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WHEELS = ROOT / "wheels"
SITE = ROOT / "build" / "cuda_site"  # wheels/, installed
WORKER = [sys.executable, str(ROOT / "benchmarks" / "cuda_worker.py")]

# In order of value; the most seconds that each may take on a card.
CHECKS = {
    "parity_float32": 90,
    "parity_bfloat16": 60,
    "attention": 120,
    "training": 120,
    "four_bit": 90,
    "large_model": 90,
    "many_questions": 240,
    "dialogue": 120,
    "training_step": 120,
    "training_memory": 120,
    "from_pretrained": 150,
    "four_bit_large": 120,
    "compiling": 180,
    "two_processes": 240,
    "compiled_decoding": 180,
}
REHEARSAL_PATIENCE = 5

# What a machine with PyTorch for a card and the usual libraries lacks, with bitsandbytes for 4-bit.
PACKAGES = ["transformers", "datasets", "dill", "multiprocess", "ijson", "bitsandbytes"]
MIB = 2**20


# What is missing, and how it comes along


def has_card() -> bool:
    """Whether PyTorch, or without it the driver, has a card to show."""
    try:
        import torch
    except ImportError:
        return driver_has_card()
    return torch.cuda.is_available() or driver_has_card()


def driver_has_card() -> bool:
    if shutil.which("nvidia-smi") is None:
        return False
    return "GPU" in subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True).stdout


def lacking(card: bool) -> list[tuple[str, str]]:
    """What setup.cfg asks for and is not here: requirement, what is here instead."""
    found: list[tuple[str, str]] = []
    if sys.version_info < (3, 11):  # noqa: UP036 (runs with any, to say so)
        found.append(("Python>=3.11", f"here: {sys.version.split()[0]}"))
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return [*found, ("packaging", "not installed")]
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    for line in settings["options"]["install_requires"].split():
        requirement = Requirement(line)
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append((line, "not installed"))
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append((line, f"here: {version}"))
    if card and not any(line.startswith("torch") for line, _ in found):
        import torch

        if not torch.cuda.is_available():
            found.append(("torch, a build for this card", f"here: {torch.__version__}, which finds none"))
    return found


def tell_lacking(missing: list[tuple[str, str]]) -> None:
    print("Nothing was run: this machine lacks what the check needs.")
    for line, here in missing:
        print(f"  {line} ({here})")
    names = [line for line, _ in missing if line[0].islower() and not line.startswith("torch")]
    if names:
        quoted = " ".join(f'"{name}"' for name in names)
        packages = " ".join(re.match(r"[\w-]+", name)[0] for name in names)
        print(f"Where there is a package index: {sys.executable} -m pip install {quoted}")
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        print(
            "Where there is none: on a machine that has one, python benchmarks/cuda_check.py --fetch-wheels "
            f"--python-version {version} {packages}; then bring {WHEELS.name}/ along."
        )


def platform_tags(platform: str) -> list[str]:
    """What pip takes for a platform: it matches glibc's versions one by one."""
    if not (system := re.fullmatch(r"linux_(\w+)", platform)):
        return [platform]
    versions = [f"2_{minor}" for minor in (39, 35, 34, 31, 28, 27, 24, 17)] + ["2014", "2010", "1"]
    return [f"manylinux{'_' if '_' in version else ''}{version}_{system[1]}" for version in versions]


def fetch_wheels(packages: list[str], python_version: str, platform: str, cuda: str) -> None:
    """Into wheels/, in the versions of constraints.txt."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(WHEELS), "--constraint", str(ROOT / "constraints.txt")]
    command += ["--python-version", python_version, "--implementation", "cp"]
    command += [f"--platform={tag}" for tag in platform_tags(platform)]
    if subprocess.run([*command, *packages]).returncode:
        sys.exit("pip could not fetch all wheels: see above.")
    for wheel in WHEELS.glob("bitsandbytes-*.whl"):
        slim(wheel, cuda)
    sizes = {wheel.name: wheel.stat().st_size for wheel in sorted(WHEELS.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size / MIB:6.1f} MiB  {name}")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True).stdout
    tracked = sum((ROOT / name).stat().st_size for name in listed.split("\0") if name)
    print(f"{sum(sizes.values()) / MIB:6.1f} MiB in {WHEELS}, {tracked / MIB:.1f} MiB of files in git")


def slim(wheel: Path, cuda: str) -> None:
    """Takes out of bitsandbytes what it has for other accelerators, most of it."""
    others = re.compile(rf"bitsandbytes/libbitsandbytes_(cuda(?!{cuda})|rocm|xpu)")
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            if others.match(item.filename):
                continue
            content = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                content = b"".join(row for row in content.splitlines(True) if not others.match(row.decode()))
            target.writestr(item, content, zipfile.ZIP_DEFLATED)
    whole.unlink()


def use_wheels() -> None:
    """Puts what is in wheels/ before what is installed, here and in the processes that are started."""
    wheels = [str(wheel) for wheel in sorted(WHEELS.glob("*.whl"))]
    paths = [str(ROOT / "src")]
    if wheels:
        shutil.rmtree(SITE, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
        done = subprocess.run([*command, "--target", str(SITE), *wheels], capture_output=True, text=True)
        if done.returncode:
            print(f"Nothing was run: {WHEELS} could not be installed.\n{done.stderr.strip()}")
            print(f"Its wheels must be for Python {sys.version.split()[0]} on this platform.")
            sys.exit(2)
        paths.append(str(SITE))
    sys.path[:0] = paths
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])


# What was found


class Report:
    """
    All that is known, written whenever something is added.

    Args:
        file (`Path`): of the JSON; the table lies beside it.
        rehearsal (`bool`): whether the figures mean nothing.
        renewed (`Iterable[str]`): checks that will be run; what the file has of others stays.
    """

    def __init__(self, file: Path, rehearsal: bool, renewed: Iterable[str]):
        self.file = file
        earlier = json.loads(file.read_text()) if file.exists() else {}
        self.head = {"rehearsal": rehearsal, "machine": earlier.get("machine")}
        checks = earlier.get("checks", {})
        self.checks = {name: check for name, check in checks.items() if name in CHECKS and name not in renewed}

    def set_machine(self, machine: dict[str, Any]) -> None:
        """Where it runs. Figures of one file are of one machine."""
        if self.checks and self.head.get("machine") not in (None, machine):
            raise SystemExit(
                f"{self.file} has figures of another machine or other versions: run all checks, or name another "
                "--output."
            )
        self.head["machine"] = machine

    def begin(self, name: str, what: str = "") -> None:
        print(f"{name}: {what}", flush=True)
        self.checks[name] = {"what": what, "status": "running", "rows": []}
        self.write()

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.checks[name]["rows"].append(row)
        self.write()

    def end(self, name: str, status: str, reason: str = "", **more) -> None:
        print(f"  {name} {status}{f': {reason}' if reason else ''}", flush=True)
        check = self.checks.setdefault(name, {"what": "", "rows": []})
        check.update({"status": status, "reason": reason, **more})
        self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        checks = dict(sorted(self.checks.items(), key=lambda item: list(CHECKS).index(item[0])))
        for path, text in (
            (self.file, json.dumps({**self.head, "checks": checks}, indent=1) + "\n"),
            (self.file.with_suffix(".md"), self.table(checks)),
        ):
            partial = path.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(path)  # a kill leaves the last whole one

    def table(self, checks: dict[str, dict[str, Any]]) -> str:
        machine = ", ".join(f"{name} {value}" for name, value in (self.head["machine"] or {}).items())
        lines = ["# What works on a card, and how fast", ""]
        if self.head["rehearsal"]:
            lines = ["# A rehearsal on the CPU at small size: none of these figures means anything", ""]
        lines += [f"Written by `make cuda-check`. {machine}.", ""]
        lines += ["| check | what | found | must be | |", "|---|---|---:|---|---|"]
        for name, check in checks.items():
            time_taken = f"{check['seconds']:.0f} s" if "seconds" in check else ""
            status = " ".join(filter(None, (f"**{check['status']}**", check.get("reason", ""))))
            lines.append(table_row(name, check["what"], time_taken, "", status))
            for row in check["rows"]:
                value = row["value"] if isinstance(row["value"], str) else f"{row['value']:.4g}"
                verdict = {True: "yes", False: "**no**", None: ""}[row["ok"]]
                lines.append(table_row("", told_more(row), f"{value} {row['unit']}".strip(), row["must"], verdict))
        return "\n".join(lines) + "\n"


def table_row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in cells)} |"


def told_more(row: dict[str, Any]) -> str:
    """What a row is about, with what stands beside a ratio."""
    more = []
    if "seconds" in row:
        more.append(f"{' and '.join(f'{seconds:.3g}' for seconds in row['seconds'].values())} s")
    if "peak_bytes" in row:
        more.append(f"{' and '.join(f'{peak / 2**30:.1f}' for peak in row['peak_bytes'].values())} GiB at most")
    if "allowed" in row:
        more.append(f"arithmetic and memory traffic allow {row['allowed']:.2f}")
    if "equal_answers" in row:
        more.append(f"{row['equal_answers']:.0%} of answers the same")
    return f"{row['what']} ({'; '.join(more)})" if more else row["what"]


# Running


def run_checks(
    report: Report, limits: dict[str, float], until: float, worker: list[str], folder: Path, stop_after: float = 10
) -> None:
    """
    Runs checks in a process of their own, and in another one after each that failed.

    Args:
        report ([`Report`]): is told what happens.
        limits (`dict[str, float]`): the checks, and the most seconds of each.
        until (`float`): when all must have ended, by `time.monotonic`.
        worker (`list[str]`): the command, to which are added what `cuda_worker.py` takes.
        folder (`Path`): for files of the checks.
        stop_after (`float`, *optional*): how long a process has to end when it is asked to.
    """
    remaining = list(limits)
    while remaining:
        if time.monotonic() >= until:
            for name in remaining:
                report.end(name, "not run", "no time was left")
            return
        follow(report, remaining, limits, until, worker, folder, stop_after)


def follow(
    report: Report,
    remaining: list[str],
    limits: dict[str, float],
    until: float,
    worker: list[str],
    folder: Path,
    stop_after: float,
) -> None:
    """One process, until a check fails or all have ended; takes those that have ended out of `remaining`."""
    events, log = folder / "events", folder / "log"
    events.write_text("")
    command = [*worker, *remaining, "--folder", str(folder), "--events", str(events)]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    current, started, read = remaining[0], time.monotonic(), 0
    try:
        while remaining:
            code = process.poll()  # asked first: what it wrote before its end is read below
            lines = events.read_text().splitlines(keepends=True)
            for event in (json.loads(line) for line in lines[read:] if line.endswith("\n")):
                read += 1
                if "machine" in event:
                    report.set_machine(event["machine"])
                elif "start" in event:
                    current, started = event["start"], time.monotonic()
                    report.begin(current, event["what"])
                elif "row" in event:
                    report.add(current, event["row"])
                else:
                    report.end(current, **event["end"])
                    remaining.remove(current)
                    if event["end"]["status"] == "failed" or not remaining:
                        return
                    current, started = remaining[0], time.monotonic()
            if code is not None:
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                reason = f"its process ended ({how}): {last_lines(log)}"
            elif time.monotonic() >= until:
                reason = "no time was left: ended"
            elif time.monotonic() - started > limits[current]:
                reason = f"did not end within {limits[current]:.0f} s: {last_lines(log)}"
            else:
                time.sleep(0.1)
                continue
            report.end(current, "failed", reason)
            remaining.remove(current)
            return
    finally:
        end_group(process, stop_after)


def last_lines(log: Path) -> str:
    return " ".join(log.read_text(errors="replace").split())[-800:]


def end_group(process: subprocess.Popen, stop_after: float) -> None:
    """Ends a process with all that it started: asks first, so that launchers end theirs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(stop_after)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def stopped(number: int, frame) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", help=f"with --fetch-wheels (default: {' '.join(PACKAGES)})")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="CHECK", help=f"some of: {', '.join(CHECKS)}")
    parser.add_argument("--output", type=Path, help="folder (default: docs/benchmarks, or build/ in a rehearsal)")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all, on a card (default: %(default)s)")
    parser.add_argument(
        "--rehearse",
        nargs="?",
        const="float32",
        choices=("float32", "bfloat16"),
        help="on the CPU, at small size; by default in float32, which is quicker there",
    )
    parser.add_argument("--fetch-wheels", action="store_true", help="fetch what is usually missing, run nothing")
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python-version", default=here, help="of the other machine (default: %(default)s)")
    parser.add_argument("--platform", default="linux_x86_64", help="of the other machine (default: %(default)s)")
    parser.add_argument("--cuda", default="13", help="of the other machine's PyTorch (default: %(default)s)")
    args = parser.parse_args()
    if args.fetch_wheels:
        fetch_wheels(args.packages or PACKAGES, args.python_version, args.platform, args.cuda)
        return 0
    if args.packages:
        parser.error("packages are named with --fetch-wheels only")
    card = not args.rehearse
    if card and not has_card():
        print("No CUDA device here: nothing was run.")
        return 0
    use_wheels()
    if missing := lacking(card):
        tell_lacking(missing)
        return 2

    output = args.output or ROOT / ("docs/benchmarks" if card else "build")
    file = output / ("cuda.json" if card else "cuda_rehearsal.json")
    limits = {name: CHECKS[name] * (1 if card else REHEARSAL_PATIENCE) for name in args.only or CHECKS}
    report = Report(file, not card, limits)
    until = time.monotonic() + 60 * args.minutes if card else float("inf")
    if not card:
        print("A rehearsal on the CPU at small size: none of these figures means anything.")
    signal.signal(signal.SIGTERM, stopped)
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    if card:  # one card, whatever else is there
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    memory = Path("/dev/shm")  # quicker than a disk for a model of 15 GB, where it is large enough
    roomy = card and memory.is_dir() and shutil.disk_usage(memory).free > 40 * 2**30
    with tempfile.TemporaryDirectory(dir=memory if roomy else None) as folder:
        os.environ["HF_DATASETS_CACHE"] = f"{folder}/datasets"
        worker = [*WORKER, *(() if card else ("--rehearse", args.rehearse))]
        run_checks(report, limits, until, worker, Path(folder))
    statuses = [report.checks[name]["status"] for name in limits]
    counts = ", ".join(f"{statuses.count(status)} {status}" for status in sorted(set(statuses)))
    print(f"{counts}: see {file} and {file.with_suffix('.md')}")
    if not card:
        print("This was a rehearsal: none of its figures means anything.")
    return 1 if "failed" in statuses else 3 if "not run" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
