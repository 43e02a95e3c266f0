"""The regression gate: is a run worse than a stored reference?"""

import json
import math
from pathlib import Path

from rich.console import Console

from configs.errors import ConfigError
from eval.compare.collect import Run
from eval.compare.tables import DASH, Table, number
from training.checkpoint import write_atomic

# Which way is better, by the end of a metric's name. Others are shown and not judged.
LOWER = ("loss", "perplexity", "bits_per_byte", "memory_gb", "skipped_steps")
HIGHER = ("acc", "acc_norm", "exact_match", "f1", "average", "accuracy", "tokens_per_second", "mfu")
JUDGED = ("val/", "eval/")  # unless `metrics` says what: speeds are the machine's as much as the code's


def metrics_of(run: Run) -> dict[str, float]:
    """A run's last value of everything it logged, and its evaluations by the names that they have in metrics.jsonl."""
    found = {key: run.last(key) for line in run.lines for key in line if key not in ("step", "tokens")}
    for stem, record in run.results.items():
        for key, value in record["results"].items():
            name = f"eval/{key}" if key.count("/") == 1 else f"eval/{stem}/{key}"
            found.setdefault(name, value)
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def read_reference(path: str) -> dict:
    """{metrics, and what they are of}, from what `update=true` wrote, or from another run's summary.json."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"reference={path}: there is no such file; update=true writes it from the run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"reference={path}: cannot be read as JSON ({error})") from None
    metrics = content.get("metrics", content) if isinstance(content, dict) else {}
    metrics = {key: value for key, value in metrics.items() if isinstance(value, int | float) and "/" in key}
    if not metrics:
        raise ConfigError(f"reference={path}: holds no metrics; it must be a summary.json, or written by update=true")
    return {"data": None, "tokens": content.get("tokens")} | content | {"metrics": metrics}


def update(run: Run, path: str) -> None:
    content = {"run": run.name, "data": run.fingerprints["data"], "tokens": run.tokens, "metrics": metrics_of(run)}
    if not content["metrics"]:
        raise ConfigError(f"{run.dir}: has no metrics to make a reference of")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(Path(path), json.dumps(content, indent=2, sort_keys=True) + "\n")


def direction(metric: str) -> int:
    """1 where more is better, -1 where less is, 0 where it is not known."""
    last = metric.rpartition("/")[2]
    return 1 if last in HIGHER else -1 if last in LOWER else 0


def judge(run: Run, reference: dict, tolerance: float, chosen: list[str]) -> tuple[Table, list[str]]:
    """The table of differences, and the metrics in which the run is worse by more than `tolerance` (a share of the
    reference's value) or which it does not have."""
    ours, theirs = metrics_of(run), reference["metrics"]
    unknown = [key for key in chosen if key not in theirs]
    if unknown:
        raise ConfigError(*(f"metrics: {key} is not in the reference; it has {', '.join(theirs)}" for key in unknown))
    known = (reference["data"], run.fingerprints["data"])
    if None not in known and known[0] != known[1]:
        raise ConfigError(
            f"{run.dir}: was trained on other data than the reference (fingerprint {known[1][:12]}, not "
            f"{known[0][:12]}), so that their metrics cannot be compared"
        )
    rows, worse = [], []
    for key, expected in sorted(theirs.items()):
        by_default = key.startswith(JUDGED) and direction(key) != 0 and not key.endswith("/perplexity")  # exp(loss)
        judged = key in chosen if chosen else by_default
        found = ours.get(key)
        if found is None:
            state = "MISSING" if judged else "missing"
        else:
            change = (found - expected) * (direction(key) or 1)
            beyond = not math.isfinite(found) or change < -tolerance * abs(expected)
            state = (
                "" if not judged else "WORSE" if beyond else "better" if change > tolerance * abs(expected) else "ok"
            )
        if state in ("MISSING", "WORSE"):
            worse.append(key)
        gap = None if found is None else found - expected
        share = gap / abs(expected) if gap is not None and expected else None
        rows.append([key, number(expected), number(found), DASH if gap is None else f"{gap:+.4f}",
                     DASH if share is None else f"{share:+.2%}", state])  # fmt: skip
    return Table(["metric", "reference", "run", "difference", "relative", ""], rows), worse


def gate(run: Run, path: str, tolerance: float, chosen: list[str], console: Console, show) -> int:
    """Print the table; 0 where the run is no worse than the reference, else 1."""
    reference = read_reference(path)
    found, worse = judge(run, reference, tolerance, chosen)
    show(console, found)
    if reference["tokens"] not in (None, run.tokens):
        console.print(f"The reference is of {reference['tokens']:,} tokens, the run of {run.tokens:,}.")
    if worse:
        console.print(f"WORSE than {path} by more than {tolerance:.2%}, or missing: {', '.join(worse)}")
        return 1
    console.print(f"Not worse than {path} by more than {tolerance:.2%}.")
    return 0
