"""A run's record: metrics.jsonl, the truth, and events.jsonl."""

import json
import math
import time
from pathlib import Path

from configs.block import to_dict
from data.files import write_atomic
from training.config import Config
from training.jsonl import append_line, read_lines
from training.wandb_run import WandbRun


def metrics_line(step: int, tokens: int, metrics: dict[str, float]) -> dict[str, float | None]:
    """Return a line of metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
    line = {"step": step, "tokens": tokens} | metrics
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


def drop_lines_after(path: Path, step: int) -> None:
    """Remove what was logged past the checkpoint from which the run resumes, and what is no line of metrics."""
    if path.exists():
        kept = [line for line in read_lines(path) if isinstance(line.get("step"), int) and line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def log_event(run_dir: Path, event: str, step: int, **facts) -> None:
    """Add a line to events.jsonl."""
    line = {"time": round(time.time(), 3), "event": event, "step": step, **facts}
    append_line(Path(run_dir) / "events.jsonl", line)


class Metrics:
    """Rank 0's record of a run. `log` writes a JSON line, which W&B then shows; other ranks make no such object."""

    def __init__(self, config: Config, start_step: int):
        self.run_dir = Path(config.run.dir)
        self.path = self.run_dir / "metrics.jsonl"
        drop_lines_after(self.path, start_step)
        self.file = open(self.path, "ab", buffering=0)
        self.unwritten = b""  # what a full disk has no room for yet
        self.wandb = WandbRun(config.run.dir, config.wandb, to_dict(config))

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Write a line, or keep it until the disk has room, and show it in W&B."""
        was_full = bool(self.unwritten)
        self.unwritten += (json.dumps(metrics_line(step, tokens, metrics)) + "\n").encode()
        if (failure := self._write()) and not was_full:
            print(f"{self.path}: cannot be written, lines wait until there is room, training continues: {failure}")
        self.wandb.catch_up()

    def _write(self) -> OSError | None:
        """Write what waits, as far as there is room; return why it went no further."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            return error
        return None

    def summarize(self, facts: dict, plot: Path, texts: list[str]) -> None:
        """Write summary.json, and show the plot and the sampled texts in W&B."""
        write_atomic(self.run_dir / "summary.json", json.dumps(facts, indent=2) + "\n")
        self.wandb.catch_up()
        self.wandb.show([plot], texts)

    def close(self, exit_code: int = 0) -> None:
        if failure := self._write():
            print(f"{self.path}: the last lines are lost: {failure}")
        self.file.close()
        self.wandb.finish(exit_code)
