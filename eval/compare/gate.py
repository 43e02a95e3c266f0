"""The regression gate: whether a run is worse than a stored reference."""

import json
import math
from pathlib import Path

from configs.errors import ConfigError, writing
from data.files import write_atomic
from eval.compare.collect import Run
from eval.compare.tables import DASH, number
from eval.tables import Table

# Whether less or more is better, by the end of a metric's name. Others are shown and not judged.
LOWER = ("loss", "perplexity", "bits_per_byte", "memory_gb", "skipped_steps")
HIGHER = ("acc", "acc_norm", "exact_match", "f1", "average", "accuracy", "tokens_per_second", "mfu")
JUDGED = ("val/", "eval/")  # by default: speeds depend on the machine as much as on the code


def metrics_of(run: Run) -> dict[str, float]:
    """Return the last value of all that a run logged, and its evaluations by their names in metrics.jsonl."""
    found = {key: run.at(key) for line in run.lines for key in line if key not in ("step", "tokens")}
    for suite, record in run.results.items():
        for key, value in record["results"].items():
            found.setdefault(f"eval/{key}" if key.count("/") == 1 else f"eval/{suite}/{key}", value)
    return numbers(found)


def numbers(metrics: dict) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float) and "/" in key}


def read_reference(path: str) -> dict:
    """Return {metrics, data, tokens} from what `update=true` wrote, or from another run's summary.json."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"reference={path}: there is no such file; update=true writes it from the run") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"reference={path}: cannot be read as JSON ({error})") from None
    metrics = numbers(content.get("metrics", content)) if isinstance(content, dict) else {}
    if not metrics:
        raise ConfigError(f"reference={path}: holds no metrics; it must be a summary.json, or written by update=true")
    return {"metrics": metrics, "data": content.get("data"), "tokens": content.get("tokens")}


def update(run: Run, path: str) -> int:
    """Write the reference from a run; return exit code 0. ConfigError if the run has no metrics."""
    name, metrics = run.config.run.name, metrics_of(run)
    if not metrics:
        raise ConfigError(f"{run.dir}: has no metrics to make a reference of")
    content = {"run": name, "data": run.fingerprints["data"], "tokens": run.tokens, "metrics": metrics}
    with writing("reference", path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), json.dumps(content, indent=2, sort_keys=True) + "\n")
    print(f"{path}: written from {name}")
    return 0


def judge(run: Run, path: str, tolerance: float, chosen: list[str]) -> int:
    """Print how a run differs from the reference; return 1 if a metric is missing or worse by `tolerance`, else 0.

    `tolerance` is a share of the reference's value. ConfigError if the two cannot be compared.
    """
    reference = read_reference(path)
    ours, theirs = metrics_of(run), reference["metrics"]
    if unknown := [key for key in chosen if key not in theirs]:
        raise ConfigError(*(f"metrics: {key} is not in the reference; it has {', '.join(theirs)}" for key in unknown))
    theirs_data, our_data = reference["data"], run.fingerprints["data"]
    if None not in (theirs_data, our_data) and theirs_data != our_data:
        raise ConfigError(
            f"{run.dir}: was trained on other data than the reference (fingerprint {our_data[:12]}, not "
            f"{theirs_data[:12]}), so their metrics cannot be compared"
        )
    rows, worse = [], []
    for key, expected in sorted(theirs.items()):
        found, name = ours.get(key), key.rpartition("/")[2]
        by_default = key.startswith(JUDGED) and name in LOWER + HIGHER and name != "perplexity"  # which is exp(loss)
        judged = key in chosen if chosen else by_default
        state = judgement(found, expected, -1 if name in LOWER else 1, tolerance)
        if judged and state in ("missing", "worse"):
            worse.append(key)
        cells = [DASH, DASH]
        if found is not None:
            share = f"{(found - expected) / abs(expected):+.2%}" if expected else DASH
            cells = [f"{found - expected:+.4f}", share]
        rows.append([key, number(expected), number(found), *cells, state if judged or found is None else ""])
    print(Table(["metric", "reference", "run", "difference", "relative", ""], rows))
    if reference["tokens"] not in (None, run.tokens):
        print(f"The reference is of {reference['tokens']:,} tokens, the run of {run.tokens:,}.")
    if worse:
        print(f"Worse than {path} by more than {tolerance:.2%}, or missing: {', '.join(worse)}")
        return 1
    print(f"Not worse than {path} by more than {tolerance:.2%}.")
    return 0


def judgement(found: float | None, expected: float, sign: int, tolerance: float) -> str:
    """Return missing, worse, better or ok; `sign` is -1 if less is better."""
    if found is None:
        return "missing"
    gain, margin = sign * (found - expected), tolerance * abs(expected)
    if not math.isfinite(found) or gain < -margin:
        return "worse"
    return "better" if gain > margin else "ok"
