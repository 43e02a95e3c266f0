"""From a configuration to results in one line: check, estimate, and submit training, evaluation and comparison.

python -m slurm.submit [--nodes=N] [--dry-run] [options of sbatch] [overrides]
python -m slurm.submit -m model=t6,mha,gqa optim.lr=3e-4,6e-4      every combination, as one job array, and a comparison

Everything is checked here, before anything is created or queued; mistakes exit with 2.
"""

import argparse
import os
import shlex

import torch
from rich.console import Console

from configs.app import CONFIGS, combinations, command, compose
from configs.errors import ConfigError, each
from configs.load import load
from configs.schema import Config, parse_bytes
from data.prepare import ON_FIRST_USE, check_before_work, prepared
from slurm import scheduler
from slurm.estimate import GIB, estimate
from slurm.jobs import Run, plan, read_jobs, submit, sweep_name
from training.metrics import PEAK_BF16_FLOPS
from training.run_folder import check_before_start, check_folders, is_finished
from training.setup import Runtime

console = Console(highlight=False, soft_wrap=True)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str], list[str]]:
    """(our options, the options that sbatch gets, the overrides)."""
    parser = argparse.ArgumentParser(
        "python -m slurm.submit",
        usage="%(prog)s [options] [--OPTION=VALUE of sbatch ...] [-m] [KEY=VALUE ...]",
        description="Check a configuration, estimate what it needs, and submit training and evaluation to Slurm.",
        allow_abbrev=False,
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--ntasks-per-node", type=int, help="GPUs a node: one task each (default: T6_GPUS_PER_NODE or 8)"
    )
    parser.add_argument("-m", "--multirun", action="store_true", help="a run for every combination, as one job array")
    parser.add_argument("--eval", default="perplexity", metavar="SUITES", help="suites to run after it, or none")
    parser.add_argument("--dry-run", action="store_true", help="print the exact scripts, create and submit nothing")
    parser.add_argument("--gpu", help=f"for the estimate (default: T6_GPU or A100): {', '.join(PEAK_BF16_FLOPS)}")
    parser.add_argument("--gpu-memory", metavar="80GiB", help="say so if the estimate is more (default: T6_GPU_MEMORY)")
    parser.add_argument("--mfu", type=float, help="assumed share of the GPU's peak (default: T6_MFU or 0.35)")
    parser.add_argument("--tokens-per-second", type=float, help="a measured rate of the whole run, instead of --mfu")
    options, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if not word.startswith("-")]
    wrong = [word for word in overrides if "=" not in word and not word.startswith("~")]
    if wrong:
        raise ConfigError(
            *(f"{word}: is not an override (KEY=VALUE); give options of sbatch as --OPTION=VALUE" for word in wrong)
        )
    return options, [word for word in rest if word.startswith("-")], overrides


def use_site(options: argparse.Namespace, environment: dict[str, str]) -> None:
    """Fill what was not given from the site's settings. ConfigError for what makes no sense."""
    errors = []
    for key, variable, kind, default in (
        ("ntasks_per_node", "T6_GPUS_PER_NODE", int, 8),
        ("gpu", "T6_GPU", str, "A100"),
        ("gpu_memory", "T6_GPU_MEMORY", str, None),
        ("mfu", "T6_MFU", float, 0.35),
    ):
        if getattr(options, key) is None:
            try:
                setattr(options, key, kind(environment[variable]) if environment.get(variable) else default)
            except ValueError:
                errors.append(f"{scheduler.SITE_FILE}: {variable}={environment[variable]}: must be a number")
    if options.gpu not in PEAK_BF16_FLOPS:
        errors.append(f"--gpu={options.gpu}: must be one of {', '.join(PEAK_BF16_FLOPS)}, or give --tokens-per-second")
    for key in ("nodes", "ntasks_per_node", "mfu", "tokens_per_second"):
        value = getattr(options, key)
        if value is not None and not value > 0:
            errors.append(f"--{key.replace('_', '-')}={value}: must be a positive number")
    try:
        options.gpu_memory = options.gpu_memory and parse_bytes(options.gpu_memory)
    except ValueError as error:
        errors.append(f"--gpu-memory={options.gpu_memory}: {error}")
    known = {path.stem for path in (CONFIGS / "suite").glob("*.yaml")}
    options.eval = [] if options.eval in ("none", "") else options.eval.split(",")
    errors += [
        f"--eval={s}: must be none or some of {', '.join(sorted(known))}" for s in options.eval if s not in known
    ]
    if errors:
        raise ConfigError(*errors)


def check(overrides: list[str], tasks: int) -> Config:
    """The configuration, checked as the job would check it on its `tasks` processes. ConfigError has all mistakes."""
    tree = compose("train", overrides)
    device = tree.device
    if device == "cuda":  # the GPUs are the job's
        tree.device = "auto"
    config = load(tree, tasks)
    config.device = device
    on_gpu, dtype = device != "cpu", config.trainer.dtype
    fp32 = dtype == "fp32" or (dtype == "auto" and not on_gpu)
    where = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    if config.data.source in ON_FIRST_USE and not prepared(config):
        check_before_work(config)
    check_before_start(config, Runtime(where, torch.float32 if fp32 else torch.bfloat16, world_size=tasks))
    return config


