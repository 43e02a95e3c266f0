"""Documents to token shards: `python -m data.prepare data=NAME [overrides]`.

Everything is written into `<data.dir>.partial` and renamed into place at the end, so that nobody sees half of it. A
killed preparation goes on from there when it is started again. With `part=I parts=N` it is one of N that may run at
the same time, on several machines: the last to finish joins them.
"""

import dataclasses
import os
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import filelock

from configs.app import app
from configs.errors import at_least, writing
from configs.load import load_extended
from configs.schema import Config, ConfigError, DataConfig, TokenizerConfig
from data.build import build, has_finished_shards
from data.foreign import adopt, foreign_shards
from data.parallel import say
from data.parts import all_finished, join, prepare_part, remove_parts
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest
from data.sources import matching_files
from data.tokenizers import new_tokenizer

ON_FIRST_USE = ("builtin", "shards")  # sources that a training run prepares by itself


@dataclass
class PrepareConfig(Config):
    part: int = 0  # of so many parts, from 0
    parts: int = 1

    def own_errors(self):
        yield from at_least(1, "", self, "parts")
        if self.parts >= 1 and not 0 <= self.part < self.parts:
            yield f"part={self.part}: must lie between 0 and parts - 1 = {self.parts - 1}"


def prepare(config: Config, progress: bool = True, parts: int = 1) -> Manifest:
    """Make the shards of `config.data` with `config.tokenizer` in `config.data.dir`, unless they are there already.

    With `parts` they are joined from parts that are all finished.

    ConfigError where the folder holds data made with other settings, something else, or a broken shard.
    """
    dir, settings = Path(config.data.dir), settings_of(config.data)
    if found := prepared(config):
        say(f"{dir}: already prepared, {describe(found)}", progress)
        return found
    check_before_work(config)
    unfinished, lock = dir.with_name(f"{dir.name}.partial"), dir.with_name(f"{dir.name}.lock")
    goes_on = "; what is finished stays, and the same command goes on from there"
    with writing("data.dir", dir, goes_on):
        dir.parent.mkdir(parents=True, exist_ok=True)
        with waiting(lock, f"{dir}: another process prepares it, waiting for that", progress):
            try:
                if found := prepared(config):  # by another process, in the meantime
                    say(f"{dir}: prepared by another process, {describe(found)}", progress)
                    return found
                if config.data.source == "shards":
                    manifest = adopt(dir, config.data, config.tokenizer, settings, progress)
                else:  # whoever else wrote into the unfinished folder is gone: we have the lock
                    made = partial(join, parts=parts) if parts > 1 else build
                    manifest = made(config.data, config.tokenizer, unfinished, settings, progress)
                    unfinished.rename(dir)
                    remove_parts(dir)
            finally:
                if has_finished_shards(unfinished):
                    say(f"{unfinished}: keeps what is finished; the same command goes on from there", progress)
                else:
                    shutil.rmtree(unfinished, ignore_errors=True)
                lock.unlink(missing_ok=True)
    say(f"{dir}: prepared, {describe(manifest)}", progress)
    return manifest


def waiting(lock: Path, words: str, progress: bool):
    """The lock, held until its `with` ends; `words` where another process has it first."""
    one = filelock.FileLock(lock)
    try:
        return one.acquire(timeout=0)
    except filelock.Timeout:
        say(words, progress)
        return one.acquire()


def prepare_in_parts(config: Config, part: int, parts: int, progress: bool = True) -> Manifest | None:
    """One part of N, and `prepare` from all of them where they are finished; None where others are not."""
    if parts > 1 and not prepared(config):
        check_before_work(config)
        settings = settings_of(config.data)
        prepare_part(config.data, config.tokenizer, settings, part, parts, progress)
        if not all_finished(config.data, config.tokenizer, settings, parts):
            say(f"{config.data.dir}: other parts are not finished; the last one joins them", progress)
            return None
    return prepare(config, progress, parts)


def ensure_prepared(config: Config, progress: bool = True) -> Manifest:
    """The manifest of the prepared data; the built-in corpus is prepared on first use (one process at a time), and
    shards from elsewhere are indexed.

    ConfigError where any other source is not prepared, naming the command that does it.
    """
    if found := prepared(config):
        return found
    if config.data.source not in ON_FIRST_USE:
        raise not_prepared(config)
    return prepare(config, progress)


def not_prepared(config: Config) -> ConfigError:
    """What to say where there are no shards; it names the command that makes them."""
    data, kind = config.data, config.tokenizer.kind
    files = f" data.files='[{','.join(data.files)}]'" if data.files else ""
    tokenizer = "gpt2" if kind == "tiktoken" else kind  # its group
    return ConfigError(
        f"data.dir={data.dir}: not prepared: run `python -m data.prepare data={data.name}{files} "
        f"tokenizer={tokenizer}` with the same overrides as here"
    )


def prepared(config: Config) -> Manifest | None:
    """The manifest in `config.data.dir` after a quick check of settings and shards; None where there is none."""
    dir = Path(config.data.dir)
    if not (dir / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(dir)
    ours = settings_of(config.data) | tokenizer_settings(config.tokenizer)
    theirs = manifest.settings | tokenizer_settings(manifest.tokenizer_config())
    what = f"its {MANIFEST_FILE}" if config.data.source == "shards" else "the folder"
    errors = [
        f"data.dir={dir}: was prepared with {key}={theirs.get(key)}, not {value}; choose another data.dir or "
        f"remove {what}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if errors:
        raise ConfigError(*errors)
    for split in SPLITS:
        TokenShards(dir, split)
    return manifest


def check_before_work(config: Config) -> None:
    """What can be found wrong before anything is written."""
    dir = Path(config.data.dir)
    new_tokenizer(config.tokenizer)
    if config.data.source == "shards":
        foreign_shards(dir)
        return
    if dir.is_dir() and any(dir.iterdir()):
        raise ConfigError(
            f"data.dir={dir}: holds files but no {MANIFEST_FILE}; choose another data.dir or remove the folder"
        )
    if dir.exists() and not dir.is_dir():
        raise ConfigError(f"data.dir={dir}: is a file, must be a folder or a name that is free")
    for _, part in config.data.parts() or [(1.0, config.data)]:
        if part.source == "files":
            matching_files(part)


def settings_of(data: DataConfig) -> dict:
    """The settings that decide the shards' contents, by config key."""
    if data.source == "shards":
        return {"data.source": "shards"}
    keys = ("source", "files", "path", "subset", "split", "revision", "mixture", "column", "val_fraction")
    return {f"data.{key}": getattr(data, key) for key in (*keys, "max_document_bytes", "shard_tokens", "token_dtype")}


def tokenizer_settings(tokenizer: TokenizerConfig) -> dict:
    return {f"tokenizer.{key}": value for key, value in dataclasses.asdict(tokenizer).items() if key != "name"}


def describe(manifest: Manifest) -> str:
    parts = (f"{manifest.tokens(key):,} {key} tokens in {manifest.documents(key):,} documents" for key in SPLITS)
    skipped = sum(manifest.skipped.values())
    return ", ".join(parts) + (f"; skipped {skipped:,} ({manifest.skipped})" if skipped else "")


def main(config: PrepareConfig) -> None:
    is_main = int(os.environ.get("RANK", 0)) == 0
    manifest = prepare_in_parts(config, config.part, config.parts, progress=is_main)
    if manifest and is_main:
        from training.wandb_run import log_preparation  # it needs torch, which preparing does not

        log_preparation(config, manifest)


if __name__ == "__main__":
    app(main, load=partial(load_extended, cls=PrepareConfig))
