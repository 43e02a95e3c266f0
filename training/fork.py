"""A fork: a run that takes over the weights, the optimizer's state and the place in the data of another's checkpoint.

It may have another horizon, schedule or learning rate; with the trunk's it is the trunk. The checkpoint becomes the
fork's own first one, so that from there on the fork resumes, goes back and ends like any run.
"""

import json
from collections.abc import Callable
from pathlib import Path

from configs.errors import ConfigError, writing
from data.files import write_atomic
from training import checkpoint
from training.config import Config
from training.stored import read_events

KEY = "trainer.fork_from"
MAY_DIFFER = ("schedule.", "trainer.horizon", "optim.lr", "optim.weight_decay", "optim.grad_clip")  # of the identity


def check(config: Config) -> None:
    """Raise a ConfigError if the checkpoint that the fork would begin with is none, or one of another kind of run."""
    source = config.trainer.fork_from
    checkpoint.check_source(source, KEY)
    folders = [Path(source), *reversed(checkpoint.checkpoint_dirs(Path(source)))]
    whole = (folder for folder in folders if not checkpoint.problems(folder, checksums=False))
    if first := next(whole, None):  # else `fork` reports what is broken
        check_trunk(first, config)


def check_trunk(folder: Path, config: Config) -> None:
    manifest = checkpoint.read_manifest(folder)
    there, here = manifest["identity"], config.identity()
    same = {key: value for key, value in here.items() if not key.startswith(MAY_DIFFER)}
    trunk = {key: value for key, value in there.items() if not key.startswith(MAY_DIFFER)}
    if keys := checkpoint.differing(trunk, same):
        raise ConfigError(
            f"{KEY}: {folder} is of a run that differs in more than schedule, horizon and learning rate:{keys}"
        )
    step, horizon = manifest["step"], config.trainer.horizon
    if step >= horizon:
        raise ConfigError(f"{KEY}: {folder} is at step {step}, and this run ends at step {horizon}; raise its horizon")


def fork(config: Config, data_fingerprint: str, warn: Callable[[str], None]) -> Path:
    """Make the trunk's checkpoint the first one of this run, and return it. Rank 0 calls it."""
    source, run_dir = config.trainer.fork_from, Path(config.run.dir)
    trunk = checkpoint.find(source, warn, KEY)
    check_trunk(trunk, config)
    manifest = checkpoint.read_manifest(trunk)
    checkpoint.check_same_data(trunk, manifest, data_fingerprint)
    with writing("run.dir", run_dir):
        # Data that the trunk skipped before this step, or right after it, is skipped here too.
        rollbacks = [event for event in read_events(trunk.parent.parent) if event["event"] == "rollback"]
        kept = [event for event in rollbacks if event["to_step"] <= manifest["step"]]
        forked = {"event": "fork", "step": manifest["step"], "source": str(trunk)}
        write_atomic(run_dir / "events.jsonl", "".join(json.dumps(event) + "\n" for event in [*kept, forked]))
        return checkpoint.adopt(run_dir, trunk, {"identity": config.identity(), "forked_from": str(trunk)})
