"""What run folders hold at this moment, also those of runs that still train."""

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import ConfigError
from data.shards import MANIFEST_FILE, read_manifest
from eval import published
from model import counting
from training.config import Config
from training.jsonl import read_lines
from training.run_folder import read_config
from training.stored import checkpoint_dirs, is_count, is_finished, read_events, telling_keys

POINT = {  # what is read of a point of the decoding benchmark
    "model": str, "scope": str, "device": str, "length": int, "batch": int, "tokens_per_second": int | float
}  # fmt: skip


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of what is not None, or None."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


@dataclass
class Run:
    """One run folder."""

    dir: Path
    config: Config
    lines: list[dict]  # of metrics.jsonl
    events: list[dict]  # of events.jsonl
    results: dict[str, dict]  # evaluations by the name of their file
    decoding: list[dict]  # points of the decoding benchmark
    facts: dict[str, Any]  # the most recent checkpoint's manifest
    finished: bool

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def step(self) -> int:
        return max((line["step"] for line in self.lines), default=0)

    @property
    def tokens(self) -> int:
        return max((line["tokens"] for line in self.lines), default=0)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Return what makes a run that run, and what else changes its results: as flat `key: value` pairs."""
        starts = {f"trainer.{key}": getattr(self.config.trainer, key) for key in ("init_from", "fork_from")}
        known = starts | {"precision": self.precision}
        return self.config.identity() | {key: value for key, value in known.items() if value is not None}

    @cached_property
    def precision(self) -> str | None:
        """Return what the run computed in, of all its starts; None if it does not say."""
        dtypes = {str(event["dtype"]) for event in self.events if event.get("event") == "start" and "dtype" in event}
        if not dtypes and self.config.trainer.dtype != "auto":
            dtypes = {{"fp32": "float32", "bf16": "bfloat16"}[self.config.trainer.dtype]}
        engine = ", bf16 parameters" if self.config.deepspeed.bf16_engine else ""
        return " and ".join(sorted(dtypes)) + engine if dtypes else None

    @cached_property
    def counts(self) -> dict[str, int | float]:
        return counting.summary(self.config.network(), self.config.trainer.seq_len)

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """Those of the tokens (`data`), the `tokenizer`, and the text before it was tokenised (`text`); None: unknown.

        The data folder counts only if it still holds the tokens that the run's checkpoints name.
        """
        found = {"data": self.facts.get("data_fingerprint"), "tokenizer": self.facts.get("tokenizer_fingerprint")}
        folder, manifest = Path(self.config.data.dir or ""), None
        with suppress(ConfigError):  # a folder that is broken now says nothing of the run
            manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None
        if manifest is None or found["data"] not in (None, manifest.fingerprint):
            return found | {"text": None}
        tokenizer = manifest.tokenizer.get("fingerprint")
        return {"data": manifest.fingerprint, "tokenizer": tokenizer, "text": manifest.source or None}

    def points(self, key: str) -> list[tuple[int, float]]:
        """Return (tokens, value) of a metric in order; the last value counts if a step was logged twice."""
        found = {line["tokens"]: line[key] for line in self.lines if line.get(key) is not None}
        return sorted(found.items())

    def at(self, key: str, tokens: int | None = None) -> float | None:
        """Return a metric at a number of tokens, on a straight line between two evaluations, or the last one (None).

        None if there is none, or none before or after that number of tokens.
        """
        points = self.points(key)
        at = points[-1][0] if points and tokens is None else tokens
        if not points or not points[0][0] <= at <= points[-1][0]:
            return None
        return float(np.interp(at, *zip(*points, strict=True)))

    def lately(self, key: str, tokens: int | None) -> float | None:
        """Return the mean of a noisy metric over the last tenth of the tokens until `tokens` (None: until the end)."""
        end = self.tokens if tokens is None else tokens
        return mean_of(value for at, value in self.points(key) if 0.9 * end <= at <= end)

    def typical(self, key: str) -> float | None:
        """Return the median of a metric over the run."""
        values = [value for _, value in self.points(key)]
        return statistics.median(values) if values else None

    def count(self, event: str) -> int | None:
        """Return how often an event happened; None if the run wrote no events."""
        return sum(line.get("event") == event for line in self.events) if self.events else None


@dataclass
class Method:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def mechanism(self) -> str:
        return self.first.config.model.name

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)

    def by_seed(self, of: Callable[[Run], float | None]) -> dict[int, float]:
        """Return `of(run)` by seed, without seeds for which it is None; the mean if a seed ran twice."""
        means = {seed: mean_of(of(run) for run in self.runs if run.seed == seed) for seed in self.seeds}
        return {seed: mean for seed, mean in means.items() if mean is not None}

    def mean(self, of: Callable[[Run], float | None]) -> float | None:
        """Return the mean of `of(run)` over the runs for which it is not None."""
        return mean_of(map(of, self.runs))

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (tokens, mean over the runs) at the numbers of tokens at which all of them logged the metric."""
        series = [dict(run.points(key)) for run in self.runs]
        shared = set.intersection(*map(set, series))
        return [(tokens, statistics.fmean(one[tokens] for one in series)) for tokens in sorted(shared)]

    def records(self, suite: str) -> list[dict]:
        """Return what the runs that have been evaluated on a suite have of it."""
        return [run.results[suite] for run in self.runs if suite in run.results]


