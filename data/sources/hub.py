"""Data sets of the Hugging Face hub, or folders laid out like one, read while they are downloaded."""

from collections.abc import Iterator

import datasets

from configs.errors import ConfigError
from data.sources.base import Source, Stream


class Hub(Source):
    """The data set `data.path`; its documents are what `data.revision` says, so the fingerprint reads nothing."""

    divisible = True

    def mistakes(self) -> Iterator[str]:
        if not self.config.path:
            yield "path is not set: give the name of a data set on the Hugging Face hub"

    def open(self) -> Stream:
        config = self.config
        wrong = f"data.path={config.path}: cannot be read as a Hugging Face data set"
        options = {"name": config.subset, "split": config.split, "revision": config.revision}
        stream = load_dataset(config.path, wrong, streaming=config.streaming, **options)
        return column_of(stream if config.streaming else stream.to_iterable_dataset(), config.column, wrong)

    def facts(self) -> list:
        return [self.config.path, self.config.subset, self.config.split, self.config.revision]


def load_dataset(path: str, wrong: str, streaming: bool = True, split: str = "train", **options):
    """Return what `datasets.load_dataset` does, after a look at its first row. ConfigError begins with `wrong`."""
    try:
        stream = datasets.load_dataset(path, split=split, streaming=streaming, **options)
        next(iter(stream), None)
        return stream
    except Exception as error:  # whatever a wrong name, no network or a broken file makes the library raise
        reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
        raise ConfigError(f"{wrong}: {reason}") from error


def column_of(stream: datasets.IterableDataset, column: str, wrong: str) -> Stream:
    """Return the stream's `column` alone, renamed to text."""
    names = stream.column_names or list(next(iter(stream), {}))
    if not names:
        raise ConfigError(f"{wrong}: it is empty")
    if column not in names:
        raise ConfigError(f"data.column={column}: no such column in the documents; columns there: {', '.join(names)}")
    stream = stream.select_columns([column])
    return stream if column == "text" else stream.rename_columns({column: "text"})
