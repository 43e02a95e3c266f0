"""Train a transformer and compare its attention with others'.

python train.py [overrides]                        one process
torchrun --nproc_per_node=8 train.py [overrides]   one node

`configs/train.yaml` has the defaults; `python train.py --cfg job [overrides]` prints the configuration that would run.
Exit codes: 0 done, 2 bad configuration or input, 75 pre-empted after saving (start it again), 1 anything else.
"""

import math
import time
from contextlib import closing
from pathlib import Path

import torch

from configs.app import app
from configs.schema import Config, ConfigError
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared
from data.shards import TokenShards
from data.tokenizers import load_tokenizer
from eval.in_training import Benchmarks
from eval.perplexity import bits_per_byte, evaluate, perplexity
from eval.sample import sample_texts
from model import counting
from model.transformer import Transformer, TransformerConfig
from training import checkpoint
from training.console import TrainingConsole
from training.metrics import Metrics, memory_gb, peak_flops
from training.optim import build_optimizer, learning_rate, optimizer_step
from training.preemption import PREEMPTED, Preemption
from training.run_folder import check_before_start, create_run_folder, finish, is_finished
from training.setup import (
    any_rank,
    build_engine,
    find_runtime,
    init_distributed,
    mean_over_ranks,
    seed_step,
    shut_down,
)


def main(config: Config) -> int:
    """One run, from a checked configuration to its exit code."""
    runtime = find_runtime(config)
    console = TrainingConsole(enabled=runtime.is_main)
    check_before_start(config, runtime)
    if is_finished(config):
        console.say(f"{config.run.dir} is finished; choose another run.name to train again")
        return 0
    if runtime.is_main:
        ensure_prepared(config)  # the built-in corpus on first use; the others wait where the process group forms
    init_distributed(runtime)
    try:
        return train(config, runtime, console)
    finally:
        console.stop()
        shut_down()


