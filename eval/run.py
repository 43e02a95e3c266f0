"""Evaluate a run's newest checkpoint: `python -m eval.run run=runs/NAME [suite=perplexity]`.

Results go to results/<suite>.json in the run folder.
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from configs.app import app
from configs.load import load_flat
from configs.schema import EvalConfig
from data.loader import EvalLoader
from data.shards import TokenShards
from eval.loading import LoadedRun, load_run
from eval.perplexity import bits_per_byte, evaluate, perplexity
from training.checkpoint import write_atomic


def perplexity_suite(run: LoadedRun, config: EvalConfig) -> dict[str, float]:
    """Loss over the whole validation split of the run's own data, or over `limit` sequences of it."""
    shards = TokenShards(run.config.data.dir, "val")
    batches = EvalLoader(shards, run.config.trainer.seq_len, config.batch_size, 0, 1, max_samples=config.limit)
    progress = track(batches, description="perplexity", total=len(batches), transient=True)
    loss, tokens = evaluate(run.model, progress, run.runtime.device)
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, shards.manifest.bytes_per_token("val")),
        "unigram_entropy": shards.manifest.unigram_entropy,
        "tokens": tokens,
    }


SUITES = {"perplexity": perplexity_suite}


@torch.no_grad()
def main(config: EvalConfig) -> int:
    run = load_run(config.run, config.device, config.dtype)
    results = SUITES[config.suite.kind](run, config)
    record = {
        "run": run.config.run.name,
        "suite": config.suite.name,
        "step": run.step,
        "tokens": run.tokens,
        "results": results,
    }
    folder = Path(config.run) / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{config.suite.name}.json"
    write_atomic(path, json.dumps(record, indent=2) + "\n")
    console = Console(highlight=False, soft_wrap=True)
    for name, value in results.items():
        console.print(f"{name:>16}  {value:,.4f}" if isinstance(value, float) else f"{name:>16}  {value:,}")
    console.print(f"{'written to':>16}  {path}")
    return 0


if __name__ == "__main__":
    app(main, "eval", load=lambda tree: load_flat(tree, EvalConfig))
