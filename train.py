"""Train a transformer and compare its attention with others'.

python train.py [overrides]                        one process
torchrun --nproc_per_node=8 train.py [overrides]   one node

`configs/train.yaml` names the groups, `training/config.py` has the keys; `--cfg job` prints what would run.
Exit codes: 0 done, 2 bad configuration or input, 75 pre-empted after saving (start it again), 1 anything else.
"""

import time
from contextlib import closing
from pathlib import Path

import torch

from configs.app import app
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared
from data.shards import TokenShards
from data.tokenizers import load_tokenizer
from eval.in_training import Benchmarks
from eval.perplexity import bits_per_byte, evaluate, perplexity
from eval.sample import sample_texts
from model import counting
from model.transformer import Transformer
from training import checkpoint, recovery
from training.checks import check_before_start, check_sweep
from training.config import Config
from training.device import Runtime, memory_gb, peak_flops
from training.engine import build_engine, release_memory, seed_step
from training.health import StepClock
from training.optim import build_optimizer, finite_or_nan, learning_rate, optimizer_step
from training.preflight import preflight
from training.ranks import agree, from_main
from training.report import Report
from training.saver import CheckpointSaver
from training.session import FINISHED, Ended, Session, session
from training.stored import is_finished


def main(config: Config) -> int:
    """Train one run, from its checked configuration to its exit code."""
    runtime = config.runtime()
    report = Report(enabled=runtime.is_main)
    check_before_start(config, runtime)
    if is_finished(config.run.dir):
        report.say(FINISHED.format(config.run.dir))
        return 0
    benchmarks = Benchmarks(config, runtime, report.say)
    try:
        with session(config, runtime, report.say, lambda: ensure_prepared(config.data, config.tokenizer)) as run:
            while (code := train(config, runtime, run, benchmarks, report)) == recovery.GO_BACK:
                release_memory()
            return code
    except Ended as ended:
        report.say(ended.args[0])
        return ended.args[1]


