"""Train a transformer and compare its attention with others'.

python train.py [overrides]                        one process
torchrun --nproc_per_node=8 train.py [overrides]   one node

`configs/train.yaml` has the defaults; `python train.py --cfg job [overrides]` prints the configuration that would run.
Exit codes: 0 done, 2 bad configuration or input, 75 pre-empted after saving (start it again), 1 anything else.
"""

import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import torch

from configs.app import app
from configs.schema import Config
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared
from data.shards import Manifest, TokenShards
from data.tokenizers import load_tokenizer
from eval.in_training import Benchmarks
from eval.perplexity import bits_per_byte, evaluate, perplexity
from eval.sample import sample_texts
from model import counting
from model.transformer import Transformer, TransformerConfig
from training import checkpoint
from training.console import TrainingConsole
from training.engine_state import restore
from training.health import Health, Rollbacks
from training.metrics import Metrics, memory_gb, peak_flops
from training.optim import build_optimizer, finite_or_nan, learning_rate, optimizer_step
from training.preemption import PREEMPTED, Preemption
from training.preflight import preflight
from training.run_folder import check_before_start, check_sweep, create_run_folder, finish, is_finished, log_event
from training.run_lock import RunLock
from training.saver import CheckpointSaver
from training.setup import (
    agree,
    build_engine,
    find_runtime,
    from_main,
    init_distributed,
    release_memory,
    seed_step,
    shut_down,
)
from training.watchdog import ENDING, Watchdog

GO_BACK = -1  # train() is to be called again: it starts from the last checkpoint


def main(config: Config) -> int:
    """One run, from a checked configuration to its exit code."""
    runtime = find_runtime(config)
    console = TrainingConsole(enabled=runtime.is_main)
    check_before_start(config, runtime)
    done = f"{config.run.dir} is finished; choose another run.name to train again"
    if is_finished(config):
        console.say(done)
        return 0
    with Preemption() as preemption:
        benchmarks = Benchmarks(config, runtime, console.say)
        if runtime.is_main:
            ensure_prepared(config)  # the built-in corpus on first use; the others wait where the process group forms
        init_distributed(runtime, config.trainer.rank_timeout)
        watchdog = Watchdog(runtime.rank, runtime.world_size, config.trainer.rank_timeout)
        lock = RunLock(config.run.dir)
        try:
            patience = config.trainer.rank_timeout / 2  # the other ranks wait for rank 0 here
            if reason := from_main(lambda: lock.acquire(patience, console.say)):
                console.say(reason)
                return 1
            if from_main(lambda: is_finished(config)):  # by the one that had the lock
                console.say(done)
                return 0
            with watchdog:
                while (code := train(config, runtime, console, preemption, watchdog, benchmarks)) == GO_BACK:
                    release_memory()
            return code
        except RuntimeError as error:
            if not (reason := watchdog.explain(error)):
                raise
            print(ENDING.format(reason), file=sys.stderr, flush=True)
            return 1
        finally:
            console.stop()
            shut_down()
            lock.release()


