"""A run in W&B: a view of its folder, which may fail at any time without harm.

A run folder has one W&B run, whose id is made once and kept in wandb/id, however often it is requeued, evaluated or
moved. wandb/rows.jsonl lists the rows of its history, each before it is sent, in the order of W&B's own numbers
(`_step`), and wandb/facts.json has its summary. What metrics.jsonl has and the list lacks is added; a listed row stays,
so steps that are trained a second time keep the values of the first. Online, what W&B does not have of the list is
sent; offline, or if W&B has more than the list, all of it. An offline file therefore has the whole run: it replaces the
older ones, which a killed process may have left torn, and can be synced at any time and repeatedly. One process writes
to the W&B run: that which trains, and afterwards the evaluations, one at a time.
"""

import functools
import hashlib
import html
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from requests.utils import get_netrc_auth

from configs.load import flatten
from data.files import write_atomic
from training.config import WandbConfig
from training.jsonl import read_from
from training.run_folder import RunLock

PATIENCE = 60.0  # seconds to wait for W&B at the start and the end, and for another process to finish with the run
SUMMARIES = {  # what W&B's summary keeps of a metric, if not its last value
    "max": ("tokens", "step", "perf/memory_gb"),
    "min,last": ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"),
    "max,last": ("optim/grad_norm",),
    "mean,max,last": ("perf/tokens_per_second", "perf/mfu"),
}
Row = dict[str, float | str | list[str] | None]  # numbers; paths of pictures in the run folder; texts


def run_id(run_dir: str | Path) -> str:
    """Return the W&B id of a run folder, made at the first call: a sweep agent's, or one that nobody else has."""
    path = Path(run_dir) / "wandb" / "id"
    if path.exists() and re.fullmatch(r"[\w-]{1,64}", found := path.read_text(encoding="utf-8").strip()):
        return found
    made = os.environ.get("WANDB_RUN_ID") or secrets.token_hex(8)
    if (path.parent / "rows.jsonl").exists():  # older folders: the id was a function of the path
        made = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, made)
    return made


def wandb_mode(mode: str) -> str:
    """Return the mode that `auto` means: online if somebody is logged in (WANDB_API_KEY or netrc), else offline."""
    if mode != "auto":
        return mode
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    is_logged_in = os.environ.get("WANDB_API_KEY") or get_netrc_auth(server)
    return os.environ.get("WANDB_MODE") or ("online" if is_logged_in else "offline")


def open_run(run_dir: Path, settings: WandbConfig, tree: dict[str, Any], resume: str | None = None):
    """Return the W&B run of a run folder; offline if W&B cannot start online."""
    import wandb  # takes a second, which a run without W&B need not spend

    waits = {"init_timeout": PATIENCE, "finish_timeout": PATIENCE, "finish_timeout_raises": True}
    parent = run_dir.absolute().parent.name
    options = {
        "id": run_id(run_dir),
        "job_type": "train",
        "name": tree["run"]["name"],
        "config": {key.replace(".", "/"): value for key, value in flatten(tree).items()},  # W&B takes dots for nesting
        "project": settings.project,
        "group": settings.group or (parent if parent != "runs" else None),  # the runs of a sweep lie in one folder
        "tags": [tree["model"]["name"], tree["size"]["name"], *settings.tags],
        "dir": str(run_dir),
        "reinit": "finish_previous",  # a run of this process whose dashboard failed is not to be joined
        "settings": wandb.Settings(silent=True, save_code=True, **waits),  # the script, and the diff of tracked files
    }
    if wandb_mode(settings.mode) == "online":
        print(f"W&B: connecting, for at most {PATIENCE:.0f} s")
        try:
            return wandb.init(mode="online", resume=resume, **options)
        except Exception as error:
            print(f"W&B could not start online ({error}); send it later: wandb sync {run_dir}/wandb/offline-run-*")
    return wandb.init(mode="offline", **options)


def remove_older_files(run) -> None:
    """Remove the offline files of the same id from before `run`, which has all that they have."""
    own = Path(run.dir).parent
    for path in own.parent.glob(f"offline-run-*-{run.id}"):
        if path.name.removeprefix("offline-") < own.name.removeprefix("offline-"):
            shutil.rmtree(path, ignore_errors=True)


def shown(run_dir: Path, row: Row) -> dict[str, Any]:
    """Return a row as W&B shows it; a picture that is gone becomes null, so that later rows keep their numbers."""
    import wandb

    def value_of(value):
        if isinstance(value, list):
            return wandb.Html("<hr>".join(f"<pre>{html.escape(text)}</pre>" for text in value))
        if isinstance(value, str):
            return wandb.Image(str(run_dir / value)) if (run_dir / value).exists() else None
        return value

    return {key: value_of(value) for key, value in row.items()}


