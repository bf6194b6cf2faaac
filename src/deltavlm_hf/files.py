"""Writing files so that a reader, or the next run after a kill, never meets half of one."""

from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes a text file: the old one stays until the new one is complete."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
