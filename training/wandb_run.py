"""A run in W&B: a view of its folder, which may fail at any time without harm.

A run folder has one W&B run, however often it is requeued and evaluated; its id is a function of the folder.
wandb/rows.jsonl lists the rows of its history in the order of the numbers (`_step`) that W&B gives them, each before it
is sent, and wandb/facts.json has its summary. What metrics.jsonl has and the list lacks is added to the list. A listed
row stays: steps that are trained a second time keep the values of the first.

So each process knows what to send. Online, W&B says how many rows it has, and the rest of the list is sent. If it has
more than the list, or W&B is offline and cannot be asked, the whole list is sent, each row with its old number, by
which W&B knows it. An offline file therefore has the whole run: it replaces the older ones, which a killed process may
have left torn, and can be synced at any time and repeatedly.

The training process alone writes to the W&B run of a run that trains, and passes on what evaluations add to
metrics.jsonl; afterwards evaluations do it, one at a time.
"""

import functools
import hashlib
import html
import json
import netrc
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from configs.load import flatten
from data.files import write_atomic
from data.shards import SPLITS, Manifest
from training.config import WandbConfig
from training.jsonl import read_from
from training.lock import RunLock

ROOT = Path(__file__).parent.parent
PACKAGES = ("configs", "data", "eval", "model", "slurm", "training")  # what W&B keeps of the code, next to train.py
PATIENCE = 60.0  # seconds to wait for W&B at the start and the end, and for another process to finish with the run

SUMMARIES = {  # what W&B's summary keeps of a metric, if not its last value
    "max": ("tokens", "step", "perf/memory_gb"),
    "min,last": ("train/loss", "val/loss", "val/perplexity", "val/bits_per_byte"),
    "max,last": ("optim/grad_norm",),
    "mean,max,last": ("perf/tokens_per_second", "perf/mfu"),
}
Row = dict[str, float | str | list[str] | None]  # numbers; paths of pictures in the run folder; texts


def run_id(*parts: str | Path) -> str:
    """Return the W&B id of a run folder, or of a job that belongs to it and is named by the other parts."""
    folder, *rest = parts
    return hashlib.sha256("\n".join([str(Path(folder).resolve()), *map(str, rest)]).encode()).hexdigest()[:16]


