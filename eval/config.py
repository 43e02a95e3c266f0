"""What an evaluation is asked for: the keys of `python -m eval.run`, and what every suite has."""

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field, model_validator

from configs.errors import Mistakes
from configs.load import Block, Choice, Command
from eval.loading import LoadedRun
from eval.results import Outcome
from training.device import Device, Dtype


class SuiteConfig(Choice):
    """A suite of measurements that runs itself. A YAML in configs/suite/ names its class in `_target_`."""

    name: str

    @property
    def needs_run(self) -> bool:
        """False if the suite is only asked to `fetch` its data."""
        return True

    def fetch(self) -> None:
        """Download what the suite reads."""

    def check(self) -> None:
        """Raise a ConfigError for whatever can be found missing without a model."""

    @abstractmethod
    def run(self, run: LoadedRun, options: "EvalConfig") -> Outcome | None:
        """Return what the suite finds. Every rank calls this; rank 0 is sure to get the outcome."""


class KernelConfig(Block):
    kernel: str | None = None  # how the core computes; null: as the run's configuration says


class EvalConfig(Command):
    """`python -m eval.run`."""

    yaml: ClassVar[str] = "eval"

    suite: SuiteConfig
    run: str | None = None  # the run folder
    step: int | None = None  # of the checkpoint; null: the newest
    limit: int | None = Field(None, ge=1)  # at most this many windows, or questions of each task; null: all
    batch_size: int = Field(16, ge=1)  # sequences of full length in a forward pass; more if they are shorter
    core: KernelConfig = KernelConfig()
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _has_run(self):
        if self.run is None and self.suite.needs_run:
            raise Mistakes("run is not set: give the run folder, as in run=runs/first")
        return self
