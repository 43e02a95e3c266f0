"""Evaluations as the command line would start them, and exports of models that were not trained."""

import json
from pathlib import Path

from configs.app import configured
from eval.config import EvalConfig
from eval.export.folder import write_weights
from eval.export.network import exported
from eval.loading import LoadedRun
from eval.results import Outcome
from model.transformer import Transformer


def evaluation(*overrides: str) -> EvalConfig:
    return configured(EvalConfig, ["device=cpu", *overrides])


def outcome(run: LoadedRun, *overrides: str) -> Outcome:
    """Return what a suite finds about a loaded run."""
    config = evaluation("run=x", *overrides)
    return config.suite.run(run, config)


def write_export(net: Transformer, folder: Path, **options) -> bool:
    """Write a model as `python -m eval.export` does, without a tokenizer; return whether it has code of its own."""
    made = exported(net)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(made.config | {"dtype": "float32", "max_position_embeddings": 64}))
    for name, text in made.files.items():
        (folder / name).write_text(text)
    write_weights(made.weights, folder, **options)
    return bool(made.files)