def wandb_mode(mode: str) -> str:
    """Return the mode that `auto` means: online if somebody is logged in (WANDB_API_KEY or netrc), else offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    try:
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        is_logged_in = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        is_logged_in = False
    return "online" if is_logged_in or os.environ.get("WANDB_API_KEY") else "offline"


def data_facts(manifest: Manifest) -> dict[str, float | str]:
    """Return what the summary says of the data that a run is trained on."""
    facts = {f"data/{split}/tokens": manifest.splits[split].tokens for split in SPLITS}
    facts |= {f"data/{split}/documents": manifest.splits[split].documents for split in SPLITS}
    return facts | {
        "unigram_entropy": manifest.unigram_entropy,
        "data_fingerprint": manifest.fingerprint,
        "tokenizer_fingerprint": manifest.tokenizer.get("fingerprint", ""),
    }


def open_run(run_dir: Path, settings: WandbConfig, tree: dict[str, Any], **options):
    """Return a W&B run with the group and tags that every run here has; offline if W&B cannot start online."""
    import wandb  # takes a second, which a run without W&B need not spend

    waits = {"init_timeout": PATIENCE, "finish_timeout": PATIENCE, "finish_timeout_raises": True}
    parent = run_dir.absolute().parent.name
    options |= {
        "project": settings.project,
        "group": settings.group or (parent if parent != "runs" else None),  # the runs of a sweep lie in one folder
        "tags": [tree["model"]["name"], tree["size"]["name"], *settings.tags],
        "dir": str(run_dir),
        "reinit": "finish_previous",  # a run of this process whose dashboard failed is not to be joined
        "settings": wandb.Settings(silent=True, **waits),
    }
    if wandb_mode(settings.mode) == "online":
        try:
            return wandb.init(mode="online", **options)
        except Exception as error:
            print(f"W&B could not start online ({error}); send it later: wandb sync {run_dir}/wandb/offline-run-*")
    return wandb.init(mode="offline", **options | {"resume": None})


def remove_older_files(run) -> None:
    """Remove the offline files of the same id from before `run`, which has all that they have."""
    own = Path(run.dir).parent
    for path in own.parent.glob(f"offline-run-*-{run.id}"):
        if path.name.removeprefix("offline-") < own.name.removeprefix("offline-"):
            shutil.rmtree(path, ignore_errors=True)


def save_sources(run, run_dir: Path) -> None:
    """Store the code and the run's config.yaml as one archive among W&B's files, so that a later sync has it too."""
    patterns = ["*.py", "*.txt", *(f"{package}/**/*.{suffix}" for package in PACKAGES for suffix in ("py", "yaml"))]
    with zipfile.ZipFile(Path(run.dir) / "code.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (found for pattern in patterns for found in sorted(ROOT.glob(pattern))):
            archive.write(path, path.relative_to(ROOT))
        if (run_dir / "config.yaml").exists():
            archive.write(run_dir / "config.yaml", "run_config.yaml")
    run.save(f"{run.dir}/code.zip", base_path=run.dir, policy="now")


def pictures(run_dir: Path, paths: list[Path]) -> Row:
    return {f"plots/{path.stem}": str(path.relative_to(run_dir)) for path in paths}


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
        flat = {key.replace(".", "/"): value for key, value in flatten(tree).items()}  # W&B takes dots for nesting
        options = {"id": run_id(self.run_dir), "job_type": "train", "name": tree["run"]["name"], "config": flat}
        self.run = open_run(self.run_dir, settings, tree, resume="allow" if rows else None, **options)
        if self.run.starting_step > len(rows):  # the list was lost
            self.run.finish()
            self.run = open_run(self.run_dir, settings, tree, **options)
        self.run.define_metric("*", step_metric="tokens")
        for summary, keys in SUMMARIES.items():
            for key in keys:
                self.run.define_metric(key, step_metric="tokens" if "/" in key else None, summary=summary)
        if self.run.starting_step == 0:
            save_sources(self.run, self.run_dir)
        self.note({})
        for row in rows:
            self._know(row)
        for row in rows[self.run.starting_step :]:
            self.run.log(shown(self.run_dir, row))
        remove_older_files(self.run)
        if not self.run.offline:
            print(f"W&B: {self.run.url}")

    def _know(self, row: Row) -> None:
        self.known |= {(row.get("step"), key): value for key, value in row.items()}

    def _add(self, row: Row) -> None:
        self.list.write(json.dumps(row).encode() + b"\n")
        self._know(row)
        self.run.log(shown(self.run_dir, row))

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
    def show_texts(self, key: str, texts: list[str]) -> None:
        """Show texts one below the other."""
        self._add({key: texts})

    @off_if_it_fails
    def show_images(self, paths: list[Path]) -> None:
        """Show pictures that lie in the run folder."""
        if paths:
            self._add(pictures(self.run_dir, paths))

    @off_if_it_fails
    def _finish(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)

    def finish(self, exit_code: int = 0) -> None:
        """Wait until W&B has everything."""
        self.catch_up()
        self._finish(exit_code)
        self.is_on = False
        self.lock.release()


def log_evaluation(
    run_dir: Path, settings: WandbConfig, tree: dict[str, Any], suite: str, record: dict[str, Any],
    plots: list[Path], is_finished: bool,
) -> None:  # fmt: skip
    """Show an evaluation as a W&B run of its own and, once training is done, in the W&B run of the run folder.

    `settings` and `tree` are the run's, `record` is what results/<suite>.json holds. The process of a run that still
    trains shows the results itself, from metrics.jsonl.
    """
    if wandb_mode(settings.mode) == "disabled":
        return
    name = f"{tree['run']['name']} {suite}"
    results = record["results"] | {f"{key}_stderr": value for key, value in record.get("stderr", {}).items()}
    facts = {key: record.get(key) for key in ("run", "suite", "step", "tokens", "limit", "versions")}
    options = {"id": run_id(run_dir, "eval", name), "job_type": "eval", "name": name, "config": facts}
    try:
        run = open_run(run_dir, settings, tree, **options)
        run.summary.update({f"eval/{suite}/{key}": value for key, value in results.items()})
        if plots:
            run.log(shown(run_dir, pictures(run_dir, plots)))
        run.finish()
        remove_older_files(run)
    except Exception as error:
        print(f"W&B failed (results/{suite}.json has everything): {error}")
    if is_finished:
        # The run keeps its configuration: the evaluation may have another device or kernel.
        made_with = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        view = WandbRun(run_dir, settings, made_with)
        view.show_images(plots)
        view.finish()
