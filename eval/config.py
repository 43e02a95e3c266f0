"""What an evaluation is asked for: the keys of `python -m eval.run`, and what every suite has."""

import hashlib
import re
from abc import abstractmethod
from typing import ClassVar

from pydantic import Field, model_validator

from configs.app import configured
from configs.block import Block, Choice, to_dict
from configs.errors import ConfigError, Mistakes
from configs.kinds import MOST_SEQUENCES, MOST_STEPS, Name, OptionalPath
from configs.load import Command, flatten, shown
from eval.loading import LoadedRun
from eval.results import Outcome
from training.device import Device, Dtype

LONGEST_NAME = 100  # characters that tell a result's name from its suite's


class SuiteConfig(Choice):
    """A suite of measurements that runs itself. A YAML in configs/suite/ names its class in `_target_`."""

    how: ClassVar[tuple[str, ...]] = ()  # keys that do not change what is asked

    name: Name

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
    run: OptionalPath = None  # the run folder
    step: int | None = Field(None, ge=0, le=MOST_STEPS)  # of the checkpoint; null: the newest
    # at most this many windows, or questions of each task; null: all
    limit: int | None = Field(None, ge=1, le=MOST_STEPS)
    # sequences of full length in a forward pass; more if they are shorter
    batch_size: int = Field(16, ge=1, le=MOST_SEQUENCES)
    core: KernelConfig = KernelConfig()
    device: Device = "auto"
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _has_run(self):
        if self.run is None and self.suite.needs_run:
            raise Mistakes("run is not set: give the run folder, as in run=runs/first")
        return self


def question(options: EvalConfig) -> str:
    """Return what tells the name of a result from that of the suite as its YAML has it: nothing if nothing differs."""
    asked = {"limit": options.limit} | flatten(to_dict(options.suite))
    try:
        plain = configured(EvalConfig, [f"suite={options.suite.name}", "run=any"]).suite
    except ConfigError:  # a suite that has another name than its YAML, or that asks nothing by itself
        plain = type(options.suite).model_construct(name=options.suite.name)
    usual = {"limit": None} | flatten(to_dict(plain))
    keys = [key for key in asked if key not in options.suite.how and asked[key] != usual.get(key)]
    words = [f"_{key}={shown(asked[key]).strip('[]').replace(',', '+')}" for key in keys]
    name = "".join(words)
    is_plain = len(name) <= LONGEST_NAME and re.fullmatch(r"[\w.=+-]*", name)
    return name if is_plain else "_" + hashlib.sha256(name.encode()).hexdigest()[:8]
