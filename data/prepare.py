"""Documents to token shards: `python -m data.prepare data=NAME [overrides]`.

Everything is written into `<data.dir>.partial` and renamed at the end, so that nobody sees half of it. A killed
preparation resumes when it is started again. With `part=I parts=N` it is one of N that may run at the same time, on
several machines; the last to finish joins them.
"""

import glob
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from pydantic import Field, model_validator

from configs.app import app, choices, configured
from configs.errors import ConfigError, Mistakes, each, writing
from configs.load import shown
from data.build import CHANGED, JOURNAL_FILE, Job, build, is_unfinished, join, prepare_part
from data.config import DataCommand, DataConfig, TokenizerConfig, fill_data_dir
from data.files import make_folder, remove_empty
from data.parallel import report
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest
from data.sources.base import source_of
from data.tokenizers import new_tokenizer

OLDER = {"data.validation": "documents", "data.separator": None}  # what older manifests do not say
PLAIN = re.compile(r"[A-Za-z_./*][\w./*:+@%?-]*")  # a text that Hydra takes as it stands


class PrepareConfig(DataCommand):
    part: int = Field(0, ge=0, lt=10**5)  # of `parts`, from 0
    parts: int = Field(1, ge=1, le=10**5)

    @model_validator(mode="after")
    def _is_one_of_them(self):
        if self.part >= self.parts:
            raise Mistakes(f"part={self.part}: must be less than parts={self.parts}")
        return self


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, progress: bool = True, part: int = 0, parts: int = 1
) -> Manifest | None:
    """Make the shards of `data` with `tokenizer` in `data.dir`, unless they are there already; return the manifest.

    With `parts`, make one part, and join all of them if the others are finished; return None if they are not.
    ConfigError if the folder holds data made with other settings, something else, or a broken shard.
    """
    dir, job = Path(data.dir), Job(data, tokenizer, progress, parts)
    unfinished, lock = dir.with_name(f"{dir.name}.partial"), dir.with_name(f"{dir.name}.lock")
    if found := prepared(data, tokenizer):
        if job.source.has_changed(found.source):
            raise ConfigError(
                f"data.dir={dir}: {CHANGED} since they were prepared; remove the folder to prepare them again, or "
                "choose another data.dir"
            )
        report(f"{dir}: already prepared, {describe(found)}", progress)
        return found
    check_before_work(data, tokenizer)
    with writing("data.dir", dir, "; what is finished is kept, and the same command resumes"), folder_for(dir):
        if parts > 1:
            prepare_part(job, part)
            if not all(job.finished_part(each) for each in range(parts)):
                report(f"{dir}: other parts are not finished; the last one joins them", progress)
                return None
        with alone(lock, f"{dir}: waiting for another process that is preparing it", progress):
            try:
                manifest = prepared(data, tokenizer)  # by the process that had the lock
                if not manifest and job.source.in_place:
                    manifest = job.source.adopt(job)
                elif not manifest:  # and no other process writes into the unfinished folder
                    manifest = join(job, unfinished) if parts > 1 else build(job, unfinished)
                    unfinished.rename(dir)
                    (dir / JOURNAL_FILE).unlink()
                    for finished in dir.parent.glob(f"{glob.escape(dir.name)}.parts-{'[0-9a-f]' * 8}"):
                        shutil.rmtree(finished, ignore_errors=True)
            finally:
                if any(unfinished.glob("*.bin")):
                    report(f"{unfinished}: what is done is kept; the same command resumes", progress)
                elif is_unfinished(unfinished):
                    shutil.rmtree(unfinished, ignore_errors=True)
    report(f"{dir}: prepared, {describe(manifest)}", progress)
    return manifest


@contextmanager
def folder_for(dir: Path) -> Iterator[None]:
    """Make the folder that `dir` will stand in; remove it if what follows fails and leaves nothing there."""
    made = make_folder(dir.parent)
    try:
        yield
    except BaseException:
        remove_empty(made)
        raise


@contextmanager
def alone(path: Path, words: str, progress: bool) -> Iterator[None]:
    """Hold a lock; report `words` if another process has it first."""
    if path.exists() and path.stat().st_size:
        raise ConfigError(f"{path}: is in the way: it is no lock; move it, or choose another data.dir")
    try:
        path.touch()  # filelock takes a folder that cannot be written to for a lock that another process has
    except FileNotFoundError as error:  # /proc
        raise ConfigError(f"{path}: cannot be made ({error.strerror}); choose another data.dir") from error
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        report(words, progress)
        lock.acquire()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()