def all_runs(methods: list[Method]) -> list[Run]:
    return [run for method in methods for run in method.runs]


def run_folders(name: str) -> list[Path]:
    """Return the run folder that is named, or those inside of a folder of a sweep. ConfigError if there are none."""
    path = Path(name).resolve()
    if (path / "config.yaml").is_file():
        return [path]
    inside = sorted({file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.yaml")})
    if not inside and path.exists():
        raise ConfigError(f"{name}: is neither a run folder (it has no config.yaml) nor holds any")
    if not inside:
        others = sorted(file.parent.name for file in path.parent.glob("*/config.yaml"))
        known = f"; in {path.parent} there are {', '.join(others)}" if others else ""
        raise ConfigError(f"{name}: there is no such folder{known}")
    return inside


def read_run(folder: Path) -> Run:
    """Return what a run folder holds. ConfigError if its config.yaml is not one of this code."""
    config = read_config(folder)
    results = {path.stem: read_json(path) for path in sorted(folder.glob("results/*.json"))}
    manifests = [path / "manifest.json" for path in reversed(checkpoint_dirs(folder))]
    manifests.append(folder / "checkpoint_facts.json")  # which runs from W&B have
    facts = map(read_json, filter(Path.exists, manifests))
    lines = read_lines(folder / "metrics.jsonl")
    decoding = read_lines(folder / "results/decoding.jsonl")
    return Run(
        dir=folder,
        config=config,
        lines=[only_numbers(line) for line in lines if is_count(line.get("step")) and is_count(line.get("tokens"))],
        events=read_events(folder),
        results={name: cleaned(record) for name, record in results.items() if isinstance(record.get("results"), dict)},
        decoding=[point for point in decoding if all(isinstance(point.get(key), kind) for key, kind in POINT.items())],
        facts=next(filter(None, facts), {}),
        finished=is_finished(folder),
    )


def cleaned(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of an evaluation without what is none of its kind: a folder may be anybody's."""
    blocks = {key: record[key] for key in ("results", "stderr", "metrics") if isinstance(record.get(key), dict)}
    blocks |= {key: only_numbers(blocks[key]) for key in ("results", "stderr") if key in blocks}
    if "metrics" in blocks:
        blocks["metrics"] = {task: metric for task, metric in blocks["metrics"].items() if isinstance(metric, str)}
    plain = {key: record[key] for key in ("step", "limit") if isinstance(record.get(key), int)}
    return blocks | plain | ({"suite": record["suite"]} if isinstance(record.get("suite"), str) else {})


def only_numbers(line: dict[str, Any]) -> dict[str, float | None]:
    return {key: value for key, value in line.items() if value is None or isinstance(value, int | float)}


def read_json(path: Path) -> dict:
    """Return a JSON object; an empty one, with a message, if the file has none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be read and is left out ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def name_methods(runs: list[Run]) -> list[Method]:
    """Return the runs by method: the paper's mechanisms in its order, then all others."""
    place = {mechanism: number for number, mechanism in enumerate(published.NAMES)}
    groups: dict[str, list[Run]] = {}
    for run in sorted(runs, key=lambda run: place.get(run.config.model.name, len(place))):
        settings = {key: value for key, value in run.identity.items() if key != "run.seed"}
        groups.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    methods, names = [], Counter()
    for group in groups.values():
        name = label(group[0].identity, [other[0].identity for other in groups.values()])
        names[name] += 1
        methods.append(Method(name if names[name] == 1 else f"{name} ({names[name]})", group))
    return methods


def label(ours: dict[str, Any], everyone: list[dict[str, Any]]) -> str:
    """Return the mechanism's name with what tells it from other methods of the same mechanism, three keys at most."""
    keys = [key for key in telling_keys(ours, everyone) if key not in ("model.name", "run.seed")]
    size = [ours["size.name"]] if "size.name" in keys else []
    rest = [key for key in keys if key != "size.name"]
    return " ".join([ours["model.name"], *size, *(f"{key}={ours[key]}" for key in rest[:3])])