def train(config: Config, runtime: Runtime, run: Session, benchmarks: Benchmarks, report: Report) -> int:
    """Train from the last checkpoint, or from scratch, to the end; return an exit code, or GO_BACK."""
    trainer, run_dir, device = config.trainer, Path(config.run.dir), runtime.device

    # Data: which sequences a step sees depends on the seed, the step and the rollbacks alone.
    train_shards, val_shards = TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")
    manifest = train_shards.manifest
    tokenizer = load_tokenizer(config.tokenizer, config.data.dir)
    batch_sizes, ranks = (trainer.micro_batch_size, trainer.global_batch_size), (runtime.rank, runtime.world_size)
    train_data = TrainLoader(train_shards, trainer.seq_len, config.run.seed, *batch_sizes, *ranks)
    n_val = trainer.eval_batches and trainer.eval_batches * trainer.global_batch_size
    val_data = EvalLoader(val_shards, trainer.seq_len, trainer.micro_batch_size, *ranks, max_samples=n_val)

    # Whether all this can work on this machine.
    network = config.network(tokenizer.end_of_text)
    checked = preflight(config, runtime, network)
    report.table("Preflight", checked.rows)
    if checked.fatal:
        report.say("\n".join(f"Training cannot work here: {line}" for line in checked.fatal))
        return 1

    # Model, optimizer, engine: the weights are in place before DeepSpeed shards them, the optimizer's state after.
    torch.manual_seed(config.run.seed)
    model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing)
    resumed = recovery.load_start(config, model, manifest, report)
    model.to(device)
    engine = build_engine(config, runtime, model, build_optimizer(model, config.optim))
    start_step, health = recovery.restore_run(engine, resumed, trainer)
    rollbacks = from_main(lambda: recovery.Rollbacks(run_dir))

    # The run folder, and what is written there and shown.
    counts = counting.summary(network, trainer.seq_len)
    machine_peak = peak_flops(device, runtime.dtype) * runtime.world_size
    metrics = (
        recovery.open_record(config, runtime, run, start_step, manifest, tokenizer, counts) if runtime.is_main else None
    )
    report.introduce(config, runtime, counts, manifest, start_step, train_data.epochs(trainer.horizon))
    keep = benchmarks.keep(checkpoint.keepers(trainer.keep_checkpoints, trainer.keep_every, trainer.keep_best))
    saver = CheckpointSaver(run_dir, keep, report.say, run.watchdog.mark)
    benchmarks.attach(engine.module, tokenizer, saver, metrics, run.watchdog.mark)

    # The loop: a step is one optimizer update on global_batch_size sequences.
    accumulation_steps = trainer.accumulation_steps(runtime.world_size)
    clock = StepClock(health, counts["training_flops_per_token"] * trainer.tokens_per_step, machine_peak)
    batches = train_data.batches(start_step, trainer.horizon, device, rollbacks.skipped_batches)
    run.preemption.training = True
    benchmarks.before_loop(start_step)
    with saver, closing(batches):
        for step in range(start_step + 1, trainer.horizon + 1):
            began = time.perf_counter()
            is_last = step == trainer.horizon
            seed_step(config.run.seed, step, runtime.rank)
            lr = learning_rate(step, config.optim.lr, config.schedule, trainer.horizon)
            local_loss = torch.zeros((), device=device)
            for micro_step in range(1, accumulation_steps + 1):
                run.watchdog.mark(f"step {step}, reading a batch")
                tokens, targets = next(batches)
                run.watchdog.mark(f"step {step}, computing")
                # The mean over the tokens of the global batch: DeepSpeed averages over micro-batches and ranks.
                loss = finite_or_nan(engine(tokens, targets) / targets.numel())
                engine.backward(loss)
                local_loss += loss.detach() / accumulation_steps
                if micro_step < accumulation_steps:
                    engine.step()  # only counts: the update comes next
            grad_norm = optimizer_step(engine, lr, config.optim.grad_clip)
            train_loss, is_preempted = agree(local_loss, run.preemption.requested is not None)
            trouble = health.observe(train_loss, grad_norm)
            clock.add(time.perf_counter() - began)

            logged = {}
            if step % trainer.log_every == 0 or is_last:
                logged = {
                    "train/loss": train_loss,
                    "optim/lr": lr,
                    "optim/grad_norm": grad_norm,
                    "optim/skipped_steps": health.skipped_steps,
                    "perf/memory_gb": memory_gb(device),
                    **clock.speed(trainer.tokens_per_step),
                }
            if is_due(step, trainer.eval_every) or is_last:
                sequences = run.watchdog.watched(val_data, "validation")
                logged |= validate(engine, sequences, device, manifest.splits["val"].bytes_per_token)
            if metrics and logged:
                metrics.log(step, step * trainer.tokens_per_step, logged | clock.totals(step))
                benchmarks.collect()
                report.update(step, trainer.horizon, logged)

            if trouble:
                saver.finish()
                return recovery.go_back(config, step, trouble, rollbacks, metrics, report)
            is_preempted = is_preempted and not is_last
            if is_due(step, trainer.checkpoint_every) or benchmarks.due(step) or is_last or is_preempted:
                facts = recovery.checkpoint_facts(config, manifest, health, step, logged.get("val/loss"))
                with run.preemption.saving():
                    saver.save(engine, step, facts)
            benchmarks.after_step(step, is_preempted)
            if is_preempted:
                return recovery.end_preempted(step, run, saver, metrics, report)
        if not saver.finish():
            return 1

    # The end: samples, plot, summary.
    texts = sample_texts(engine.module, tokenizer, trainer.samples, trainer.seq_len, config.run.seed)
    if metrics:
        report.finish(config, counts, manifest, texts, metrics)
        benchmarks.collect()  # an evaluation that ends after summary.json exists logs its own results
        metrics.close()
    return 0


def is_due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def validate(engine, batches, device: torch.device, bytes_per_token: float) -> dict[str, float]:
    """Return the validation metrics of the model as it stands."""
    engine.eval()
    loss, _ = evaluate(engine, batches, device)
    engine.train()
    return {
        "val/loss": loss,
        "val/perplexity": perplexity(loss),
        "val/bits_per_byte": bits_per_byte(loss, bytes_per_token),
    }


if __name__ == "__main__":
    app(main, Config, check_sweep=check_sweep)
