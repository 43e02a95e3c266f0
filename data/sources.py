"""Where documents come from, as streams that can say where they are and go on from there.

A stream is what Hugging Face `datasets` calls an IterableDataset, or has those of its methods that are needed here:
iterating yields documents `{"text": ..., "name": ...}` (names only where there are any), `state_dict()` is where the
iteration stands, and `load_state_dict(state)` makes the next one start there. Nothing has to fit in memory.
"""

import functools
import glob
import hashlib
import io
import itertools
import json
import logging
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Protocol

import datasets
import pyarrow

from configs.errors import ConfigError
from configs.schema_data import DataConfig
from data import builtin
from data.documents import NotText

READERS = {".parquet": "parquet", ".jsonl": "json lines", ".json": "json lines", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".xz", ".bz2", ".zst")  # unpacked on the way
PEEK = 100  # documents looked at for their columns


class Stream(Protocol):
    def __iter__(self) -> Iterator[dict]: ...
    def state_dict(self) -> dict: ...
    def load_state_dict(self, state: dict) -> None: ...


def open_documents(config: DataConfig, progress: bool = False) -> Stream:
    """The documents of `config`, from the first one. ConfigError where there are none, or not the column."""
    if config.source == "mixture":
        return Mixture([(weight, open_documents(part, progress)) for weight, part in config.parts()])
    if config.source == "builtin":
        return datasets.Dataset.from_list(builtin_corpus(config.workers, progress)).to_iterable_dataset()
    return open_hub(config) if config.source == "hub" else open_files(config)


@functools.cache
def builtin_corpus(workers: int | None, progress: bool) -> list[dict[str, str]]:
    """Read once a process: it is asked for its documents and for its fingerprint."""
    return builtin.documents(workers, progress)


def fingerprint(config: DataConfig, progress: bool = False) -> str:
    """Changes when the local files do (names, sizes, times) or the built-in corpus; the hub has `data.revision`."""
    if config.source == "mixture":
        facts = [[weight, fingerprint(part, progress)] for weight, part in config.parts()]
    elif config.source == "files":
        stats = [(file, Path(file).stat()) for file in matching_files(config)]
        facts = [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]
    elif config.source == "builtin":
        facts = [[document["name"], document["text"]] for document in builtin_corpus(config.workers, progress)]
    else:
        facts = [config.path, config.subset, config.split, config.revision]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def matching_files(config: DataConfig) -> list[str]:
    """The files that `data.files` matches, sorted. ConfigError where a pattern matches none."""
    if not config.files:
        raise ConfigError("data.files=[]: must name the files to read, for example data.files='[texts/*.parquet]'")
    files, errors = set(), []
    for pattern in config.files:
        found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
        if not found:
            folder = f"{pattern!r} is a folder: give a pattern, as in {pattern.rstrip('/')}/*.txt"
            missing = f"no file matches {pattern!r} in {Path.cwd()}"
            errors.append(f"data.files: {folder if Path(pattern).is_dir() else missing}")
        files.update(found)
    if errors:
        raise ConfigError(*errors)
    return sorted(files)


def kind_of(files: list[str]) -> str:
    """What reads the files: a value of READERS. ConfigError for an unknown extension, or several."""
    found: dict[str, list[str]] = {}
    for file in files:
        suffixes = Path(file).suffixes
        if suffixes and suffixes[-1] in PACKED:
            suffixes.pop()
        extension = suffixes[-1].lower() if suffixes else ""
        if extension not in READERS:
            raise ConfigError(
                f"data.files: {file} has no known extension: must be one of {', '.join(READERS)} "
                f"(or one of these and {', '.join(PACKED)})"
            )
        found.setdefault(READERS[extension], []).append(file)
    if len(found) > 1:
        examples = ", ".join(f"{name} ({names[0]})" for name, names in sorted(found.items()))
        raise ConfigError(
            f"data.files: the files are of several kinds, {examples}: prepare one kind at a time, or use data=mixture"
        )
    return next(iter(found))


def open_files(config: DataConfig) -> Stream:
    files = matching_files(config)
    kind = kind_of(files)
    if kind == "parquet":
        wrong = f"data.files={config.files}: cannot be read as parquet"
        return column_of(load("parquet", wrong, data_files=files), config.column, wrong)
    if kind == "text":
        return datasets.IterableDataset.from_generator(whole_texts, gen_kwargs={"files": files})
    limit = 2 * config.max_document_bytes + 10_000  # of a line: escapes may take twice the text's bytes, or more
    lines = datasets.IterableDataset.from_generator(
        json_lines, gen_kwargs={"files": files, "column": config.column, "limit": limit}
    )
    return with_column(lines, config.column, f"data.files={config.files}: cannot be read as {kind}", files)


def open_hub(config: DataConfig) -> Stream:
    """A data set of the Hugging Face hub, or a folder laid out like one, read as it is downloaded."""
    wrong = f"data.path={config.path}: cannot be read as a Hugging Face data set"
    options = {"name": config.subset, "split": config.split, "revision": config.revision}
    stream = load(config.path, wrong, streaming=config.streaming, **options)
    return column_of(stream if config.streaming else stream.to_iterable_dataset(), config.column, wrong)


def load(path: str, wrong: str, streaming: bool = True, split: str = "train", **options):
    with quiet() as logged:
        try:
            stream = datasets.load_dataset(path, split=split, streaming=streaming, **options)
            next(iter(stream), None)
            return stream
        except Exception as error:  # whatever a wrong name, no network or a broken file makes the library raise
            reasons = [record.getMessage() for record in logged] or [str(error.__cause__ or error)]
            reason = next(iter(reasons[0].splitlines()), "") or type(error).__name__
            raise ConfigError(f"{wrong}: {reason}") from error


