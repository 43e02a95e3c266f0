"""Files of JSON lines: reading what is whole, adding what must not be lost."""

import json
import os
from contextlib import suppress
from pathlib import Path


def read_lines(path: Path) -> list[dict]:
    """Return the objects of a file of JSON lines; torn lines, as a killed process may leave them, are left out."""
    return read_from(path)[0]


def read_from(path: Path, start: int = 0) -> tuple[list[dict], int]:
    """Return the objects from byte `start` on, and where the last whole line ends."""
    content = b""
    if path.exists():
        with open(path, "rb") as file:
            file.seek(start)
            content = file.read()
    lines = []
    for text in content.split(b"\n"):
        with suppress(ValueError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)], start + content.rfind(b"\n") + 1


def append_line(path: Path, line: dict) -> None:
    """Add an object to a file of JSON lines; it is on the disk when this returns."""
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if torn else "") + json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
