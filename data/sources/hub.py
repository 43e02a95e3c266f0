"""Data sets of the Hugging Face hub, or folders laid out like one, read while they are downloaded."""

from collections.abc import Iterator

from configs.errors import ConfigError
from data.sources.base import Source, Stream


class Hub(Source):
    """The data set `data.path`; its documents are what `data.revision` says, so the fingerprint reads nothing."""

    divisible = True
    is_watched = True
    is_any = True

    def mistakes(self) -> Iterator[str]:
        if not self.config.path:
            yield "path is not set: give the name of a data set on the Hugging Face hub"

    def open(self) -> Stream:
        import datasets  # takes half a second

        config, column = self.config, self.config.column
        wrong = f"data.path={config.path}: cannot be read as a Hugging Face data set"
        options = {"name": config.subset, "split": config.split, "revision": config.revision}
        try:
            stream = datasets.load_dataset(config.path, streaming=config.streaming, **options)
            first = next(iter(stream), {})
        except Exception as error:  # whatever a wrong name, no network or a broken file makes the library raise
            reason = str(error.__cause__ or error).strip().split("\n")[0] or type(error).__name__
            raise ConfigError(f"{wrong}: {reason}") from error
        if not first:
            raise ConfigError(f"{wrong}: it is empty")
        if column not in first:
            raise ConfigError(f"data.column={column}: no such column in the documents; there are {', '.join(first)}")
        stream = (stream if config.streaming else stream.to_iterable_dataset()).select_columns([column])
        return stream if column == "text" else stream.rename_columns({column: "text"})

    def facts(self) -> list:
        return [self.config.path, self.config.subset, self.config.split, self.config.revision]
