"""Evaluate a run's checkpoint: `python -m eval.run run=runs/NAME [suite=paper_zeroshot] [step=1000]`.

The results go to results/<suite>.json in the run folder, a file for each question (results/<suite>_limit=500.json with
limit=500), to a line of its metrics.jsonl, and to its W&B run. Under torchrun the processes share the work.
"""

from configs.app import app
from eval.config import EvalConfig, question
from eval.loading import config_of, load_run
from eval.results import check_writable, log, pending, save, show
from training.checkpoint import checkpoint_dir, newest
from training.device import find_runtime
from training.ranks import process_group


def main(config: EvalConfig) -> int:
    suite = config.suite
    if not suite.needs_run:
        suite.fetch()
        return 0
    config_of(config.run)
    check_writable(config.run)
    with process_group(find_runtime(config.device, config.dtype)):
        run = load_run(config.run, config.device, config.dtype, config.step, config.core.kernel)
        outcome = suite.run(run, config)
    if run.runtime.is_main:
        latest = newest(run.dir, warn=lambda line: None) if config.step is not None else None
        is_older = latest is not None and latest != checkpoint_dir(run.dir, run.step)
        name = suite.name + (f"_step_{run.step:08d}" if is_older else "") + question(config)
        path = save(run, name, suite.name, outcome, config.limit)
        log(run, suite.name, outcome, path)
        pending(run.dir, suite.name, run.step).unlink(missing_ok=True)
        show(outcome, path)
    return 0


if __name__ == "__main__":
    app(main, EvalConfig)
