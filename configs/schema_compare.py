"""The typed configuration of the commands that show runs side by side."""

from dataclasses import dataclass, field

from configs.errors import at_least


@dataclass
class CompareConfig:
    """`python -m eval.compare RUN ... [key=value ...]`."""

    runs: list[str]
    out: str | None = None  # default: the runs' common parent/compare
    baseline: str | None = None  # the method that the others are compared with; default: mha, else the first
    metric: str | None = None  # default: val/loss, or val/bits_per_byte where tokenizers differ
    target: float | None = None  # of the metric, for the tokens to reach it; default: the worst run's last
    confidence: float = 0.95
    smoothing: float = 0.02  # of training curves: the share of a run that a point averages over
    tolerance: float = 0.05  # of matching: parameters and FLOPs; with `reference`, of the gate (default there: 0.01)
    reference: str | None = None  # a stored reference: the gate instead of the report
    metrics: list[str] = field(default_factory=list)  # of the gate; default: losses and benchmarks
    update: bool = False  # write `reference` from the run instead of judging it

    def errors(self):
        if not self.runs:
            yield "no runs given: name run folders, as in python -m eval.compare runs/A runs/B"
        if not 0 < self.confidence < 1:
            yield f"confidence={self.confidence}: must lie between 0 and 1"
        if not 0 <= self.smoothing < 1:
            yield f"smoothing={self.smoothing}: must lie in [0, 1)"
        if not self.tolerance >= 0:
            yield f"tolerance={self.tolerance}: must be zero or a positive number"
        if self.reference and len(self.runs) != 1:
            yield f"reference={self.reference}: judges one run, and {len(self.runs)} are given"
        if not self.reference:
            yield from (f"{key}: only goes with reference=FILE" for key in ("metrics", "update") if getattr(self, key))


@dataclass
class DashboardConfig:
    """`python -m eval.dashboard project=...`."""

    project: str
    entity: str | None = None  # default: the one that is logged in
    group: str | None = None  # the experiment that the report is about; default: all runs
    name: str = "Attention mechanisms"
    tasks: list[str] = field(default_factory=list)  # benchmark metrics, as logged; default: the paper's
    max_runs: int = 50
    dry_run: bool = False  # print what would be saved, without a network

    def errors(self):
        yield from at_least(1, "", self, "max_runs")
        if "/" in self.project:
            yield f"project={self.project}: must be the project alone; give entity=... beside it"
