"""Check a configuration, estimate what it needs, and submit training, evaluation and comparison to Slurm.

python -m slurm.submit [--nodes=N] [--dry-run] [options of sbatch] [overrides]
python -m slurm.submit -m model=t6,mha,gqa optim.lr=3e-4,6e-4      every combination, as one job array, and a comparison

Everything is checked before anything is created or queued; mistakes exit with 2.
"""

import argparse
import shlex
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field
from rich.console import Console

from configs.app import choices, combinations, command, compose
from configs.errors import ConfigError, each
from configs.load import Block, load
from data.prepare import ON_FIRST_USE, check_before_work, prepared
from slurm import scheduler
from slurm.estimate import GIB, Estimate, estimate
from slurm.jobs import Run, plan, read_jobs, submit, sweep_name
from training.checks import check_before_start, check_folders
from training.config import Config
from training.device import PEAK_BF16_FLOPS, Runtime, format_bytes, parse_bytes

console = Console(highlight=False, soft_wrap=True)
SITE = {"ntasks_per_node": "T6_GPUS_PER_NODE", "gpu": "T6_GPU", "gpu_memory": "T6_GPU_MEMORY", "mfu": "T6_MFU"}


def split_suites(names: str) -> list[str]:
    suites = [] if names in ("none", "") else names.split(",")
    if not set(suites) <= set(choices("suite")):
        raise ValueError(f"must be none or some of {', '.join(choices('suite'))}")
    return suites


class Options(Block):
    """What the command line says; else the site's settings (`SITE`); else the default."""

    nodes: int = Field(1, ge=1)
    ntasks_per_node: int = Field(8, ge=1, description="one task for each GPU (default: T6_GPUS_PER_NODE or 8)")
    multirun: bool = Field(False, description="a run for every combination, as one job array")
    eval: Annotated[list[str], BeforeValidator(split_suites)] = Field(
        ["perplexity"], description="the suites to run afterwards, A,B or none (default: perplexity)"
    )
    dry_run: bool = Field(False, description="print the exact scripts, create and submit nothing")
    gpu: Literal[*PEAK_BF16_FLOPS] = Field(
        "A100", description=f"for the estimate (default: T6_GPU or A100): {', '.join(PEAK_BF16_FLOPS)}"
    )
    gpu_memory: Annotated[float, BeforeValidator(parse_bytes)] | None = Field(
        None, description="such as 80GiB: warn if a run needs more (default: T6_GPU_MEMORY)"
    )
    mfu: float = Field(0.35, gt=0, description="the assumed share of the GPU's peak (default: T6_MFU or 0.35)")
    tokens_per_second: float | None = Field(None, gt=0, description="a measured rate of the whole run, instead of mfu")

    @property
    def tasks(self) -> int:
        return self.nodes * self.ntasks_per_node


def parse(arguments: list[str], environment: dict[str, str]) -> tuple[Options, list[str], list[str]]:
    """Return (our options, those of sbatch, the overrides). ConfigError for all that are wrong."""
    parser = argparse.ArgumentParser(
        "python -m slurm.submit", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
    )
    flags = {key: f"--{key.replace('_', '-')}" for key in Options.model_fields}
    for key, field in Options.model_fields.items():
        if field.annotation is bool:
            names = ["-m", flags[key]] if key == "multirun" else [flags[key]]
            parser.add_argument(*names, action="store_true", help=field.description)
        else:
            site = environment.get(SITE.get(key)) or None
            parser.add_argument(flags[key], metavar="VALUE", default=site, help=field.description)
    given, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if not word.startswith("-")]
    errors = [
        f"{word}: is not an override (KEY=VALUE); give options of sbatch as --OPTION=VALUE"
        for word in overrides
        if "=" not in word and not word.startswith("~")
    ]
    options = Options()
    try:
        options = load({key: value for key, value in vars(given).items() if value is not None}, Options)
    except ConfigError as error:
        for key, _, message in (line.partition("=") for line in error.errors):
            errors.append(f"{flags[key]}={message}" + (f" (or {SITE[key]})" if key in SITE else ""))
    if errors:
        raise ConfigError(*errors)
    return options, [word for word in rest if word.startswith("-")], overrides


def check(overrides: list[str], tasks: int) -> Config:
    """Return the configuration of a job of `tasks` processes. ConfigError has every mistake the job would find."""
    tree = compose(Config, overrides)
    device = tree.get("device", "auto")
    if device == "cuda":  # the login node may have no GPU, the job has
        tree.device = "auto"
    config = load(tree, Config, world_size=tasks)
    config.device = device
    if config.data.source in ON_FIRST_USE and not prepared(config.data, config.tokenizer):
        check_before_work(config.data, config.tokenizer)
    on_gpu, dtype = device != "cpu", config.trainer.dtype
    in_fp32 = dtype == "fp32" or (dtype == "auto" and not on_gpu)
    runtime = Runtime(
        device=torch.device("cuda", 0) if on_gpu else torch.device("cpu"),
        dtype=torch.float32 if in_fp32 else torch.bfloat16,
        world_size=tasks,
    )
    check_before_start(config, runtime)
    return config


