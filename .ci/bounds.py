"""
The bounds of setup.cfg as requirements for pip: `python .ci/bounds.py lowest` pins every dependency of the package and
of its extras to its lower bound, `newest` names them without any bound. The tools of `dev` are never pinned.
"""

import configparser
import re
import sys
from pathlib import Path

_REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)>=(?P<lowest>[\w.]+)")


def requirements(which: str) -> list[str]:
    """
    Args:
        which (`str`): `"lowest"` or `"newest"`.

    Raises:
        ValueError: for a requirement without a lower bound.
    """
    settings = configparser.ConfigParser()
    settings.read(Path(__file__).parents[1] / "setup.cfg", encoding="utf-8")
    extras = dict(settings["options.extras_require"])
    tools = extras.pop("dev").split("\n")
    found = []
    for line in "\n".join([settings["options"]["install_requires"], *extras.values()]).split("\n"):
        if not line:
            continue
        match = _REQUIREMENT.match(line)
        if match is None:
            raise ValueError(f"setup.cfg: {line!r} has no lower bound.")
        found.append(f"{match['name']}=={match['lowest']}" if which == "lowest" else match["name"])
    return found + [re.split("[<>=]", line)[0] for line in tools if line and "[" not in line]


if __name__ == "__main__":
    if sys.argv[1:] not in (["lowest"], ["newest"]):
        sys.exit(__doc__)
    sys.stdout.write("\n".join(requirements(sys.argv[1])) + "\n")
