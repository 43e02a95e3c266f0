"""Evaluate a run's checkpoint: `python -m eval.run run=runs/NAME [suite=paper_zeroshot] [step=1000]`.

The results go to results/<suite>.json in the run folder, to a line of its metrics.jsonl, and to its W&B run. Under
torchrun the processes share the work.
"""

from configs.app import app
from eval.config import EvalConfig
from eval.loading import LoadedRun, config_of, load_run
from eval.results import check_writable, log, pending, save, show
from training.checkpoint import newest
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
        run.scale_rope(config.rope_scaling, config.rope_factor)
        outcome = suite.run(run, config)
    if run.runtime.is_main:
        path = save(run, suite.name, outcome, config.limit, variant_of(run, config))
        if config.rope_scaling == "none":
            log(run, suite.name, outcome.metrics(suite.name), path)
        pending(run.dir, suite.name, run.step).unlink(missing_ok=True)
        show(outcome, path)
    return 0


def variant_of(run: LoadedRun, config: EvalConfig) -> str:
    """Return what tells the files of an older checkpoint, or of a scaled RoPE, from those of the run as it stands."""
    latest = newest(run.dir, warn=lambda line: None) if config.step is not None else None
    older = f"_step_{run.step:08d}" if latest and latest.name != f"step_{run.step:08d}" else ""
    return older if config.rope_scaling == "none" else f"{older}_{config.rope_scaling}{config.rope_factor:g}"


if __name__ == "__main__":
    app(main, EvalConfig)
