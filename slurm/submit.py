"""Check a configuration, estimate what it needs, and submit training, evaluation and comparison to Slurm.

python -m slurm.submit [--nodes=N] [--dry-run] [options of sbatch] [overrides]
python -m slurm.submit -m model=t6,mha,gqa optim.lr=3e-4,6e-4      every combination, as one job array, and a comparison

Everything is checked before anything is created or queued; mistakes exit with 2.
"""

import os
from pathlib import Path

import torch

from configs.app import OWN_CONFIGS, add_own_folder, combinations, command, compose
from configs.errors import ConfigError, each
from configs.load import load
from data.prepare import check_before_work, prepared
from data.sources.base import source_of
from slurm import scheduler, shell
from slurm.estimate import GIB, estimate
from slurm.job_files import read_jobs
from slurm.jobs import Run, check_names, plan, submit, sweep_name
from slurm.options import Options, parse
from training.checks import check_before_start, check_folders
from training.config import Config
from training.device import Runtime, format_bytes


def check(overrides: list[str], options: Options) -> Run:
    """Return one run of a submission. ConfigError has every mistake that its job would find."""
    tree = compose(Config, overrides)
    if tree.get("device") == "cuda":  # the login node may have no GPU, the job has
        tree.device = "auto"
    config = load(tree, Config, world_size=options.tasks)
    if source_of(config.data).on_first_use and not prepared(config.data, config.tokenizer):
        check_before_work(config.data, config.tokenizer)
    on_gpu, dtype = config.device != "cpu", config.trainer.dtype
    in_bf16 = dtype == "bf16" or (dtype == "auto" and (on_gpu or config.deepspeed.bf16_engine))
    device = torch.device("cuda" if on_gpu else "cpu")
    runtime = Runtime(device, torch.bfloat16 if in_bf16 else torch.float32, world_size=options.tasks)
    check_before_start(config, runtime)
    return Run(overrides, config, estimate(config, runtime, options))


def check_all(combined: list[list[str]], options: Options) -> list[Run]:
    """Return the runs of a submission. ConfigError with the mistakes of all of them, each once."""
    runs = each(lambda overrides: check(overrides, options), combined)
    check_folders(run.config for run in runs)
    jobs = {job: run for run in runs for job in read_jobs(run.dir).values()}
    waiting = scheduler.queued(list(jobs))
    if waiting:
        raise ConfigError(*(f"run.dir={jobs[job].dir}: is in the queue already, as job {job}" for job in waiting))
    return runs


def show(run: Run, options: Options) -> None:
    """Print what will run, what it needs, and what that assumes."""
    config, needs = run.config, run.needs
    parts = sorted(needs.memory.items(), key=lambda item: item[1], reverse=True)
    machine = f"{options.nodes} x {options.ntasks_per_node} = {options.tasks} tasks"
    names = f"{config.model.name} {config.size.name}, {config.data.name}"
    memory = ", ".join(f"{part} {count / GIB:.2g}" for part, count in parts if count)
    time = f"about {needs.hours:.2g} hours at {needs.tokens_per_second:,.0f} tokens/s"
    if config.device == "cpu" and not options.tokens_per_second:
        time = "unknown without --tokens-per-second (device=cpu)"
    print(run.dir + (" is finished" if run.finished else ""))
    print(f"  what    {names}, {needs.tokens / 1e6:,.1f} M tokens, {config.deepspeed.name} on {machine}")
    print(f"  memory  about {needs.gib:.1f} GiB for each GPU: {memory}")
    print(f"  time    {time}")
    print(f"  assumed {needs.assumed}")
    if options.gpu_memory and needs.gib * GIB > options.gpu_memory:
        print(
            f"  more than the {format_bytes(options.gpu_memory)} of a GPU: a smaller trainer.micro_batch_size, "
            "trainer.activation_checkpointing=true or a higher deepspeed stage needs less"
        )


def main(arguments: list[str]) -> int:
    environment = scheduler.site_environment()
    options, sbatch_options, overrides = parse(arguments, environment, __doc__)
    if options.config_dir:
        add_own_folder(options.config_dir)
        environment[OWN_CONFIGS] = os.environ[OWN_CONFIGS]
    runs = check_all(combinations(overrides, Config) if options.multirun else [overrides], options)
    if len(runs) > 1 and not any(word.lstrip("+").startswith("wandb.group=") for word in overrides):
        for run in runs:
            run.overrides.append(f"wandb.group={sweep_name(runs)}")
    for run in runs:
        show(run, options)
    if all(run.finished for run in runs):
        print("finished already; choose another run.name to train again")
        return 0
    train_options = [f"--nodes={options.nodes}", f"--ntasks-per-node={options.ntasks_per_node}"]
    jobs = plan(runs, train_options, options.eval, sbatch_options)
    check_names(jobs, runs)
    scripts = {job.kind: job.script(scheduler.options_of(environment)) for job in jobs}
    if scheduler.available(environment):
        for job in jobs:
            answer = scheduler.sbatch(["--test-only", *job.command()], environment, scripts[job.kind]).splitlines()[-1]
            print(f"{job.kind}: {answer.removeprefix('sbatch: ')}")
    elif not options.dry_run:
        raise ConfigError("sinfo: no Slurm cluster answers here; submit from a login node, or look with --dry-run")
    if options.dry_run:
        for job in jobs:
            print(f"\n$ sbatch {shell.join([*job.command(), str(job.path)])}\n{scripts[job.kind]}")
        return 0
    ids = submit(jobs, runs, environment, shell.join(["python", "-m", "slurm.submit", *arguments]), options.eval)
    print("submitted " + ", then ".join(f"{kind} as job {number}" for kind, number in ids.items()))
    logs = shell.quote(f"{runs[0].dir}/slurm-{ids['train']}.log")
    if len(runs) > 1:
        logs = f"{shell.quote(str(Path(runs[0].dir).parent))}/*/slurm-*.log"
    print(f"  follow  tail -F {logs}\n  state   python -m slurm.status\n  cancel  scancel {' '.join(ids.values())}")
    return 0


if __name__ == "__main__":
    command(main)
