"""What run folders hold, read as it is at this moment: also of runs that still train."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.schema import Config
from data.shards import MANIFEST_FILE, read_manifest
from eval import published
from model import counting
from model.transformer import TransformerConfig
from training.metrics import read_metrics
from training.run_folder import read_config, read_events


@dataclass
class Run:
    """One run folder."""

    dir: Path
    config: Config
    lines: list[dict]  # of metrics.jsonl
    events: list[dict]  # of events.jsonl
    results: dict[str, dict]  # results/<suite>.json by suite
    decoding: list[dict]  # points of a decoding benchmark
    facts: dict[str, Any]  # of the newest checkpoint's manifest
    finished: bool
    method: str = ""  # what it is called beside the others: `name_methods`

    @property
    def name(self) -> str:
        return self.config.run.name

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @cached_property
    def identity(self) -> dict[str, Any]:
        return self.config.identity()

    @cached_property
    def counts(self) -> dict[str, int | float]:
        return counting.summary(TransformerConfig.from_config(self.config), self.config.trainer.seq_len)

    @cached_property
    def fingerprints(self) -> dict[str, str | None]:
        """Of the tokens (`data`), the `tokenizer`, and the text before it was tokenised (`text`), as far as known.

        The data folder is believed only where it still holds the tokens that the run's checkpoints name.
        """
        known = {
            "data": self.facts.get("data_fingerprint"),
            "tokenizer": self.facts.get("tokenizer_fingerprint"),
            "text": None,
        }
        folder = Path(self.config.data.dir or "")
        if (folder / MANIFEST_FILE).is_file():
            manifest = read_manifest(folder)
            if known["data"] in (None, manifest.fingerprint):
                found = (manifest.fingerprint, manifest.tokenizer.get("fingerprint"), manifest.source)
                known = dict(zip(known, found, strict=True))
        return known

    @property
    def tokens(self) -> int:
        return max((line["tokens"] for line in self.lines), default=0)

    def points(self, key: str) -> list[tuple[int, float]]:
        """(tokens, value) of a metric in order; the last value counts where a step was logged twice."""
        found = {line["tokens"]: line[key] for line in self.lines if line.get(key) is not None}
        return sorted(found.items())

    def last(self, key: str) -> float | None:
        points = self.points(key)
        return points[-1][1] if points else None

    def typical(self, key: str) -> float | None:
        """The median of a metric over the run."""
        points = self.points(key)
        return statistics.median(value for _, value in points) if points else None

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Seconds of training by count of tokens, from the logged speeds: without evaluation, saving and waiting."""
        spent, before, clock = 0.0, 0, {}
        for tokens, speed in self.points("perf/tokens_per_second"):
            spent += (tokens - before) / speed if speed > 0 else 0.0
            before, clock[tokens] = tokens, spent
        return clock

    def restarts(self) -> int | None:
        """Starts after the first; None where the run wrote no events."""
        return max(0, self.count("start") - 1) if self.events else None

    def count(self, event: str) -> int:
        return sum(line.get("event") == event for line in self.events)


