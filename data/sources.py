"""Where documents come from: the built-in corpus, or local files through Hugging Face `datasets`."""

import glob
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path

import datasets

from configs.schema import ConfigError, DataConfig
from data import builtin
from data.parallel import console

BUILDERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".xz", ".bz2")  # unpacked on the way by `datasets`


def load_documents(config: DataConfig, progress: bool = True, cache_dir: Path | None = None) -> datasets.Dataset:
    """The documents of `config.source` in a column `text`, and `name` where they have names.

    `cache_dir` is where `datasets` keeps the Arrow copy of files that it maps into memory (default: its own cache).
    """
    if config.source == "builtin":
        return datasets.Dataset.from_list(builtin.documents(config.workers, progress))
    return load_files(matching_files(config), config, progress, cache_dir)


def matching_files(config: DataConfig) -> list[str]:
    """The files that `data.files` matches, sorted. ConfigError where a pattern matches none."""
    if not config.files:
        raise ConfigError("data.files=[]: must name the files to read, for example data.files='[texts/*.parquet]'")
    files, errors = set(), []
    for pattern in config.files:
        found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not found:
            errors.append(f"data.files: no file matches {pattern!r} in {Path.cwd()}")
        files.update(found)
    if errors:
        raise ConfigError(*errors)
    return sorted(files)


def builder(files: list[str]) -> str:
    """The `datasets` builder for the files' extension. ConfigError for an unknown extension, or several."""
    found: dict[str, list[str]] = {}
    for file in files:
        suffixes = Path(file).suffixes
        if suffixes and suffixes[-1] in PACKED:
            suffixes.pop()
        extension = suffixes[-1].lower() if suffixes else ""
        if extension not in BUILDERS:
            raise ConfigError(
                f"data.files: {file} has no known extension: must be one of {', '.join(BUILDERS)} "
                f"(or one of these and {', '.join(PACKED)})"
            )
        found.setdefault(BUILDERS[extension], []).append(file)
    if len(found) > 1:
        examples = ", ".join(f"{name} ({names[0]})" for name, names in sorted(found.items()))
        raise ConfigError(f"data.files: the files are of several kinds, {examples}: prepare one kind at a time")
    return next(iter(found))


def load_files(files: list[str], config: DataConfig, progress: bool, cache_dir: Path | None) -> datasets.Dataset:
    kind = builder(files)
    options = {
        "text": {"sample_by": "document", "encoding_errors": "replace"},
        "json": {"encoding_errors": "replace"},
    }.get(kind, {})
    with quiet(progress) as logged:
        try:
            table = datasets.load_dataset(
                kind, data_files=files, split="train", cache_dir=cache_dir and str(cache_dir), **options
            )
        except Exception as error:  # whatever a file that isn't what its name says makes the readers raise
            reasons = [record.getMessage() for record in logged] or [str(error.__cause__ or error)]
            reason = next(iter(reasons[0].splitlines()), "") or "there is nothing in it"
            raise ConfigError(f"data.files={config.files}: cannot be read as {kind}: {reason}") from error
    column = "text" if kind == "text" else config.column
    if column not in table.column_names:
        raise ConfigError(
            f"data.column={column}: no such column in the files of data.files; columns there: "
            + ", ".join(table.column_names)
        )
    return table.select_columns([column]).rename_columns({column: "text"} if column != "text" else {})


@contextmanager
def quiet(progress: bool) -> Iterator[list[logging.LogRecord]]:
    """Keep back the log lines of `datasets` (they name the broken file), and its bars where there is no terminal."""
    logger, bars = logging.getLogger("datasets"), datasets.is_progress_bar_enabled()
    handlers, logger.handlers = logger.handlers, [BufferingHandler(capacity=1000)]
    if not (progress and console.is_terminal):
        datasets.disable_progress_bars()
    try:
        yield logger.handlers[0].buffer
    finally:
        logger.handlers = handlers
        if bars:
            datasets.enable_progress_bars()


def reason_to_skip(text) -> str | None:
    """Why a value of the text column is no document: `missing`, `not text`, `empty`; None where it is one."""
    if text is None:
        return "missing"
    if not isinstance(text, str):
        return "not text"
    return None if text.strip() else "empty"


def good_documents(documents: datasets.Dataset, config: DataConfig) -> tuple[datasets.Dataset, dict[str, int]]:
    """The documents that hold text, and how many were skipped for each reason. ConfigError where none does."""
    skipped: Counter[str] = Counter()
    good = []
    index = 0
    for batch in documents.select_columns(["text"]).iter(batch_size=1000):
        for text in batch["text"]:
            if reason := reason_to_skip(text):
                skipped[reason] += 1
            else:
                good.append(index)
            index += 1
    if not good:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "there are no documents"
        raise ConfigError(f"data.column={config.column}: no document holds text ({reasons})")
    return documents if not skipped else documents.select(good), dict(sorted(skipped.items()))
