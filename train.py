"""Train a transformer and compare its attention with others'.

python train.py [overrides]                        one process
torchrun --nproc_per_node=8 train.py [overrides]   one node

`configs/train.yaml` has the defaults; `python train.py --cfg job [overrides]` prints the configuration that would run.
Exit codes: 0 done, 2 bad configuration or input, 75 pre-empted after saving (start it again), 1 anything else.
"""

import math
import time
from pathlib import Path

import torch

from configs.app import app
from configs.schema import Config, ConfigError
from data.loader import EvalLoader, TrainLoader
from data.prepare import ensure_prepared
from data.shards import TokenShards
from data.tokenizers import load_tokenizer
from eval.perplexity import bits_per_byte, evaluate, perplexity
from eval.sample import sample_texts
from model import counting
from model.transformer import Transformer, TransformerConfig
from training import checkpoint
from training.console import TrainingConsole, duration
from training.metrics import Metrics, memory_gb, peak_flops, plot_loss, read_metrics
from training.optim import build_optimizer, learning_rate, optimizer_step
from training.preemption import PREEMPTED, Preemption
from training.run_folder import check_before_start, create_run_folder, is_finished
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
    runtime = find_runtime(config)
    console = TrainingConsole(enabled=runtime.is_main)
    check_before_start(config, runtime)
    if is_finished(config):
        console.say(f"{config.run.dir} is finished; choose another run.name to train again")
        return 0
    if runtime.is_main:
        ensure_prepared(config)  # the built-in corpus on first use; the others wait where the process group forms
    init_distributed(runtime)
    engine = None
    try:
        trainer, seq_len, micro = config.trainer, config.trainer.seq_len, config.trainer.micro_batch_size
        train_shards, val_shards = TokenShards(config.data.dir, "train"), TokenShards(config.data.dir, "val")
        manifest = train_shards.manifest
        tokenizer = load_tokenizer(config.tokenizer, config.data.dir)
        ranks = (runtime.rank, runtime.world_size)
        train_data = TrainLoader(train_shards, seq_len, config.run.seed, micro, trainer.global_batch_size, *ranks)
        eval_sequences = trainer.eval_batches and trainer.eval_batches * trainer.global_batch_size
        val_data = EvalLoader(val_shards, seq_len, micro, *ranks, max_samples=eval_sequences)

        # Model, optimizer, engine; the weights are there before DeepSpeed shards them, the moments after.
        torch.manual_seed(config.run.seed)
        network = TransformerConfig.from_config(config)
        model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing)
        resumed = start_weights(config, model, manifest.fingerprint, console)
        model.to(runtime.device)
        engine = build_engine(config, runtime, model, build_optimizer(model, config.optim))
        start_step = skipped = 0
        if resumed:
            checkpoint.load_optimizer(engine, resumed)
            facts = checkpoint.read_manifest(resumed)
            start_step, skipped = facts["step"], facts["skipped_steps"]

        counts = counting.summary(network, seq_len)
        flops, peak = counts["training_flops_per_token"], peak_flops(runtime.device, runtime.dtype) * runtime.world_size
        metrics = None
        if runtime.is_main:
            tree = create_run_folder(config)
            metrics = Metrics(config, tree, start_step)
            rows = {
                "run": f"{config.run.dir}" + (f", going on from step {start_step}" if resumed else ""),
                "model": f"{config.model.name} {config.size.name}, {counts['params'] / 1e6:.1f}M parameters, "
                f"{config.model.n_heads} heads, KV cache {counts['kv_bytes_per_token']:,} bytes a token",
                "data": f"{manifest.name}, {manifest.tokens('train'):,} tokens, unigram entropy {manifest.unigram_entropy:.3f}",
                "steps": f"{trainer.horizon} x {trainer.tokens_per_step:,} tokens = "
                f"{train_data.epochs(trainer.horizon):.2f} epochs",
                "machine": f"{runtime.world_size} x {runtime.device.type}, {config.trainer.dtype} -> {runtime.dtype}, "
                f"{config.deepspeed.name}",
            }
            console.table("T6", rows)

        def save(step: int) -> None:
            facts = {
                "tokens": step * trainer.tokens_per_step,
                "skipped_steps": skipped,
                "identity": config.identity(),
                "data_fingerprint": manifest.fingerprint,
            }
            checkpoint.save(engine, Path(config.run.dir), step, facts, trainer.keep_checkpoints)

        # The loop. A step is one optimizer update on global_batch_size sequences.
        batches = train_data.batches(start_step, trainer.horizon, runtime.device)
        tokens_per_micro_batch, accumulation = micro * seq_len, trainer.accumulation_steps(runtime.world_size)
        skipped_in_a_row, timed_steps, timed_seconds = 0, 0, 0.0
        console.start(start_step, trainer.horizon)
        with Preemption() as preemption:
            for step in range(start_step + 1, trainer.horizon + 1):
                began = time.perf_counter()
                seed_step(config.run.seed, step, runtime.rank)
                lr = learning_rate(step, config.optim.lr, config.schedule, trainer.horizon)
                step_loss = torch.zeros((), device=runtime.device)
                for micro_batch in range(accumulation):
                    tokens, targets = next(batches)
                    # DeepSpeed averages over ranks and micro-batches: the mean over the tokens of the global batch.
                    loss = engine(tokens, targets) / tokens_per_micro_batch
                    engine.backward(loss)
                    step_loss += loss.detach() / accumulation
                    if micro_batch < accumulation - 1:
                        engine.step()  # only counts: the update is below
                grad_norm = optimizer_step(engine, lr, config.optim.grad_clip)

                is_last = step == trainer.horizon
                went_wrong = not math.isfinite(grad_norm)
                skipped += went_wrong
                skipped_in_a_row = skipped_in_a_row + 1 if went_wrong else 0
                timed_steps, timed_seconds = timed_steps + 1, timed_seconds + time.perf_counter() - began
                logged = {}
                if step % trainer.log_every == 0 or is_last:
                    rate = timed_steps * trainer.tokens_per_step / timed_seconds
                    logged |= {
                        "train/loss": mean_over_ranks(step_loss),
                        "optim/lr": lr,
                        "optim/grad_norm": grad_norm,
                        "optim/skipped_steps": skipped,
                        "perf/tokens_per_second": rate,
                        "perf/mfu": flops * rate / peak,
                        "perf/memory_gb": memory_gb(runtime.device),
                    }
                    timed_steps, timed_seconds = 0, 0.0
                if (trainer.eval_every and step % trainer.eval_every == 0) or is_last:
                    engine.eval()
                    loss, _ = evaluate(engine, val_data, runtime.device)
                    engine.train()
                    bits = bits_per_byte(loss, manifest.bytes_per_token("val"))
                    logged |= {"val/loss": loss, "val/perplexity": perplexity(loss), "val/bits_per_byte": bits}
                if metrics and logged:
                    metrics.log(step, step * trainer.tokens_per_step, logged)
                console.update(step, logged)
                if skipped_in_a_row >= config.optim.max_skipped:
                    console.say(f"{skipped_in_a_row} steps in a row had a non-finite gradient: giving up at step {step}; "
                                f"the last checkpoint is whole, a lower optim.lr may help")  # fmt: skip
                    return 1
                preempted = any_rank(preemption.requested is not None, runtime.device)
                if is_last or preempted or (trainer.checkpoint_every and step % trainer.checkpoint_every == 0):
                    save(step)
                if preempted and not is_last:
                    console.stop()
                    console.say(f"{preemption.requested or 'a signal'}: saved step {step}; the same command goes on from here")
                    if metrics:
                        metrics.close(PREEMPTED)
                    return PREEMPTED
        console.stop()

        # The end: samples, the plot, the summary.
        texts = sample_texts(engine.module, tokenizer, trainer.samples, seq_len, runtime.device, config.run.seed)
        if metrics:
            finish(config, counts, manifest, texts, metrics, console)
        return 0
    finally:
        console.stop()
        shut_down(engine)


