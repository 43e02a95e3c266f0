"""Whether a comparison is fair: what the methods share and what they do not, before any result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval.compare.collect import Method, Run

MATCHED, DIFFERS, UNKNOWN = "matched", "not matched", "unknown"
SHOWN = 6  # different values that are spelled out


class Check(NamedTuple):
    """One property, the verdict on it, and which methods have which value, with the reason why a difference matters."""

    name: str
    verdict: str
    values: str


@dataclass
class Fairness:
    checks: list[Check]
    differing: dict[str, list[Any]]  # configuration keys in which the methods differ, with a value for each method
    same_tokens: bool  # the same tokens: losses can be compared
    same_text: bool  # the same text, whatever the tokenizer: bits per byte can be compared


def grouped(values: dict[str, str], why: str = "") -> str:
    """Return which methods have which value, or the value alone if all have the same; and `why` that matters."""
    groups: dict[str, list[str]] = {}
    for method, value in values.items():
        groups.setdefault(value, []).append(method)
    if len(groups) == 1:
        return next(iter(groups))
    shown = [f"{', '.join(methods)}: {value}" for value, methods in groups.items()]
    if len(shown) > SHOWN:
        shown = [*shown[:SHOWN], f"and {len(shown) - SHOWN} other values"]
    return "; ".join(shown) + (f". {why}" if why else "")


def same(
    name: str, methods: list[Method], of: Callable[[Run], Any], show: Callable[[Any], str] = str, why: str = "",
    tolerance: float | None = None,
) -> Check:  # fmt: skip
    """Return whether all runs have the same `of(run)`, or the largest within `tolerance` of the smallest.

    None is a value that is not known.
    """
    found = {method.name: list(dict.fromkeys(of(run) for run in method.runs)) for method in methods}
    everything = [value for values in found.values() for value in values]
    known = [value for value in everything if value is not None]
    matched = len(set(known)) <= 1
    if tolerance is not None and not matched:
        matched = max(known) <= (1 + tolerance) * min(known)
        why = "" if matched else f"The largest is {max(known) / min(known):.3f} times the smallest."
    shown = {
        method: " and ".join("?" if value is None else show(value) for value in values)
        for method, values in found.items()
    }
    if not matched:
        return Check(name, DIFFERS, grouped(shown, why))
    return Check(name, MATCHED if len(known) == len(everything) else UNKNOWN, grouped(shown))


def check_seeds(methods: list[Method]) -> Check:
    shown = {method.name: ", ".join(map(str, method.seeds)) for method in methods}
    if any(method.seeds != methods[0].seeds for method in methods):
        why = "A seed decides the order of the data and the initial weights."
        return Check("seeds", DIFFERS, grouped(shown, why))
    if len(set(methods[0].seeds)) < len(methods[0].seeds):
        return Check("seeds", DIFFERS, f"{grouped(shown)}. A seed ran twice.")
    return Check("seeds", MATCHED, grouped(shown))


def check(methods: list[Method], tolerance: float) -> Fairness:
    """Return every check, the most telling first; parameters and FLOPs are matched within `tolerance`."""

    def fingerprint(kind: str, why: str = "") -> Check:
        return same(kind, methods, lambda run: run.fingerprints[kind], lambda value: value[:12], why)

    data = fingerprint("data", "The runs saw different tokens, so their losses are not of the same thing.")
    tokenizer = fingerprint("tokenizer", "A loss per token depends on the tokenizer; bits per byte do not.")
    held_out = same("validation", methods, validation, why="Validation losses are over different tokens.")
    flops = "training_flops_per_token"
    checks = [
        same("parameters", methods, lambda run: run.counts["params"], "{:,}".format, tolerance=tolerance),
        same("training FLOPs per token", methods, lambda run: run.counts[flops], "{:.3e}".format, tolerance=tolerance),
        same(
            "tokens trained", methods, lambda run: run.tokens, "{:,}".format,
            "Results are compared at the most tokens that all runs have reached.",
        ),
        same(
            "horizon", methods, lambda run: run.config.trainer.horizon, "{:,} steps".format,
            "The learning rate decays over the horizon, so runs differ before their ends too.",
        ),
        data, tokenizer, held_out,
        same("batch", methods, lambda run: run.config.trainer.tokens_per_step, "{:,} tokens per step".format),
        check_seeds(methods),
        same("optimizer", methods, lambda run: settings(run, "optim.")),
        same("schedule", methods, lambda run: settings(run, "schedule.")),
    ]  # fmt: skip
    identities = [method.first.identity for method in methods]
    keys = sorted({key for identity in identities for key in identity} - {"run.seed"})
    rows = {key: [identity.get(key) for identity in identities] for key in keys}
    differing = {key: values for key, values in rows.items() if any(value != values[0] for value in values)}
    same_tokens = DIFFERS not in (data.verdict, tokenizer.verdict, held_out.verdict)
    only_tokenizer = tokenizer.verdict == data.verdict == DIFFERS and fingerprint("text").verdict == MATCHED
    return Fairness(checks, differing, same_tokens, same_text=same_tokens or only_tokenizer)


def validation(run: Run) -> str:
    trainer = run.config.trainer
    if trainer.eval_batches:
        return f"the first {trainer.eval_batches * trainer.global_batch_size:,} sequences of {trainer.seq_len:,} tokens"
    return f"all sequences of {trainer.seq_len:,} tokens"


def settings(run: Run, prefix: str) -> str:
    found = {key.removeprefix(prefix): value for key, value in run.identity.items() if key.startswith(prefix)}
    return ", ".join(f"{key}={value}" for key, value in found.items())


def verdict(fairness: Fairness, methods: list[Method]) -> tuple[str, list[str]]:
    """Return the report's first words and the reasons for them."""
    if len(methods) == 1:
        return "One method, so nothing is compared.", []
    problems = [check for check in fairness.checks if check.verdict == DIFFERS]
    unknown = [check.name for check in fairness.checks if check.verdict == UNKNOWN]
    doubts = [f"{name}: not known of every run (no checkpoint, and the data is not in place)" for name in unknown]
    if alone := [method.name for method in methods if len(set(method.seeds)) < 2]:
        doubts.append(f"one seed only ({', '.join(alone)}): a difference may be chance, and there is no interval")
    if training := [run.config.run.name for method in methods for run in method.runs if not run.finished]:
        doubts.append(f"not finished: {', '.join(training)}")
    if problems:
        names = ", ".join(check.name for check in problems)
        reasons = [f"{check.name}: {check.values}" for check in problems]
        return f"Not a fair comparison: not matched in {names}.", reasons + doubts
    if doubts:
        return "Matched in what could be checked, with reservations.", doubts
    return f"Matched in {', '.join(check.name for check in fairness.checks)}.", []
