"""Files that are written whole or not at all, and their checksums."""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


def write_atomic(path: str | Path, content: str | bytes | Iterable[bytes]) -> None:
    """Write `content` so that a reader sees the old file or the new one, never part of one."""
    path = Path(path)
    if isinstance(content, str):
        content = content.encode()
    chunks = [content] if isinstance(content, bytes) else content
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # next to it, so that renaming is atomic
    try:
        with open(partial, "xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def make_folder(folder: Path) -> list[Path]:
    """Make a folder and those above it; return the ones that were not there, the deepest first."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return made


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, each inside of the next, up to the first that holds something."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def seal(content: dict) -> str:
    """Return the checksum of a JSON object's own content, which is kept in it as `checksum`."""
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def sha256_of(path: str | Path) -> str:
    """Return the checksum of a whole file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