def train(config: Config, runtime, console: TrainingConsole) -> int:
    trainer, run_dir, device = config.trainer, Path(config.run.dir), runtime.device

    # --- data: which sequences a step sees depends on the seed and the step alone
    train_shards, val_shards = TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")
    manifest, tokenizer = train_shards.manifest, load_tokenizer(config.tokenizer, config.data.dir)
    micro_batch_size, ranks = trainer.micro_batch_size, (runtime.rank, runtime.world_size)
    train_data = TrainLoader(
        train_shards, trainer.seq_len, config.run.seed, micro_batch_size, trainer.global_batch_size, *ranks
    )
    eval_sequences = trainer.eval_batches and trainer.eval_batches * trainer.global_batch_size
    val_data = EvalLoader(val_shards, trainer.seq_len, micro_batch_size, *ranks, max_samples=eval_sequences)

    benchmarks = Benchmarks(config, runtime, tokenizer, console.say)

    # --- model, optimizer, engine: the weights are in place before DeepSpeed shards them, the moments after
    torch.manual_seed(config.run.seed)
    network = TransformerConfig.from_config(config, tokenizer.end_of_text)
    model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing)
    resumed = load_start(config, model, manifest.fingerprint, console)
    model.to(device)
    engine = build_engine(config, runtime, model, build_optimizer(model, config.optim))
    start_step = skipped_steps = 0
    if resumed:
        checkpoint.load_optimizer(engine, resumed)
        facts = checkpoint.read_manifest(resumed)
        start_step, skipped_steps = facts["step"], facts["skipped_steps"]

    # --- the run folder and what goes into it
    counts = counting.summary(network, trainer.seq_len)
    machine_peak = peak_flops(device, runtime.dtype) * runtime.world_size
    metrics = Metrics(config, create_run_folder(config), start_step) if runtime.is_main else None
    console.introduce(config, runtime, counts, manifest, start_step, train_data.epochs(trainer.horizon))

    keep = benchmarks.keep(checkpoint.keepers(trainer.keep_checkpoints, trainer.keep_every, trainer.keep_best))

    def save(step: int, val_loss: float | None) -> bool:
        facts = {
            "val_loss": val_loss,
            "tokens": step * trainer.tokens_per_step,
            "skipped_steps": skipped_steps,
            "identity": config.identity(),
            "data_fingerprint": manifest.fingerprint,
        }
        failure = checkpoint.save(engine, run_dir, step, facts, keep)
        if failure:
            console.say(f"THE CHECKPOINT OF STEP {step} COULD NOT BE SAVED, training goes on: {failure}")
        return not failure

    # --- the loop: a step is one optimizer update on global_batch_size sequences
    accumulation_steps = trainer.accumulation_steps(runtime.world_size)
    skipped_in_a_row, timed_steps, timed_seconds = 0, 0, 0.0
    console.start(start_step, trainer.horizon)
    with Preemption() as preemption, closing(train_data.batches(start_step, trainer.horizon, device)) as batches:
        for step in range(start_step + 1, trainer.horizon + 1):
            began, is_last = time.perf_counter(), step == trainer.horizon
            seed_step(config.run.seed, step, runtime.rank)
            lr = learning_rate(step, config.optim.lr, config.schedule, trainer.horizon)
            train_loss = torch.zeros((), device=device)
            for micro_step in range(1, accumulation_steps + 1):
                tokens, targets = next(batches)
                # The mean over the tokens of the global batch: DeepSpeed averages over micro-batches and ranks.
                loss = engine(tokens, targets) / targets.numel()
                engine.backward(loss)
                train_loss += loss.detach() / accumulation_steps
                if micro_step < accumulation_steps:
                    engine.step()  # only counts: the update comes next
            grad_norm = optimizer_step(engine, lr, config.optim.grad_clip)
            was_skipped = not math.isfinite(grad_norm)
            skipped_steps += was_skipped
            skipped_in_a_row = skipped_in_a_row + 1 if was_skipped else 0
            timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - began

            logged = {}
            if step % trainer.log_every == 0 or is_last:
                rate = timed_steps * trainer.tokens_per_step / timed_seconds
                timed_steps, timed_seconds = 0, 0.0
                logged = {
                    "train/loss": mean_over_ranks(train_loss),
                    "optim/lr": lr,
                    "optim/grad_norm": grad_norm,
                    "optim/skipped_steps": skipped_steps,
                    "perf/tokens_per_second": rate,
                    "perf/mfu": counts["training_flops_per_token"] * rate / machine_peak,
                    "perf/memory_gb": memory_gb(device),
                }
            if is_due(step, trainer.eval_every) or is_last:
                engine.eval()
                val_loss, _ = evaluate(engine, val_data, device)
                engine.train()
                logged |= {
                    "val/loss": val_loss,
                    "val/perplexity": perplexity(val_loss),
                    "val/bits_per_byte": bits_per_byte(val_loss, manifest.bytes_per_token("val")),
                }
            if benchmarks.due(step):
                logged |= benchmarks.run(engine.module, step)
            if metrics and logged:
                metrics.log(step, step * trainer.tokens_per_step, logged)
                benchmarks.collect(metrics.log)
            console.update(step, logged)

            if skipped_in_a_row >= trainer.max_bad_steps:
                console.say(f"giving up at step {step}: the gradient was not finite {skipped_in_a_row} steps in a row")
                return 1
            preempted = any_rank(preemption.requested is not None, device) and not is_last
            if is_due(step, trainer.checkpoint_every) or benchmarks.due(step) or is_last or preempted:
                saved = save(step, logged.get("val/loss"))
                if saved and benchmarks.due(step):
                    benchmarks.submit(step)
                if is_last and not saved:
                    return 1
            if preempted:
                outcome = f"saved step {step}" if saved else "not saved"
                console.say(f"{preemption.requested or 'signal'}: {outcome}; the same command goes on from here")
                if metrics:
                    metrics.close(PREEMPTED)
                return PREEMPTED
    console.stop()

    # --- the end: samples, plot, summary
    texts = sample_texts(engine.module, tokenizer, trainer.samples, trainer.seq_len, device, config.run.seed)
    if metrics:
        finish(config, counts, manifest.unigram_entropy, texts, metrics, console)
    return 0


def is_due(step: int, every: int | None) -> bool:
    return bool(every) and step % every == 0


def load_start(config: Config, model: Transformer, data_fingerprint: str, console: TrainingConsole) -> Path | None:
    """Load the weights the run starts from, if not its own; the checkpoint where it goes on from one of its own."""
    own = checkpoint.newest(Path(config.run.dir), console.say)
    if own:
        saved = checkpoint.read_manifest(own)["data_fingerprint"]
        if saved != data_fingerprint:
            raise ConfigError(
                f"data.dir={config.data.dir}: is not the data that {own} was trained on "
                f"({data_fingerprint[:12]} instead of {saved[:12]}); prepare it again or choose another run.name"
            )
        checkpoint.load_weights(model, own)
    elif config.trainer.init_from:
        checkpoint.load_weights(model, checkpoint.find(config.trainer.init_from, console.say))
    return own


if __name__ == "__main__":
    app(main)