def check_all(combined: list[list[str]], options: Options) -> list[Run]:
    """Return the runs of a submission. ConfigError with the mistakes of all of them, each once."""

    def new_run(overrides: list[str]) -> Run:
        config = check(overrides, options.tasks)
        peak = PEAK_BF16_FLOPS[options.gpu] / (2 if config.trainer.dtype == "fp32" else 1)
        needs = estimate(config, options.tasks, options.gpu, peak, options.mfu, options.tokens_per_second)
        return Run(overrides, config, needs)

    runs = each(new_run, combined)
    check_folders([run.config for run in runs])
    jobs = {job: run for run in runs for job in read_jobs(run.dir).values()}
    waiting = scheduler.queued(list(jobs))
    if waiting:
        raise ConfigError(*(f"run.dir={jobs[job].dir}: is in the queue already, as job {job}" for job in waiting))
    return runs


def show(run: Run, needs: Estimate, options: Options) -> None:
    """Print what will run, what it needs, and what that assumes."""
    config, shares = run.config, sorted(needs.memory.items(), key=lambda item: item[1], reverse=True)
    tokens = f"{needs.tokens / 1e9:.3g} B" if needs.tokens >= 1e8 else f"{needs.tokens / 1e6:.3g} M"
    machine = f"{options.nodes} x {options.ntasks_per_node} = {options.tasks} tasks"
    time = f"about {needs.hours:.2g} hours at {needs.tokens_per_second:,.0f} tokens/s"
    if config.device == "cpu" and not options.tokens_per_second:
        time = "unknown without --tokens-per-second (device=cpu)"
    rows = {
        "what": f"{config.model.name} {config.size.name}, {config.data.name}, {tokens} tokens, "
        f"{config.deepspeed.name} on {machine}",
        "memory": f"about {needs.gib:.1f} GiB for each GPU: "
        + ", ".join(f"{part} {count / GIB:.2g}" for part, count in shares if count),
        "time": time,
        "assumed": "; ".join(needs.assumptions),
    }
    console.print(f"[bold]{run.dir}[/bold]" + (" is finished" if run.finished else ""))
    for key, value in rows.items():
        console.print(f"  {key:<8}{value}", markup=False)
    if options.gpu_memory and needs.gib * GIB > options.gpu_memory:
        console.print(
            f"  [bold]more than the {format_bytes(options.gpu_memory)} of a GPU[/bold]: a smaller "
            "trainer.micro_batch_size, trainer.activation_checkpointing=true or a higher deepspeed stage needs less"
        )


def main(arguments: list[str]) -> int:
    environment = scheduler.site_environment()
    options, sbatch_options, overrides = parse(arguments, environment)
    runs = check_all(combinations(overrides) if options.multirun else [overrides], options)
    if len(runs) > 1 and not any(word.lstrip("+").startswith("wandb.group=") for word in overrides):
        for run in runs:
            run.overrides.append(f"wandb.group={sweep_name(runs)}")
    for run in runs:
        show(run, run.estimate, options)
    if all(run.finished for run in runs):
        console.print("finished already; choose another run.name to train again")
        return 0
    jobs = plan(runs, options.nodes, options.ntasks_per_node, options.eval, sbatch_options)
    if scheduler.available(environment):
        for job in jobs:
            answer = scheduler.sbatch(["--test-only", *job.command()], environment, job.script()).splitlines()[-1]
            console.print(f"{job.kind}: {answer.removeprefix('sbatch: ')}", markup=False)
    elif not options.dry_run:
        raise ConfigError("sinfo: no Slurm cluster answers here; submit from a login node, or look with --dry-run")
    if options.dry_run:
        for job in jobs:
            console.print(f"\n$ sbatch {shlex.join(job.command())} {shlex.quote(str(job.path))}", markup=False)
            console.print(job.script(), markup=False, end="")
        return 0
    ids = submit(jobs, runs, environment, shlex.join(["python", "-m", "slurm.submit", *arguments]))
    console.print("submitted " + ", then ".join(f"{kind} as job {number}" for kind, number in ids.items()))
    logs = f"{Path(runs[0].dir).parent}/*/slurm-*.log" if len(runs) > 1 else f"{runs[0].dir}/slurm-{ids['train']}.log"
    console.print(f"  follow  tail -F {logs}", markup=False)
    console.print("  state   python -m slurm.status", markup=False)
    console.print(f"  cancel  scancel {' '.join(ids.values())}", markup=False)
    return 0


if __name__ == "__main__":
    command(main)
