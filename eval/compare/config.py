"""The options of `python -m eval.compare RUN ... [key=value ...]`."""

from pydantic import Field, model_validator

from configs.errors import Mistakes
from configs.load import Block

TOLERANCE = 0.05  # of parameters and FLOPs, to be called matched
GATE_TOLERANCE = 0.01  # of each metric, as a share of the reference's value


class CompareConfig(Block):
    runs: list[str]
    out: str | None = None  # default: the runs' common parent/compare
    baseline: str | None = None  # the method that the others are compared with; default: mha, else the first
    metric: str | None = None  # default: val/loss, or val/bits_per_byte if only the tokenizers differ
    target: float | None = None  # of the metric, for the tokens to reach it; default: the worst run's last
    confidence: float = Field(0.95, gt=0, lt=1)
    smoothing: float = Field(0.02, ge=0, lt=1)  # of training curves: the share of a run that a point averages over
    time: bool = False  # compare training time too, which means something only on machines without other load
    tolerance: float | None = Field(None, ge=0)  # default: TOLERANCE, or GATE_TOLERANCE with a reference
    reference: str | None = None  # a stored reference: the regression gate instead of the report
    metrics: list[str] = Field(default_factory=list)  # that the gate judges; default: validation and evaluations
    update: bool = False  # write `reference` from the run instead of judging it

    @model_validator(mode="after")
    def _fit(self):
        lines = []
        if not self.runs:
            lines.append("no runs given: name run folders, as in python -m eval.compare runs/A runs/B")
        if self.reference and len(self.runs) > 1:
            lines.append(f"reference={self.reference}: judges one run, and {len(self.runs)} are given")
        if not self.reference:
            lines += [f"{key}: only goes with reference=FILE" for key in ("metrics", "update") if getattr(self, key)]
        if self.tolerance is None:
            self.tolerance = GATE_TOLERANCE if self.reference else TOLERANCE
        if lines:
            raise Mistakes(*lines)
        return self
