"""Whether a comparison is fair: what the methods share and what they do not, before any result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.compare.collect import Method, Run

MATCHED, DIFFERS, UNKNOWN = "matched", "not matched", "unknown"
SHOWN = 6  # different values that a reason spells out


@dataclass
class Check:
    """One property: the verdict on it, what the methods have, and why a difference matters."""

    name: str
    verdict: str
    values: dict[str, str]  # by method
    why: str = ""

    def grouped(self, at_most: int | None = None) -> str:
        """Return which methods have which value, or the value alone if all have the same."""
        groups: dict[str, list[str]] = {}
        for method, value in self.values.items():
            groups.setdefault(value, []).append(method)
        if len(groups) == 1:
            return next(iter(groups))
        shown = [f"{', '.join(methods)}: {value}" for value, methods in groups.items()]
        if at_most and len(shown) > at_most:
            shown = [*shown[:at_most], f"and {len(shown) - at_most} other values"]
        return "; ".join(shown)

    @property
    def reason(self) -> str:
        return f"{self.name}: {self.grouped(SHOWN)}" + (f". {self.why}" if self.why else "")


@dataclass
class Fairness:
    checks: list[Check]
    differing: dict[str, list[Any]]  # configuration keys in which the methods differ, with a value for each method
    same_tokens: bool  # the same tokens: losses can be compared
    same_text: bool  # the same text, whatever the tokenizer: bits per byte can be compared

    def with_verdict(self, verdict: str) -> list[Check]:
        return [check for check in self.checks if check.verdict == verdict]


def same(
    name: str,
    methods: list[Method],
    of: Callable[[Run], Any],
    show: Callable[[Any], str] = str,
    why: str = "",
    tolerance: float | None = None,
) -> Check:
    """Return whether all runs have the same `of(run)`, or the largest within `tolerance` of the smallest.

    None is a value that is not known.
    """
    values: dict[str, list] = {}
    for method in methods:
        found = [of(run) for run in method.runs]
        values[method.name] = [value for i, value in enumerate(found) if value not in found[:i]]
    everything = [value for found in values.values() for value in found]
    known = [value for value in everything if value is not None]
    matched = all(value == known[0] for value in known)
    if tolerance is not None and not matched:
        matched = max(known) <= (1 + tolerance) * min(known)
        why = f"The largest is {max(known) / min(known):.3f} times the smallest."
    verdict = DIFFERS
    if matched:
        verdict = MATCHED if len(known) == len(everything) else UNKNOWN
    shown = {
        method: " and ".join("?" if value is None else show(value) for value in found)
        for method, found in values.items()
    }
    return Check(name, verdict, shown, why if verdict == DIFFERS else "")


def check_seeds(methods: list[Method]) -> Check:
    shown = {method.name: ", ".join(map(str, method.seeds)) for method in methods}
    if any(method.seeds != methods[0].seeds for method in methods):
        return Check("seeds", DIFFERS, shown, "A seed decides the order of the data and the initial weights.")
    if len(set(methods[0].seeds)) < len(methods[0].seeds):
        return Check("seeds", DIFFERS, shown, "A seed ran twice.")
    return Check("seeds", MATCHED, shown)


def check(methods: list[Method], tolerance: float) -> Fairness:
    """Return every check, the most telling first; parameters and FLOPs are matched within `tolerance`."""

    def fingerprint(kind: str, why: str = "") -> Check:
        return same(kind, methods, lambda run: run.fingerprints[kind], lambda value: value[:12], why)

    data = fingerprint("data", "The runs saw different tokens, so their losses are not of the same thing.")
    tokenizer = fingerprint("tokenizer", "A loss per token depends on the tokenizer; bits per byte do not.")
    held_out = same("validation", methods, validation, why="Validation losses are over different tokens.")
    text = fingerprint("text")
    checks = [
        same("parameters", methods, lambda run: run.counts["params"], "{:,}".format, tolerance=tolerance),
        same(
            "training FLOPs per token", methods, lambda run: run.counts["training_flops_per_token"], "{:.3e}".format,
            tolerance=tolerance,
        ),
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
    only_tokenizer = tokenizer.verdict == data.verdict == DIFFERS and text.verdict == MATCHED
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
    problems = fairness.with_verdict(DIFFERS)
    doubts = [
        f"{check.name}: not known of every run (no checkpoint, and the data is not in place)"
        for check in fairness.with_verdict(UNKNOWN)
    ]
    alone = [method.name for method in methods if len(set(method.seeds)) < 2]
    if alone:
        doubts.append(f"one seed only ({', '.join(alone)}): a difference may be chance, and there is no interval")
    training = [run.config.run.name for method in methods for run in method.runs if not run.finished]
    if training:
        doubts.append(f"not finished: {', '.join(training)}")
    if problems:
        names = ", ".join(check.name for check in problems)
        return f"Not a fair comparison: not matched in {names}.", [check.reason for check in problems] + doubts
    if doubts:
        return "Matched in what could be checked, with reservations.", doubts
    return f"Matched in {', '.join(check.name for check in fairness.checks)}.", []