@dataclass
class Method:
    """Runs that differ in their seed alone."""

    name: str
    runs: list[Run] = field(default_factory=list)

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def seeds(self) -> list[int]:
        return sorted(run.seed for run in self.runs)

    def at(self, key: str, tokens: int | None) -> dict[int, float]:
        """A metric by seed at a count of tokens; None: each run's last. The mean where a seed ran twice."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            value = run.last(key) if tokens is None else dict(run.points(key)).get(tokens)
            if value is not None:
                found.setdefault(run.seed, []).append(value)
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def lately(self, key: str, tokens: int | None) -> dict[int, float]:
        """A noisy metric by seed: the mean over the last tenth of the tokens until `tokens` (None: until the end)."""
        found: dict[int, list[float]] = {}
        for run in self.runs:
            end = run.tokens if tokens is None else tokens
            values = [value for at, value in run.points(key) if 0.9 * end <= at <= end]
            if values:
                found.setdefault(run.seed, []).append(sum(values) / len(values))
        return {seed: sum(values) / len(values) for seed, values in found.items()}

    def curve(self, key: str) -> list[tuple[int, float]]:
        """(tokens, mean over the runs) where all of them have logged the metric."""
        series = [dict(run.points(key)) for run in self.runs]
        shared = set.intersection(*(set(one) for one in series)) if series else set()
        return [(tokens, sum(one[tokens] for one in series) / len(series)) for tokens in sorted(shared)]


def run_folders(paths: Iterable[str]) -> list[Path]:
    """The run folders that are named, and those inside of a named folder of a sweep. ConfigError for anything else."""
    found, errors = [], []
    for path in map(Path, paths):
        inside = sorted({file.parent for depth in ("*", "*/*") for file in path.glob(f"{depth}/config.yaml")})
        if (path / "config.yaml").is_file():
            found.append(path)
        elif inside:
            found.extend(inside)
        elif not path.exists():
            errors.append(f"{path}: there is no such folder{near(path)}")
        else:
            errors.append(f"{path}: is neither a run folder (it has no config.yaml) nor holds any")
    if errors:
        raise ConfigError(*errors)
    return list(dict.fromkeys(folder.resolve() for folder in found))


def near(path: Path) -> str:
    others = sorted(file.parent.name for file in path.parent.glob("*/config.yaml"))
    return f"; in {path.parent} there are {', '.join(others)}" if others else ""


def read_run(folder: Path) -> Run:
    """ConfigError where its config.yaml is not of this code."""
    config = read_config(folder)
    results, decoding = read_results(folder)
    return Run(
        folder, config, read_metrics(folder / "metrics.jsonl"), read_events(folder), results, decoding,
        newest_facts(folder), (folder / "summary.json").is_file(),
    )  # fmt: skip


def read_results(folder: Path) -> tuple[dict[str, dict], list[dict]]:
    """(evaluations by file, points of decoding benchmarks) in a run's results; what cannot be read is named."""
    suites, decoding = {}, []
    for path in sorted(folder.glob("results/*.json*")):
        lines = read_metrics(path) if path.suffix == ".jsonl" else [read_json(path)]
        for record in lines:
            if "results" in record and "suite" in record:
                suites[path.stem] = record
            elif "tokens_per_second" in record and "decod" in path.stem:
                decoding.append(record)
    return suites, decoding


def read_json(path: Path) -> dict:
    """A JSON object, or several of them a line (then nothing is taken from it but the points of benchmarks)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        print(f"{path}: cannot be read and is left out ({error})")
        return {}
    return value if isinstance(value, dict) else {}


def newest_facts(folder: Path) -> dict:
    """What the manifest of the newest checkpoint says, without reading its tensors; W&B's runs have it in a file."""
    manifests = sorted(folder.glob("checkpoints/step_*/manifest.json"), reverse=True)
    found = (read_json(path) for path in [*manifests, folder / "checkpoint_facts.json"] if path.exists())
    return next((facts for facts in found if facts), {})


def usual_order(run: Run) -> int:
    """The paper's mechanisms as it lists them, then all others."""
    known, name = list(published.NAMES), run.config.model.name
    return known.index(name) if name in known else len(known)


def name_methods(runs: list[Run]) -> list[Method]:
    """The runs by method, in the usual order. A method is called by its mechanism, and by what else tells it apart."""
    by_settings: dict[str, list[Run]] = {}
    for run in sorted(runs, key=usual_order):
        settings = {key: value for key, value in run.identity.items() if key != "run.seed"}
        by_settings.setdefault(json.dumps(settings, sort_keys=True), []).append(run)
    groups = list(by_settings.values())
    methods = []
    for group in groups:
        ours = group[0].identity
        alike = [other[0].identity for other in groups if other[0].identity["model.name"] == ours["model.name"]]
        keys = [key for key in ours if any(other.get(key) != ours[key] for other in alike)]
        if "size.name" in keys:  # says it all about widths, layers and what follows from them
            keys = ["size.name", *(k for k in keys if not k.startswith(("size.", "model.")))]
        tokenizer = ["tokenizer.name"] if any(key.startswith("tokenizer.") for key in keys) else []
        data = ["data.name"] if any(key.startswith("data.") for key in keys) else []
        rest = [key for key in keys if not key.startswith(("tokenizer.", "data.")) and key != "run.seed"]
        parts = [ours["size.name"]] if "size.name" in keys else []
        parts += [f"{key}={ours[key]}" for key in [*rest, *tokenizer, *data] if key != "size.name"][:3]
        name = " ".join([ours["model.name"], *parts])
        taken = sum(method.name == name or method.name.startswith(f"{name} (") for method in methods)
        method = Method(f"{name} ({taken + 1})" if taken else name, group)
        for run in group:
            run.method = method.name
        methods.append(method)
    return methods