def ensure_prepared(data: DataConfig, tokenizer: TokenizerConfig, progress: bool = True) -> Manifest:
    """Return the manifest, preparing the data if its source allows that on first use, else ConfigError.

    That the documents have changed since is reported: the shards are what they were.
    """
    if found := prepared(data, tokenizer):
        if progress and source_of(data).has_changed(found.source):
            report(f"{data.dir}: {CHANGED} since they were prepared; the shards are those of before", progress)
        return found
    if not source_of(data).on_first_use:
        raise ConfigError(f"data.dir={data.dir}: not prepared: run `{preparing_command(data, tokenizer)}`")
    return prepare(data, tokenizer, progress)


def prepared(data: DataConfig, tokenizer: TokenizerConfig) -> Manifest | None:
    """Return the manifest in `data.dir` after a quick check of settings and shards; None if there is none."""
    dir = Path(data.dir)
    if not (dir / MANIFEST_FILE).is_file():
        return None
    manifest = read_manifest(dir)
    ours, theirs = (
        settings | {f"tokenizer.{key}": value for key, value in block.model_dump(exclude={"name"}).items()}
        for settings, block in ((data.settings(), tokenizer), (OLDER | manifest.settings, manifest.tokenizer_config()))
    )
    not_ours = not manifest.source or source_of(data).in_place
    remedy = f"choose another data.dir or remove {f'its {MANIFEST_FILE}' if not_ours else 'the folder'}"
    errors = [
        f"data.dir={dir}: was prepared with {key}={shown(theirs.get(key))}, not {shown(value)}; {remedy}"
        for key, value in ours.items()
        if theirs.get(key) != value
    ]
    if errors:
        raise ConfigError(*errors)
    for split in SPLITS:
        TokenShards(dir, split)
    return manifest


def check_before_work(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Raise ConfigError for what can be found wrong before anything is written."""
    dir, source = Path(data.dir), source_of(data)
    if not source.in_place and dir.exists():
        if not dir.is_dir():
            raise ConfigError(f"data.dir={dir}: is a file, must be a folder or a free name")
        if any(dir.iterdir()):
            raise ConfigError(
                f"data.dir={dir}: holds files but no {MANIFEST_FILE}; choose another data.dir or remove the folder"
            )
    each(lambda check: check(), (lambda: new_tokenizer(tokenizer), source.check))


def preparing_command(data: DataConfig, tokenizer: TokenizerConfig) -> str:
    """Return the command that prepares exactly this: the closest choices, and the keys in which they differ."""
    words = []
    for group, names in (("data", (data.name, data.source)), ("tokenizer", (tokenizer.name, tokenizer.kind))):
        known = choices(group)
        words.append(f"{group}={next(name for name in (*names, *known) if name in known)}")
    command = configured(DataCommand, words)
    left_out = {"workers", "document_mask"}  # they do not change what is prepared
    if data == fill_data_dir(data.replace(dir=None), tokenizer):
        left_out.add("dir")
    for group, block, chosen in (("data", data, command.data), ("tokenizer", tokenizer, command.tokenizer)):
        for key, value in block.model_dump(exclude=left_out).items():
            follows = key == "name" and value == f"{tokenizer.kind}-{tokenizer.vocab_size}"
            if value != getattr(chosen, key) and not follows:
                words.append(f"{group}.{key}={shlex.quote(hydra_value(value))}")
    return " ".join(["python -m data.prepare", *words])


def hydra_value(value: Any) -> str:
    """Return a value as an override gives it."""
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{hydra_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, list):
        return f"[{','.join(map(hydra_value, value))}]"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return f"'{value}'" if '"' in value else f'"{value}"'
    return shown(value)


def describe(manifest: Manifest) -> str:
    parts = (f"{each.tokens:,} {name} tokens in {each.documents:,} documents" for name, each in manifest.splits.items())
    skipped = sum(manifest.skipped.values())
    return ", ".join(parts) + (f"; skipped {skipped:,} ({manifest.skipped})" if skipped else "")


def main(config: PrepareConfig) -> None:
    prepare(config.data, config.tokenizer, part=config.part, parts=config.parts)


if __name__ == "__main__":
    app(main, PrepareConfig)
