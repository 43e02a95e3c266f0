"""Evaluations as the command line would start them."""

from configs.app import compose
from configs.load import load_flat
from configs.schema_eval import EvalConfig


def evaluation(*overrides: str) -> EvalConfig:
    return load_flat(compose("eval", ["device=cpu", *overrides]), EvalConfig)
