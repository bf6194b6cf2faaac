"""Code in a process of its own."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Sequence


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


_FORKS = """
import json, os, sys, torch, traceback
printed = []
for code in json.loads(sys.argv[1]):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writer, 1)
        try:
            exec(code, {"__name__": "__main__"})
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        printed.append(file.read().strip())
    assert os.waitpid(child, 0)[1] == 0, code
print(json.dumps(printed))
"""


def run_each(codes: Sequence[str]) -> list[str]:
    """Runs each code in a process of its own, in which nothing but torch has been imported; what each printed."""
    return json.loads(run_python(_FORKS, json.dumps(codes)))
