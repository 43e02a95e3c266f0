"""Evaluations as the command line would start them."""

from configs.app import configured
from eval.config import EvalConfig
from eval.loading import LoadedRun
from eval.results import Outcome


def evaluation(*overrides: str) -> EvalConfig:
    return configured(EvalConfig, ["device=cpu", *overrides])


def outcome(run: LoadedRun, *overrides: str) -> Outcome:
    """Return what a suite finds about a loaded run."""
    config = evaluation("run=x", *overrides)
    return config.suite.run(run, config)
