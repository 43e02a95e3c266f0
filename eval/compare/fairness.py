"""Is the comparison fair? What the methods share and what they don't, before any result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eval.compare.collect import Method, Run

MATCHED, DIFFERS, UNKNOWN = "matched", "NOT matched", "unknown"


@dataclass
class Check:
    """One property: how it stands, what the methods have, and why it matters where it differs."""

    name: str
    verdict: str
    values: dict[str, str]  # by method
    why: str = ""

    def grouped(self, most: int | None = None) -> str:
        """Which methods have what; the value alone where all have it."""
        groups: dict[str, list[str]] = {}
        for method, value in self.values.items():
            groups.setdefault(value, []).append(method)
        if len(groups) == 1:
            return next(iter(groups))
        shown = "; ".join(f"{', '.join(methods)}: {value}" for value, methods in list(groups.items())[:most])
        return shown + (f"; and {len(groups) - most} other values" if most and len(groups) > most else "")

    def sentence(self) -> str:
        return f"{self.name}: {self.grouped(6)}" + (f". {self.why}" if self.why else "")


@dataclass
class Fairness:
    checks: list[Check]
    differing: dict[str, list[Any]]  # config keys in which the methods differ, a value a method
    same_tokens: bool  # the same tokens: losses can be compared
    same_text: bool  # the same text, whatever the tokenizer: bits per byte can be compared

    @property
    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == DIFFERS]

    @property
    def unknown(self) -> list[Check]:
        return [check for check in self.checks if check.verdict == UNKNOWN]


def values_of(methods: list[Method], of: Callable[[Run], Any]) -> dict[str, list]:
    """What each method's runs have, without repetition."""
    found = {}
    for method in methods:
        values = [of(run) for run in method.runs]
        found[method.name] = [value for i, value in enumerate(values) if value not in values[:i]]
    return found


def same(name: str, methods: list[Method], of: Callable[[Run], Any], show: Callable[[Any], str] = str, why="") -> Check:
    """Whether all runs have the same; None is what is not known of a run."""
    found = values_of(methods, of)
    everything = [value for values in found.values() for value in values]
    verdict = MATCHED if all(value == everything[0] for value in everything) else DIFFERS
    if any(value is None for value in everything):
        known = [value for value in everything if value is not None]
        verdict = UNKNOWN if all(value == known[0] for value in known) else DIFFERS
    return Check(name, verdict, {m: " and ".join("?" if v is None else show(v) for v in vs) for m, vs in found.items()},
                 why)  # fmt: skip


def close(name: str, methods: list[Method], of: Callable[[Run], float], show, tolerance: float, why="") -> Check:
    """Whether the largest is within `tolerance` of the smallest."""
    found = values_of(methods, of)
    everything = [value for values in found.values() for value in values]
    verdict = MATCHED if max(everything) <= (1 + tolerance) * min(everything) else DIFFERS
    shown = {method: " and ".join(map(show, values)) for method, values in found.items()}
    if verdict == DIFFERS:
        why = f"The largest is {max(everything) / min(everything):.3f} x the smallest. {why}".strip()
    return Check(name, verdict, shown, why)


def seeds(methods: list[Method]) -> Check:
    shown = {method.name: ", ".join(map(str, method.seeds)) for method in methods}
    alike = all(method.seeds == methods[0].seeds for method in methods)
    twice = any(len(set(method.seeds)) < len(method.seeds) for method in methods)
    why = "A seed decides the order of the data and the initial weights." if not alike else ""
    return Check("seeds", MATCHED if alike and not twice else DIFFERS, shown, why or "A seed ran twice." * twice)


def validation(run: Run) -> str:
    trainer = run.config.trainer
    count = trainer.eval_batches and trainer.eval_batches * trainer.global_batch_size
    return f"{f'the first {count:,}' if count else 'all'} sequences of {trainer.seq_len:,} tokens"


def check(methods: list[Method], tolerance: float) -> Fairness:
    """Every check, the most telling first."""
    shorten = lambda fingerprint: fingerprint[:12]  # noqa: E731
    data = same("data", methods, lambda run: run.fingerprints["data"], shorten,
                "The runs saw different tokens, so their losses are not of the same thing.")  # fmt: skip
    tokenizer = same("tokenizer", methods, lambda run: run.fingerprints["tokenizer"], shorten,
                     "A loss a token means something else with each tokenizer; bits per byte does not.")  # fmt: skip
    text = same("text", methods, lambda run: run.fingerprints["text"] or None, shorten)
    held_out = same("validation", methods, validation, why="Validation losses are over different tokens.")
    checks = [
        close("parameters", methods, lambda run: run.counts["params"], lambda n: f"{n:,}", tolerance),
        close("training FLOPs a token", methods, lambda run: run.counts["training_flops_per_token"],
              lambda n: f"{n:.3e}", tolerance),
        same("tokens trained", methods, lambda run: run.tokens, lambda n: f"{n:,}",
             "Results are compared at the most tokens that all have reached."),
        same("horizon", methods, lambda run: run.config.trainer.horizon, lambda n: f"{n:,} steps",
             "The learning rate decays over the horizon, so that runs differ before their ends too."),
        data, tokenizer, held_out,
        same("batch", methods, lambda run: run.config.trainer.tokens_per_step, lambda n: f"{n:,} tokens a step"),
        seeds(methods),
        same("optimizer", methods, lambda run: picked(run, "optim.")),
        same("schedule", methods, lambda run: picked(run, "schedule.")),
    ]  # fmt: skip
    identities = [method.first.identity for method in methods]
    keys = sorted({key for identity in identities for key in identity} - {"run.seed"})
    differing = {key: [identity.get(key) for identity in identities] for key in keys}
    differing = {key: values for key, values in differing.items() if any(value != values[0] for value in values)}
    same_tokens = DIFFERS not in (data.verdict, tokenizer.verdict, held_out.verdict)
    return Fairness(checks, differing, same_tokens, same_tokens or (tokenizer.verdict == DIFFERS == data.verdict
                    and text.verdict == MATCHED))  # fmt: skip


def picked(run: Run, prefix: str) -> str:
    parts = (f"{key.removeprefix(prefix)}={value}" for key, value in run.identity.items() if key.startswith(prefix))
    return ", ".join(parts)


def verdict(fairness: Fairness, methods: list[Method]) -> tuple[str, list[str]]:
    """The report's first words, and the reasons for them."""
    if len(methods) == 1:
        return "One method, so nothing is compared.", []
    reasons = [check.sentence() for check in fairness.problems]
    unknown = [f"{check.name}: not known of every run (no checkpoint, and no data in place)" for check in
               fairness.unknown]  # fmt: skip
    alone = [method.name for method in methods if len(set(method.seeds)) < 2]
    if alone:
        unknown.append(f"one seed only ({', '.join(alone)}): a difference may be chance, and no interval can be given")
    training = [run.name for method in methods for run in method.runs if not run.finished]
    if training:
        unknown.append(f"not finished: {', '.join(training)}")
    if reasons:
        return f"NOT fair: not matched in {', '.join(check.name for check in fairness.problems)}.", reasons + unknown
    if unknown:
        return "Matched in what could be checked, with reservations.", unknown
    return f"Matched in {', '.join(check.name for check in fairness.checks)}.", []
