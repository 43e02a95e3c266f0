"""What a run does about losses and gradients that go wrong.

A step whose loss or gradient is not finite leaves the weights as they are (training.optim). After too many of them in a
row, or after a spike of the loss, the run goes back to its last checkpoint and passes over the data of the steps since,
as PaLM's did (Chowdhery et al. 2022, section 5.1). What it went through is in the run folder's events.jsonl, so that a
run that is started again knows.
"""

import math
import statistics
from collections import deque
from pathlib import Path

from configs.schema import TrainerConfig
from training.run_folder import read_events

WINDOW = 32  # steps whose mean loss a spike is measured from


class Health:
    """The state of a run's health; the same on every rank, as long as every rank observes the same numbers."""

    def __init__(self, trainer: TrainerConfig, saved: dict | None = None):
        self.trainer = trainer
        self.skipped_steps = self.skipped_in_a_row = 0
        self.losses = deque(maxlen=WINDOW)
        if saved:
            self.skipped_steps, self.skipped_in_a_row = saved["skipped_steps"], saved["skipped_in_a_row"]
            self.losses.extend(saved["losses"])

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        keys = {"skipped_steps": self.skipped_steps, "skipped_in_a_row": self.skipped_in_a_row}
        return keys | {"losses": list(self.losses)}

    def observe(self, loss: float, grad_norm: float) -> str | None:
        """Take note of a step; why the run should go back, if it should."""
        limit, spike = self.trainer.max_bad_steps, self.trainer.max_loss_spike
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= limit:
                return f"the loss or the gradient was not finite {limit} step{'s in a row' * (limit > 1)}"
            return None
        self.skipped_in_a_row = 0
        usual = statistics.fmean(self.losses) if len(self.losses) == WINDOW else math.inf
        if spike is not None and loss > usual + spike:
            return f"the loss is {loss:.4f}, more than trainer.max_loss_spike={spike} over its mean of {usual:.4f}"
        self.losses.append(loss)
        return None


class Rollbacks:
    """How often a run went back, and the data it passed over since: read from its events.jsonl.

    Going back from step s to the checkpoint of step c passes over the batches of the s - c steps in between.
    """

    def __init__(self, run_dir: Path):
        events = [event for event in read_events(run_dir) if event["event"] == "rollback"]
        self.done = [(event["to_step"], event["step"] - event["to_step"]) for event in events]

    def passed_over(self, step: int) -> int:
        """Global batches by which the data of the step after `step` lies further on than without any rollback."""
        return sum(batches for to_step, batches in self.done if to_step <= step)

    def since(self, step: int) -> int:
        """How often the run has gone back to the checkpoint of `step`, or to a later one."""
        return sum(to_step >= step for to_step, _ in self.done)