def train(config: Config, runtime, console: TrainingConsole, preemption, watchdog, benchmarks: Benchmarks) -> int:
    """From the last checkpoint, or the beginning, to the end: an exit code, or GO_BACK to be called again."""
    trainer, run_dir, device = config.trainer, Path(config.run.dir), runtime.device

    # --- data: which sequences a step sees depends on the seed, the step and the rollbacks alone
    train_shards, val_shards = TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")
    manifest, tokenizer = train_shards.manifest, load_tokenizer(config.tokenizer, config.data.dir)
    micro_batch_size, ranks = trainer.micro_batch_size, (runtime.rank, runtime.world_size)
    train_data = TrainLoader(
        train_shards, trainer.seq_len, config.run.seed, micro_batch_size, trainer.global_batch_size, *ranks
    )
    eval_sequences = trainer.eval_batches and trainer.eval_batches * trainer.global_batch_size
    val_data = EvalLoader(val_shards, trainer.seq_len, micro_batch_size, *ranks, max_samples=eval_sequences)

    # --- whether all this can work here
    network = TransformerConfig.from_config(config, tokenizer.end_of_text)
    found = preflight(config, runtime, network)
    console.table("Preflight", found.rows)
    if found.fatal:
        console.say("\n".join(f"TRAINING CANNOT WORK HERE: {line}" for line in found.fatal))
        return 1

    # --- model, optimizer, engine: the weights are in place before DeepSpeed shards them, the moments after
    torch.manual_seed(config.run.seed)
    model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing)
    resumed = load_start(config, model, manifest, console)
    model.to(device)
    engine = build_engine(config, runtime, model, build_optimizer(model, config.optim))
    start_step, health, rollbacks = 0, Health(trainer), from_main(lambda: Rollbacks(run_dir))
    if resumed:
        restore(engine, resumed)
        facts = checkpoint.read_manifest(resumed)
        start_step, health = facts["step"], Health(trainer, facts["health"])

    # --- the run folder and what goes into it
    counts = counting.summary(network, trainer.seq_len)
    machine_peak = peak_flops(device, runtime.dtype) * runtime.world_size
    metrics = Metrics(config, create_run_folder(config), start_step) if runtime.is_main else None
    console.introduce(config, runtime, counts, manifest, start_step, train_data.epochs(trainer.horizon))
    if metrics:
        metrics.note("preflight", found.numbers)
        if not preemption.training:  # and not on its way back from a rollback
            log_event(run_dir, "start", start_step, world_size=runtime.world_size, deepspeed=config.deepspeed.name)

    def save_failed(step: int, failure: str) -> None:
        console.say(f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED, training goes on: {failure}")
        with suppress(OSError):  # the disk may have no room for that either
            log_event(run_dir, "save_failed", step, reason=failure)

    def save(step: int, val_loss: float | None) -> None:
        facts = {
            "val_loss": val_loss,
            "tokens": step * trainer.tokens_per_step,
            "health": health.state(),
            "identity": config.identity(),
            "data_fingerprint": manifest.fingerprint,
            "tokenizer_fingerprint": manifest.tokenizer["fingerprint"],
        }
        with preemption.saving():
            saver.save(engine, step, facts)

    def run_benchmarks(step: int) -> None:
        """After the step is saved, or being saved: a run that is ended in the middle of them has lost nothing."""
        found = benchmarks.run(engine.module, tokenizer, step, watchdog.mark)
        if metrics and found:
            metrics.log(step, step * trainer.tokens_per_step, found)

    # --- the loop: a step is one optimizer update on global_batch_size sequences
    accumulation_steps = trainer.accumulation_steps(runtime.world_size)
    timed_steps, timed_seconds = 0, 0.0
    keep = benchmarks.keep(checkpoint.keepers(trainer.keep_checkpoints, trainer.keep_every, trainer.keep_best))
    saver = CheckpointSaver(run_dir, keep, save_failed, trainer.background_saving, watchdog.mark)
    batches = train_data.batches(start_step, trainer.horizon, device, rollbacks.passed_over)
    console.start(start_step, trainer.horizon)
    preemption.training = True
    if from_main(lambda: benchmarks.owed(start_step)):
        run_benchmarks(start_step)
    with saver, closing(batches):
        for step in range(start_step + 1, trainer.horizon + 1):
            began, is_last = time.perf_counter(), step == trainer.horizon
            seed_step(config.run.seed, step, runtime.rank)
            lr = learning_rate(step, config.optim.lr, config.schedule, trainer.horizon)
            local_loss = torch.zeros((), device=device)
            for micro_step in range(1, accumulation_steps + 1):
                watchdog.mark(f"step {step}, reading a batch")
                tokens, targets = next(batches)
                watchdog.mark(f"step {step}, computing")
                # The mean over the tokens of the global batch: DeepSpeed averages over micro-batches and ranks.
                loss = finite_or_nan(engine(tokens, targets) / targets.numel())
                engine.backward(loss)
                local_loss += loss.detach() / accumulation_steps
                if micro_step < accumulation_steps:
                    engine.step()  # only counts: the update comes next
            grad_norm = optimizer_step(engine, lr, config.optim.grad_clip)
            train_loss, is_preempted = agree(local_loss, preemption.requested is not None)
            trouble = health.observe(train_loss, grad_norm)
            timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - began

            logged = {}
            if step % trainer.log_every == 0 or is_last:
                rate = timed_steps * trainer.tokens_per_step / timed_seconds
                timed_steps, timed_seconds = 0, 0.0
                logged = {
                    "train/loss": train_loss,
                    "optim/lr": lr,
                    "optim/grad_norm": grad_norm,
                    "optim/skipped_steps": health.skipped_steps,
                    "perf/tokens_per_second": rate,
                    "perf/mfu": counts["training_flops_per_token"] * rate / machine_peak,
                    "perf/memory_gb": memory_gb(device),
                }
            if is_due(step, trainer.eval_every) or is_last:
                engine.eval()
                val_loss, _ = evaluate(engine, watchdog.watched(val_data, "validation"), device)
                engine.train()
                logged |= {
                    "val/loss": val_loss,
                    "val/perplexity": perplexity(val_loss),
                    "val/bits_per_byte": bits_per_byte(val_loss, manifest.bytes_per_token("val")),
                }
            if metrics and logged:
                metrics.log(step, step * trainer.tokens_per_step, logged)
                benchmarks.collect(metrics.log)
            console.update(step, logged)

            if trouble:
                saver.finish()
                return go_back(config, step, trouble, rollbacks, metrics, console)
            is_preempted = is_preempted and not is_last
            if is_due(step, trainer.checkpoint_every) or benchmarks.due(step) or is_last or is_preempted:
                save(step, logged.get("val/loss"))
            if benchmarks.job_due(step) and saver.finish():  # the job reads the checkpoint
                benchmarks.submit(step)
            if is_preempted:
                with preemption.saving():
                    outcome = f"saved step {step}" if saver.finish() else "not saved"
                console.say(f"{preemption.requested or 'signal'}: {outcome}; the same command goes on from here")
                if metrics:
                    with suppress(OSError):
                        log_event(run_dir, "preempted", step, signal=preemption.requested)
                    metrics.close(PREEMPTED)
                return PREEMPTED
            if benchmarks.run_due(step):
                run_benchmarks(step)
        if not saver.finish():
            return 1
    console.stop()

    # --- the end: samples, plot, summary
    texts = sample_texts(engine.module, tokenizer, trainer.samples, trainer.seq_len, device, config.run.seed)
    if metrics:
        finish(config, counts, manifest.unigram_entropy, texts, metrics, console)
        benchmarks.collect(metrics.log)  # an evaluation that ends after summary.json is there sees to itself
        metrics.close()
    return 0


def is_due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def load_start(config: Config, model: Transformer, data: Manifest, console: TrainingConsole) -> Path | None:
    """Load the weights the run starts from, if not its own; the checkpoint where it goes on from one of its own."""
    own, init_from = from_main(lambda: checkpoint.newest(Path(config.run.dir), console.say)), config.trainer.init_from
    if own:
        checkpoint.check_same_run(own, config.identity(), data.fingerprint)
        checkpoint.load_weights(model, own)
    elif init_from:
        other = from_main(lambda: checkpoint.find(init_from, console.say))
        checkpoint.check_same_architecture(other, config.identity(), data.tokenizer["fingerprint"])
        checkpoint.load_weights(model, other)
    return own


def go_back(config: Config, step: int, reason: str, rollbacks: Rollbacks, metrics, console: TrainingConsole) -> int:
    """GO_BACK after noting a rollback to the last checkpoint; 1 where going back there has not helped."""
    run_dir, limit = Path(config.run.dir), config.trainer.max_rollbacks
    last = from_main(lambda: checkpoint.newest(run_dir, console.say))
    to_step = checkpoint.read_manifest(last)["step"] if last else 0
    given_up = rollbacks.since(to_step) >= limit
    if metrics:
        log_event(run_dir, "gave_up" if given_up else "rollback", step, to_step=to_step, reason=reason)
        metrics.close(exit_code=1)
    torch.distributed.barrier()
    if given_up:
        console.say(
            f"GIVING UP at step {step}: {reason}, and going back to step {to_step} has not helped {limit} times "
            "(trainer.max_rollbacks); lower optim.lr, raise schedule.warmup_steps, or look at the data"
        )
        return 1
    console.say(f"GOING BACK from step {step} to step {to_step}: {reason}; the data in between is passed over")
    return GO_BACK


if __name__ == "__main__":
    app(main, check_sweep=check_sweep)
