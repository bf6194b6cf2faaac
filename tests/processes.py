"""Code in a process of its own."""

import os
import subprocess
import sys
import textwrap


def run_python(code: str, *arguments: object, timeout: float | None = None, **environment: str) -> str:
    """Runs code with this Python, and what `environment` adds to that of the tests; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()