def off_if_it_fails(method: Callable) -> Callable:
    """Return a method that does nothing if W&B is off, and turns it off if it fails, which is no reason to stop."""

    @functools.wraps(method)
    def guarded(self, *arguments):
        if self.is_on:
            try:
                method(self, *arguments)
            except Exception as error:
                print(f"W&B failed and is off from here on (metrics.jsonl has everything): {error}")
                self.is_on = False

    return guarded


class WandbRun:
    """The W&B run of a run folder; `tree` is the whole configuration as nested mappings, which W&B shows."""

    def __init__(self, run_dir: str | Path, settings: WandbConfig, tree: dict[str, Any]):
        self.run_dir = Path(run_dir)
        self.folder = self.run_dir / "wandb"
        self.lock = RunLock(self.folder)
        self.known: dict[tuple[float | None, str], Any] = {}  # what is listed, by step and metric
        self.read_bytes = 0  # how much of metrics.jsonl is listed
        self.is_on = wandb_mode(settings.mode) != "disabled"
        self._open(settings, tree)
        self.catch_up()

    @off_if_it_fails
    def _open(self, settings: WandbConfig, tree: dict[str, Any]) -> None:
        if reason := self.lock.acquire(PATIENCE, print):
            raise RuntimeError(reason)
        rows, end = read_from(self.folder / "rows.jsonl")
        self.list = open(self.folder / "rows.jsonl", "ab", buffering=0)
        self.list.truncate(end)  # a torn row was not sent
        self.run = open_run(self.run_dir, settings, tree, resume="allow" if rows else None)
        if self.run.starting_step > len(rows):  # the list was lost
            self.run.finish()
            self.run = open_run(self.run_dir, settings, tree)
        self.run.define_metric("*", step_metric="tokens")
        for key, summary in ((key, summary) for summary, keys in SUMMARIES.items() for key in keys):
            self.run.define_metric(key, step_metric="tokens" if "/" in key else None, summary=summary)
        self.note({})
        for number, row in enumerate(rows):
            self._show(row, is_sent=number < self.run.starting_step)
        remove_older_files(self.run)
        if not self.run.offline:
            print(f"W&B: {self.run.url}")

    def _show(self, row: Row, is_sent: bool = False) -> None:
        self.known |= {(row.get("step"), key): value for key, value in row.items()}
        if not is_sent:
            self.run.log(shown(self.run_dir, row))

    def _add(self, row: Row) -> None:
        self.list.write(json.dumps(row).encode() + b"\n")
        self._show(row)

    @off_if_it_fails
    def show(self, plots: list[Path], texts: list[str] | None = None) -> None:
        """Show pictures that lie in the run folder, and texts."""
        row = {f"plots/{path.stem}": str(path.relative_to(self.run_dir)) for path in plots}
        if row := row | ({"samples": texts} if texts else {}):
            self._add(row)

    @off_if_it_fails
    def catch_up(self) -> None:
        """Send what metrics.jsonl has and W&B has not."""
        lines, self.read_bytes = read_from(self.run_dir / "metrics.jsonl", self.read_bytes)
        for line in lines:
            step, tokens = line.pop("step"), line.pop("tokens")
            if news := {key: value for key, value in line.items() if self._is_news(step, key, value)}:
                self._add({"step": step, "tokens": tokens} | news)

    def _is_news(self, step: int, key: str, value: float | None) -> bool:
        """An evaluation may be repeated with another result; a step that is trained again is not shown again."""
        return (step, key) not in self.known or (key.startswith("eval/") and self.known[step, key] != value)

    @off_if_it_fails
    def note(self, facts: dict[str, Any]) -> None:
        """Add facts to the summary, where W&B puts the metrics itself."""
        path = self.folder / "facts.json"
        facts = (json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}) | facts
        write_atomic(path, json.dumps(facts))
        self.run.summary.update(facts)

    @off_if_it_fails
    def _finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)

    def finish(self, exit_code: int = 0) -> None:
        """Wait until W&B has everything."""
        self.catch_up()
        self._finish(exit_code)
        self.is_on = False
        self.lock.release()


def add_evaluation(run_dir: Path, settings: WandbConfig, plots: list[Path]) -> None:
    """Add plots, and what metrics.jsonl has since, to the W&B run of a run that is done."""
    # The run keeps its configuration: the evaluation may have another device or kernel.
    made_with = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    view = WandbRun(run_dir, settings, made_with)
    view.show(plots)
    view.finish()
