"""What a run does about losses and gradients that go wrong.

A step whose loss or gradient is not finite leaves the weights as they are (training.optim). After too many of them in a
row, or after a spike of the loss, the run goes back to its last checkpoint and skips the data of the steps since, as
PaLM did (Chowdhery et al. 2022, section 5.1). The rollbacks are in the run folder's events.jsonl, so that a run that is
started again knows of them.
"""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from training.config import TrainerConfig
from training.metrics import read_events

WINDOW = 32  # steps whose mean loss a spike is measured from


@dataclass
class Health:
    """The state of a run's health, the same on every rank as long as every rank observes the same numbers."""

    trainer: TrainerConfig
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    losses: list[float] = field(default_factory=list)  # of the last WINDOW steps

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


class Rollbacks:
    """How often a run went back, and the data it has skipped since, as its events.jsonl has it.

    Going back from step s to the checkpoint of step c skips the batches of the s - c steps in between.
    """

    def __init__(self, run_dir: Path):
        events = [event for event in read_events(run_dir) if event["event"] == "rollback"]
        self.done = [(event["to_step"], event["step"] - event["to_step"]) for event in events]

    def skipped_batches(self, step: int) -> int:
        """Return the global batches skipped before the step after `step`."""
        return sum(batches for to_step, batches in self.done if to_step <= step)

    def since(self, step: int) -> int:
        """Return how often the run has gone back to the checkpoint of `step`, or to a later one."""
        return sum(to_step >= step for to_step, _ in self.done)
