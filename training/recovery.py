"""Where a run starts, what a checkpoint says of it, and how it goes back, past the data that spoiled it, or ends."""

import os
from contextlib import suppress
from pathlib import Path

import torch

from data.shards import Manifest
from data.tokenizers import Tokenizer
from model.transformer import Transformer
from training import checkpoint, hugging_face
from training.config import Config, TrainerConfig
from training.device import Runtime, dtype_name
from training.engine import restore
from training.fork import fork
from training.health import Health
from training.metrics import Metrics, log_event
from training.ranks import from_main, world_size
from training.report import Report
from training.run_folder import create_run_folder
from training.saver import CheckpointSaver
from training.session import PREEMPTED, Ended, Session
from training.stored import read_events

LOST = (
    "{0}: has saved checkpoints, none of which can be read: training would begin again and lose what it has logged. "
    "Bring one back to {0}/checkpoints. To begin again on purpose, move {0} away, or remove {0}/latest"
)
GO_BACK = -1  # train() is to be called again: it resumes from the last checkpoint


class Rollbacks:
    """How often a run went back, as its events.jsonl has it, and the data it has skipped: that of the steps between."""

    def __init__(self, run_dir: Path):
        events = [event for event in read_events(run_dir) if event["event"] == "rollback"]
        self.done = [(event["to_step"], event["step"] - event["to_step"]) for event in events]

    def skipped_batches(self, step: int) -> int:
        """Return the global batches skipped before the step after `step`."""
        return sum(batches for to_step, batches in self.done if to_step <= step)

    def since(self, step: int) -> int:
        """Return how often the run has gone back to the checkpoint of `step`, or to a later one."""
        return sum(to_step >= step for to_step, _ in self.done)


def load_start(config: Config, model: Transformer, data: Manifest, report: Report) -> Path | None:
    """Load the weights the run starts from, if not its own; return the checkpoint from which it resumes, if any."""
    run_dir = Path(config.run.dir)
    own = from_main(lambda: checkpoint.newest(run_dir, report.say))
    if own is None and from_main(lambda: os.path.lexists(run_dir / "latest")):  # which the first checkpoint leaves
        raise Ended(LOST.format(run_dir), 1)
    if own is None and config.trainer.fork_from:
        own = from_main(lambda: fork(config, data.fingerprint, report.say))
    if own:
        checkpoint.check_same_run(own, config.identity(), data.fingerprint)
        checkpoint.load_weights(model, own)
    elif (init_from := config.trainer.init_from) and hugging_face.is_export(init_from):
        hugging_face.check_tokenizer(init_from, data.tokenizer["fingerprint"], config.tokenizer.end_of_text)
        hugging_face.load(init_from, model)
    elif init_from:
        other = from_main(lambda: checkpoint.find(init_from, report.say))
        checkpoint.check_same_architecture(other, config.identity(), data.tokenizer["fingerprint"])
        checkpoint.load_weights(model, other)
    return own


def restore_run(engine, folder: Path | None, trainer: TrainerConfig) -> tuple[int, Health]:
    """Give the engine the rest of a checkpoint, if there is one; return its step and the run's health at that step."""
    if folder is None:
        return 0, Health(trainer)
    restore(engine, folder)
    facts = checkpoint.read_manifest(folder)
    return facts["step"], Health(trainer, **facts["health"])


def open_record(
    config: Config, runtime: Runtime, run: Session, start_step: int, data: Manifest, tokenizer: Tokenizer,
    facts: dict[str, float],
) -> Metrics:  # fmt: skip
    """Make the run folder and open its record, with `facts` in W&B's summary; a start is an event, a return is not."""
    create_run_folder(config, tokenizer)
    metrics = Metrics(config, start_step)
    facts = facts | {"unigram_entropy": data.unigram_entropy, "data_fingerprint": data.fingerprint}
    facts["tokenizer_fingerprint"] = data.tokenizer["fingerprint"]
    for name, split in data.splits.items():
        facts |= {f"data/{name}/tokens": split.tokens, f"data/{name}/documents": split.documents}
    metrics.wandb.note(facts)
    if not run.preemption.training:
        machine = {"world_size": world_size(), "device": runtime.device.type, "dtype": dtype_name(runtime.dtype)}
        log_event(Path(config.run.dir), "start", start_step, deepspeed=config.deepspeed.name, **machine)
    return metrics


def checkpoint_facts(config: Config, data: Manifest, health: Health, step: int, val_loss: float | None) -> dict:
    """Return what a checkpoint's manifest says of the run at `step`."""
    return {
        "val_loss": val_loss,
        "tokens": step * config.trainer.tokens_per_step,
        "health": health.state(),
        "identity": config.identity(),
        "data_fingerprint": data.fingerprint,
        "tokenizer_fingerprint": data.tokenizer["fingerprint"],
    }


def end_preempted(step: int, run: Session, saver: CheckpointSaver, metrics: Metrics | None, report: Report) -> int:
    """Wait for the checkpoint of `step`, and report that the run was asked to end."""
    with run.preemption.saving():
        outcome = f"saved step {step}" if saver.finish() else "not saved"
    signal = run.preemption.requested
    report.say(f"{signal or 'signal'}: {outcome}; the same command resumes from here")
    if metrics:
        with suppress(OSError):
            log_event(metrics.run_dir, "preempted", step, signal=signal)
        metrics.close(PREEMPTED)
    return PREEMPTED


def go_back(
    config: Config, step: int, reason: str, rollbacks: Rollbacks, metrics: Metrics | None, report: Report
) -> int:
    """Return GO_BACK after noting a rollback to the last checkpoint, or 1 if going back there has not helped."""
    run_dir, limit = Path(config.run.dir), config.trainer.max_rollbacks
    last = from_main(lambda: checkpoint.newest(run_dir, report.say))
    to_step = checkpoint.read_manifest(last)["step"] if last else 0
    given_up = rollbacks.since(to_step) >= limit
    event, code = ("gave_up", 1) if given_up else ("rollback", GO_BACK)
    said = f"Going back from step {step} to step {to_step}: {reason}; the data in between is skipped"
    if given_up:
        said = (
            f"Giving up at step {step}: {reason}, and going back to step {to_step} has not helped {limit} times "
            "(trainer.max_rollbacks); lower optim.lr, raise schedule.warmup_steps, or look at the data"
        )
    if metrics:
        log_event(run_dir, event, step, to_step=to_step, reason=reason)
        metrics.close(exit_code=1)
    torch.distributed.barrier()
    report.say(said)
    return code
