"""That the figures of docs/speed.md can be made again: the command runs, and renews one group without the others."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "speed.py"


@pytest.mark.slow
def test_one_group_after_another(tmp_path):
    small = [sys.executable, str(SCRIPT), "--factor", "64", "--rounds", "1", "--output", str(tmp_path)]
    for group in ("loading", "training"):
        subprocess.run([*small, "--only", group], check=True)
    found = json.loads((tmp_path / "speed.json").read_text())
    assert list(found["results"]) == ["loading", "training"]
    rows = [row for group in found["results"].values() for row in group]
    assert all(row["ratio"] > 0 for row in rows)
    table = (tmp_path / "speed.md").read_text()
    assert all(f"| {row['what']} | {row['over']} | {row['ours']} | {row['ratio']:.2f} |" in table for row in rows)
    done = subprocess.run([*small, "--factor", "32", "--only", "loading"], capture_output=True, text=True)
    assert done.returncode == 2 and "of other versions or sizes" in done.stderr