def column_of(stream: datasets.IterableDataset, column: str, wrong: str) -> Stream:
    """The stream's `column` alone, called text."""
    names = stream.column_names or list(next(iter(stream), {}))
    if not names:
        raise ConfigError(f"{wrong}: there is nothing in it")
    if column not in names:
        raise ConfigError(f"data.column={column}: no such column in the documents; columns there: {', '.join(names)}")
    stream = stream.select_columns([column])
    return stream if column == "text" else stream.rename_columns({column: "text"})


def with_column(lines: Stream, column: str, wrong: str, files: list[str]) -> Stream:
    """The stream itself, after a look whether any of the first lines has the column."""
    first = list(itertools.islice(lines, PEEK))
    if not first:
        raise ConfigError(f"{wrong}: there is nothing in it")
    if all(isinstance(document["text"], NotText) for document in first):
        with unpacked(files[0]) as file:
            line = parsed(file.readline(1_000_000))
        if isinstance(line, dict) and column not in line:
            raise ConfigError(
                f"data.column={column}: no such column in the files of data.files; columns there: {', '.join(line)}"
            )
    return lines


@contextmanager
def unpacked(file: str) -> Iterator[io.BufferedReader]:
    """The bytes of a file that may be packed. ConfigError where they end in the middle or are none of that kind."""
    try:  # pyarrow knows .gz, .bz2 and .zst by their names, several parts in one file included
        plain = lzma.open(file) if file.endswith(".xz") else pyarrow.input_stream(file)
        with io.BufferedReader(plain, 1_000_000) as content:
            yield content
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); copy it again, or leave it out") from error


def whole_texts(files: list[str]) -> Iterator[dict]:
    """One document a file; bytes that are no UTF-8 become lone surrogates, by which they are found out."""
    for file in files:
        with unpacked(file) as content:
            yield {"text": content.read().decode("utf-8", "surrogateescape")}


def json_lines(files: list[str], column: str, limit: int) -> Iterator[dict]:
    """One document a line. Broken lines come as what is wrong with them, so that one doesn't stop a billion."""
    for name in files:
        with unpacked(name) as file:
            while line := file.readline(limit):
                if len(line) == limit and not line.endswith(b"\n"):
                    while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                        pass
                    yield {"text": NotText("too long")}
                elif line.strip():
                    row = parsed(line)
                    if isinstance(row, dict):
                        yield {"text": row.get(column, NotText("missing"))}
                    else:
                        yield {"text": row if isinstance(row, NotText) else NotText("not text")}


def parsed(line: bytes):
    try:
        return json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return NotText("not JSON")


class Mixture:
    """Documents of several streams, as many of each as its weight says, in a fixed order.

    Next is always the stream that is furthest behind its share; the mixture ends where that one has no more, so that
    the shares hold to the end.
    """

    def __init__(self, parts: list[tuple[float, Stream]]):
        self.weights = [weight for weight, _ in parts]
        self.streams = [stream for _, stream in parts]
        self.start = {"taken": [0] * len(parts), "streams": [None] * len(parts)}
        self.taken = self.start["taken"]

    def __iter__(self) -> Iterator[dict]:
        self.taken = list(self.start["taken"])
        places = range(len(self.streams))
        iterators = [iter(stream) for stream in self.streams]
        while True:
            which = min(places, key=lambda place: (self.taken[place] + 1) / self.weights[place])
            try:
                document = next(iterators[which])
            except StopIteration:
                return
            self.taken[which] += 1
            yield {"text": document["text"]}

    def state_dict(self) -> dict:
        # A stream nothing was taken of since the start has no state of its own to tell yet.
        states = [
            stream.state_dict() if taken > before else state
            for stream, taken, before, state in zip(
                self.streams, self.taken, self.start["taken"], self.start["streams"], strict=True
            )
        ]
        return {"taken": list(self.taken), "streams": states}

    def load_state_dict(self, state: dict) -> None:
        self.start = state
        for stream, part in zip(self.streams, state["streams"], strict=True):
            if part is not None:
                stream.load_state_dict(part)


@contextmanager
def quiet() -> Iterator[list[logging.LogRecord]]:
    """Keep back the log lines of `datasets`, which name the broken file."""
    logger = logging.getLogger("datasets")
    handlers, logger.handlers = logger.handlers, [BufferingHandler(capacity=1000)]
    try:
        yield logger.handlers[0].buffer
    finally:
        logger.handlers = handlers


def batches(stream: Stream, documents: int, characters: int) -> Iterator[tuple[list[dict], dict]]:
    """(documents, the stream's state after them), a batch ending with so many documents or characters.

    ConfigError where the source stops in the middle: a broken file, or a network that was gone for too long.
    """
    batch, size = [], 0
    remaining = iter(stream)
    while True:
        try:
            document = next(remaining, None)
        except ConfigError:
            raise
        except Exception as error:  # of any of the libraries that read and download
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ConfigError(f"the source cannot be read on ({reason}); the same command goes on from here") from error
        if document is None:
            break
        batch.append(document)
        size += len(document["text"]) if isinstance(document["text"], str) else 0
        if len(batch) >= documents or size >= characters:
            yield batch, stream.state_dict()
            batch, size = [], 0
    if batch:
        yield batch, stream.state_dict()