def start_weights(config: Config, model: Transformer, data_fingerprint: str, console: TrainingConsole) -> Path | None:
    """Load the weights that the run starts from; the checkpoint if it goes on from one of its own."""
    own = checkpoint.newest(Path(config.run.dir), console.say)
    if own:
        saved = checkpoint.read_manifest(own)["data_fingerprint"]
        if saved != data_fingerprint:
            raise ConfigError(f"data.dir={config.data.dir}: holds other data ({data_fingerprint[:12]}) than the run was "
                              f"trained on ({saved[:12]}); prepare that data again or choose another run.name")  # fmt: skip
        checkpoint.load_weights(model, own)
    elif config.trainer.init_from:
        checkpoint.load_weights(model, checkpoint.find(config.trainer.init_from, console.say))
    return own


def finish(config: Config, counts: dict, manifest, texts: list[str], metrics: Metrics, console: TrainingConsole) -> None:
    """Write samples.txt, loss.png and summary.json, and show them."""
    run_dir = Path(config.run.dir)
    checkpoint.write_atomic(run_dir / "samples.txt", "\n\n".join(f"--- sample {i}\n{t}" for i, t in enumerate(texts, 1)) + "\n")
    last = [line for line in read_metrics(run_dir / "metrics.jsonl") if "val/loss" in line][-1]
    plot = plot_loss(run_dir, config.run.name, manifest.unigram_entropy)
    summary = counts | last | {"unigram_entropy": manifest.unigram_entropy, "run": config.run.name}
    metrics.summarize(summary, plot)
    metrics.close()
    if texts:
        console.say(f"\nA sample:\n\n{texts[0]}\n")
    console.table(
        "Done",
        {
            "validation loss": f"{last['val/loss']:.4f} nats a token, {manifest.unigram_entropy - last['val/loss']:.4f} under "
            f"the unigram entropy of {manifest.unigram_entropy:.4f}",
            "perplexity": f"{last['val/perplexity']:.2f}, {last['val/bits_per_byte']:.4f} bits a byte",
            "loss plot": str(plot),
            "samples": str(run_dir / "samples.txt"),
        },
    )


if __name__ == "__main__":
    app(main)
