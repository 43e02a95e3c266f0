"""What a run knows of itself from step to step: whether it is well, and the time that its steps have taken."""

import math
import statistics
from dataclasses import dataclass, field

from training.config import TrainerConfig

WINDOW = 32  # steps whose mean loss a spike is measured from


@dataclass
class Health:
    """The state of a run's health, the same on every rank as long as every rank observes the same numbers."""

    trainer: TrainerConfig
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last WINDOW steps
    training_seconds: float = 0.0  # of its steps, without what lies between them

    def state(self) -> dict:
        """Return what a checkpoint keeps: everything but the settings."""
        return {key: value for key, value in vars(self).items() if key != "trainer"}

    def observe(self, loss: float, grad_norm: float) -> str | None:
        """Take note of a step; return why the run should go back, if it should."""
        limit, spike = self.trainer.max_bad_steps, self.trainer.max_loss_spike
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            steps = "1 step" if limit == 1 else f"{limit} steps in a row"
            is_enough = self.skipped_in_a_row >= limit
            return f"the loss or the gradient was not finite for {steps}" if is_enough else None
        self.skipped_in_a_row = 0
        usual = statistics.fmean(self.losses) if len(self.losses) == WINDOW else math.inf
        if spike is not None and loss > usual + spike:
            return f"the loss is {loss:.4f}, more than trainer.max_loss_spike={spike} over its mean of {usual:.4f}"
        self.losses = [*self.losses, loss][-WINDOW:]
        return None


class StepClock:
    """The time of the steps alone, without what lies between them; `health` keeps their sum over restarts."""

    def __init__(self, health: Health, flops_per_step: float, peak: float):
        self.health, self.flops_per_step, self.peak = health, flops_per_step, peak
        self.seconds: list[float] = []  # of the steps since the last reading

    def add(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.health.training_seconds += seconds

    def speed(self, tokens_per_step: int) -> dict[str, float]:
        """Return the metrics of speed since the last reading."""
        mean = statistics.fmean(self.seconds)
        self.seconds.clear()
        return {"perf/tokens_per_second": tokens_per_step / mean, "perf/mfu": self.flops_per_step / mean / self.peak}

    def totals(self, step: int) -> dict[str, float]:
        """Return the hours and operations of all steps up to number `step`: axes to plot against."""
        hours, flops = self.health.training_seconds / 3600, self.flops_per_step * step
        return {"perf/training_hours": hours, "perf/training_flops": flops}
