"""The .wandb files of a run folder: one for each process that worked on the run."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path


def run_id(*parts: str | Path) -> str:
    """The W&B id of a run folder (and of what else belongs to it)."""
    folder, *rest = parts
    return hashlib.sha256("\n".join([str(Path(folder).resolve()), *map(str, rest)]).encode()).hexdigest()[:16]


def logged_history(run_dir: Path) -> list[dict]:
    """What the run folder's W&B files hold, in order."""
    return [
        record["history"]["item"]
        for path in wandb_files(run_dir)
        for record in read_records(path)
        if record["type"] == "history"
    ]


def wandb_files(run_dir: Path) -> list[Path]:
    """One for each process that worked on the run, the oldest first."""
    name = run_id(run_dir)
    found = Path(run_dir).glob(f"wandb/*run-*-{name}/run-{name}.wandb")
    return sorted(path for path in found if not path.parent.is_symlink())  # `latest-run` is one of them again


def mend(path: Path) -> None:
    """Cut a .wandb file off after its last whole record, or remove it where it has none: `wandb sync` goes no further
    in a run than to a torn file. The format is LevelDB's log (blocks of 32 KiB; checksum, length and kind before each
    part of a record) behind 7 bytes of W&B's."""
    block, header, whole_or_last = 32768, 7, (1, 4)
    data, at, end = path.read_bytes(), 7, 7
    while at + header <= len(data):
        if (left := block - at % block) < header:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        if not 1 <= kind <= 4 or at + header + length > len(data):
            break
        at += header + length
        end = at if kind in whole_or_last else end
    if end == 7:
        shutil.rmtree(path.parent)
    elif end < len(data):
        os.truncate(path, end)


def read_records(path: Path) -> list[dict]:
    """The records of a .wandb file, read by W&B itself (`wandb leet inspect`); a torn end is left out."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    return [json.loads(line) for line in text.splitlines()]