def check_all(words: list[list[str]], tasks: int) -> list[Run]:
    """Every run of a submission. ConfigError with the mistakes of each of them, said once."""
    runs = each(lambda overrides: Run(overrides, check(overrides, tasks)), words)
    check_folders([run.config for run in runs])
    jobs = {job: run for run in runs for job in read_jobs(run.dir).values()}
    if waiting := scheduler.queued(list(jobs)):
        raise ConfigError(*(f"run.dir={jobs[job].dir}: is in the queue already, as job {job}" for job in waiting))
    return runs


def show(runs: list[Run], options: argparse.Namespace) -> None:
    """What will run, what it will need, and what that assumes."""
    gpus = options.nodes * options.ntasks_per_node
    for run in runs:
        config, needs = run.config, run.estimate
        tokens = f"{needs.tokens / 1e9:.3g} B tokens" if needs.tokens >= 1e8 else f"{needs.tokens / 1e6:.3g} M tokens"
        rate, parts = f"{needs.tokens_per_second:,.0f} tokens/s", sorted(needs.memory.items(), key=lambda kv: -kv[1])
        rows = {
            "what": f"{config.model.name} {config.size.name}, {config.data.name}, {tokens}, {config.deepspeed.name} on "
            f"{options.nodes} x {options.ntasks_per_node} = {gpus} tasks",
            "memory": f"about {needs.gib:.1f} GiB a GPU: "
            + ", ".join(f"{part} {size / GIB:.2g}" for part, size in parts if size),
            "time": "unknown without --tokens-per-second (device=cpu)"
            if config.device == "cpu" and not options.tokens_per_second
            else f"about {needs.hours:.2g} hours at {rate}",
            "assumed": "; ".join(needs.assumed),
        }
        console.print(f"[bold]{run.dir}[/bold]" + (" is finished" if is_finished(config) else ""))
        for key, value in rows.items():
            console.print(f"  {key:<8}{value}", markup=False)
        if options.gpu_memory and needs.gib * GIB > options.gpu_memory:
            console.print(
                f"  [bold]more than the {options.gpu_memory / GIB:.0f} GiB of a GPU[/bold]: a smaller "
                "trainer.micro_batch_size, trainer.activation_checkpointing=true or a higher deepspeed stage needs less"
            )


def main(arguments: list[str]) -> int:
    options, sbatch_options, overrides = parse(arguments)
    environment = scheduler.site_environment()
    use_site(options, environment)
    words = combinations(overrides) if options.multirun else [overrides]
    tasks = options.nodes * options.ntasks_per_node
    runs = check_all(words, tasks)
    if len(runs) > 1 and not any(word.lstrip("+").startswith("wandb.group=") for word in overrides):
        for run in runs:
            run.overrides.append(f"wandb.group={sweep_name(runs)}")
    for run in runs:
        peak = PEAK_BF16_FLOPS[options.gpu] / (2 if run.config.trainer.dtype == "fp32" else 1)
        run.estimate = estimate(run.config, tasks, options.gpu, peak, options.mfu, options.tokens_per_second)
    show(runs, options)
    jobs = plan(runs, options, sbatch_options)
    if not jobs or all(is_finished(run.config) for run in runs):
        console.print("finished already; choose another run.name to train again")
        return 0
    if scheduler.available(environment):
        for job in jobs:
            said = scheduler.sbatch(["--test-only", *job.command()], environment, job.script())
            console.print(f"{job.kind}: {said.splitlines()[-1].removeprefix('sbatch: ')}", markup=False)
    elif not options.dry_run:
        raise ConfigError("sinfo: no Slurm cluster answers here; submit from a login node, or look with --dry-run")
    if options.dry_run:
        for job in jobs:
            console.print(f"\n$ sbatch {shlex.join(job.command())} {shlex.quote(str(job.path))}", markup=False)
            console.print(job.script(), markup=False, end="")
        return 0
    ids = submit(jobs, runs, environment, shlex.join(["python", "-m", "slurm.submit", *arguments]))
    console.print("submitted " + ", then ".join(f"{kind} as job {number}" for kind, number in ids.items()))
    where = (
        f"{runs[0].dir}/slurm-{ids['train']}.log" if len(runs) == 1 else f"{os.path.dirname(runs[0].dir)}/*/slurm-*.log"
    )
    console.print(f"  follow  tail -F {where}", markup=False)
    console.print("  state   python -m slurm.status", markup=False)
    console.print(f"  cancel  scancel {' '.join(ids.values())}", markup=False)
    return 0


if __name__ == "__main__":
    command(main)
