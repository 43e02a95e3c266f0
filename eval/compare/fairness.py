"""Whether a comparison is fair: what the methods share and what they do not, before any result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from eval.compare.collect import Method, Run, all_runs

MATCHED, DIFFERS, UNKNOWN = "matched", "not matched", "unknown"
Verdict = tuple[str, list[str]]  # in words, and the reasons for it
SHOWN = 6  # different values that are spelled out


class Check(NamedTuple):
    """One property, the verdict on it, and which methods have which value, with the reason why a difference matters."""

    name: str
    verdict: str
    values: str


@dataclass
class Fairness:
    checks: list[Check]
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


def check(methods: list[Method], tolerance: float) -> Fairness:
    """Return every check, the most telling first; parameters and FLOPs are matched within `tolerance`."""

    def same(
        name: str, of: Callable[[Run], Any], show: Callable[[Any], str] = str, why: str = "", share: float = 0.0
    ) -> Check:
        """Check that all runs have the same `of(run)` (None: unknown), or the largest within `share` of the least."""
        found = {method.name: list(dict.fromkeys(map(of, method.runs))) for method in methods}
        everything = [value for values in found.values() for value in values]
        known = [value for value in everything if value is not None]
        shown = {
            method: " and ".join("?" if value is None else show(value) for value in values)
            for method, values in found.items()
        }
        if len(set(known)) > 1 and not (share and max(known) <= (1 + share) * min(known)):
            reason = f"The largest is {max(known) / min(known):.3f} times the smallest." if share else why
            return Check(name, DIFFERS, grouped(shown, reason))
        return Check(name, MATCHED if len(known) == len(everything) else UNKNOWN, grouped(shown))

    def count(name: str, key: str, spec: str) -> Check:
        return same(name, lambda run: run.counts[key], spec.format, share=tolerance)

    def fingerprint(kind: str, why: str = "") -> Check:
        return same(kind, lambda run: run.fingerprints[kind], lambda value: str(value)[:12], why)

    def settings(name: str, prefix: str) -> Check:
        def of(run: Run) -> str:
            keys = [key for key in run.identity if key.startswith(prefix)]
            return ", ".join(f"{key.removeprefix(prefix)}={run.identity[key]}" for key in keys)

        return same(name, of)

    seeds = {run.dir: ", ".join(map(str, method.seeds)) for method in methods for run in method.runs}
    data = fingerprint("data", "The runs saw different tokens, so their losses are not of the same thing.")
    tokenizer = fingerprint("tokenizer", "A loss per token depends on the tokenizer; bits per byte do not.")
    held_out = same("validation", validation, why="Validation losses are over different tokens.")
    checks = [
        count("parameters", "params", "{:,}"),
        count("training FLOPs per token", "training_flops_per_token", "{:.3e}"),
        same(
            "tokens trained", lambda run: run.tokens, "{:,}".format,
            "Results are compared at the most tokens that all runs have reached.",
        ),
        same(
            "horizon", lambda run: run.config.trainer.horizon, "{:,} steps".format,
            "The learning rate decays over the horizon, so runs differ before their ends too.",
        ),
        data, tokenizer, held_out,
        same("batch", lambda run: run.config.trainer.tokens_per_step, "{:,} tokens per step".format),
        same("seeds", lambda run: seeds[run.dir],
             why="A seed decides the order of the data and the initial weights."),
        settings("optimizer", "optim."), settings("schedule", "schedule."),
        same("starting weights", lambda run: run.config.trainer.init_from or run.config.trainer.fork_from or "random",
             why="Weights that were trained before have seen more tokens than are counted here."),
        same("precision", lambda run: run.precision),
        same("document mask", lambda run: run.config.data.document_mask),
    ]  # fmt: skip
    same_tokens = DIFFERS not in (data.verdict, tokenizer.verdict, held_out.verdict)
    only_tokenizer = tokenizer.verdict == data.verdict == DIFFERS and fingerprint("text").verdict == MATCHED
    return Fairness(checks, same_tokens, same_text=same_tokens or only_tokenizer)


def validation(run: Run) -> str:
    trainer = run.config.trainer
    count = f"the first {trainer.eval_batches * trainer.global_batch_size:,}" if trainer.eval_batches else "all"
    return f"{count} sequences of {trainer.seq_len:,} tokens"


def verdict(fairness: Fairness, methods: list[Method]) -> Verdict:
    """Return the report's first words and the reasons for them."""
    if len(methods) == 1:
        return "One method, so nothing is compared.", []
    problems = [check for check in fairness.checks if check.verdict == DIFFERS]
    unknown = [check.name for check in fairness.checks if check.verdict == UNKNOWN]
    doubts = [f"{name}: not known of every run (no checkpoint, and the data is not in place)" for name in unknown]
    if twice := [method.name for method in methods if len(set(method.seeds)) < len(method.seeds)]:
        doubts.append(f"a seed ran twice ({', '.join(twice)}): its mean counts once")
    if alone := [method.name for method in methods if len(set(method.seeds)) < 2]:
        doubts.append(f"one seed only ({', '.join(alone)}): a difference may be chance, and there is no interval")
    if training := [run.config.run.name for run in all_runs(methods) if not run.finished]:
        doubts.append(f"not finished: {', '.join(training)}")
    if problems:
        names = ", ".join(check.name for check in problems)
        reasons = [f"{check.name}: {check.values}" for check in problems]
        return f"Not a fair comparison: not matched in {names}.", reasons + doubts
    if doubts:
        return "Matched in what could be checked, with reservations.", doubts
    return f"Matched in {', '.join(check.name for check in fairness.checks)}.", []
