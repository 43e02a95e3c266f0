"""Evaluate a run's checkpoint: `python -m eval.run run=runs/NAME [suite=paper_zeroshot] [step=1000]`.

Results go to results/<suite>.json in the run folder, to a line of its metrics.jsonl, and to its W&B run. Under torchrun
the processes share the work.
"""

import torch

from configs.app import app
from configs.load import load_flat
from configs.schema_eval import EvalConfig, HarnessSuite, LongContextSuite, PerplexitySuite, SuiteConfig, TextSource
from eval.in_training import pending
from eval.loading import LoadedRun, config_of, load_run
from eval.ranks import process_group
from eval.results import Outcome, check_writable, inbox_of, log, save, show, variant_of
from training.setup import find_runtime


@torch.no_grad()
def run_suite(run: LoadedRun, config: EvalConfig) -> Outcome | None:
    """What the suite finds; every rank calls it, rank 0 has the outcome."""
    return kind_of(config.suite)(run, config)


def kind_of(suite: SuiteConfig):
    """The function that runs such a suite; what it needs is imported with it."""
    if isinstance(suite, PerplexitySuite):
        from eval.perplexity import perplexity_suite as found
    elif isinstance(suite, HarnessSuite):
        from eval.benchmarks import harness_suite as found
    elif isinstance(suite, LongContextSuite):
        from eval.long_context import long_context_suite as found
    else:
        raise TypeError(f"{type(suite).__name__}: no kind of suite")
    return found


def check_suite(suite: SuiteConfig) -> None:
    """ConfigError for what can be found missing without a model."""
    if isinstance(suite, HarnessSuite):
        from eval.tasks import load_tasks

        load_tasks(suite, None)
    elif isinstance(suite, TextSource):
        from eval.texts import check_source

        check_source(suite)


def main(config: EvalConfig) -> int:
    if getattr(config.suite, "prefetch", False):
        from eval.tasks import prefetch

        prefetch(config.suite)
        return 0
    runtime = find_runtime(config_of(config.run, config.device, config.dtype))
    check_writable(config.run)
    with process_group(runtime):
        run = load_run(config.run, config.device, config.dtype, config.step)
        run.scale_rope(config.rope_scaling, config.rope_factor)
        outcome = run_suite(run, config)
    if run.runtime.is_main:
        variant = variant_of(run, config.step, config.rope_scaling, config.rope_factor)
        path = save(run, config.suite.name, outcome, config.limit, variant)
        if config.rope_scaling == "none":
            log(run, config.suite.name, outcome.metrics(config.suite.name), path)
        pending(inbox_of(run.dir), config.suite.name, run.step).unlink(missing_ok=True)
        show(outcome, path)
    return 0


if __name__ == "__main__":
    app(main, "eval", load=lambda tree: load_flat(tree, EvalConfig))
