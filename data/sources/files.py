"""Local files: parquet, JSON lines, or text with one document a file; all but parquet may be packed."""

import glob
import io
import itertools
import json
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow

from configs.errors import ConfigError, each
from data.documents import NotText
from data.sources.base import Source, Stream
from data.sources.hub import column_of, load_dataset

READERS = {".parquet": "parquet", ".jsonl": "json lines", ".json": "json lines", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".xz", ".bz2", ".zst")  # unpacked while reading
PEEK = 100  # lines in which the column is looked for


class Files(Source):
    """The files that the patterns in `data.files` match, sorted."""

    divisible = True

    def check(self) -> None:
        self.files()

    def files(self) -> list[str]:
        """Return the paths of the files. ConfigError if a pattern matches none."""
        if not self.config.files:
            raise ConfigError("data.files=[]: must name the files to read, for example data.files='[texts/*.parquet]'")
        return sorted(set(itertools.chain.from_iterable(each(matches, self.config.files))))

    def open(self) -> Stream:
        config, files = self.config, self.files()
        kind = kind_of(files)
        wrong = f"data.files={config.files}: cannot be read as {kind}"
        if kind == "parquet":
            return column_of(load_dataset("parquet", wrong, data_files=files), config.column, wrong)
        if kind == "text":
            return datasets.IterableDataset.from_generator(whole_texts, gen_kwargs={"files": files})
        limit = 2 * config.max_document_bytes + 10_000  # of a line: escapes may double the bytes of the text
        options = {"files": files, "column": config.column, "limit": limit}
        lines = datasets.IterableDataset.from_generator(json_lines, gen_kwargs=options)
        check_column(lines, config.column, wrong, files[0])
        return lines

    def facts(self) -> list:
        stats = [(file, Path(file).stat()) for file in self.files()]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def matches(pattern: str) -> list[str]:
    found = [path for path in glob.glob(pattern, recursive=True) if Path(path).is_file()]
    if found:
        return found
    if Path(pattern).is_dir():
        raise ConfigError(
            f"data.files: {pattern!r} is a folder: give a pattern, for example {pattern.rstrip('/')}/*.txt"
        )
    raise ConfigError(f"data.files: no file matches {pattern!r} in {Path.cwd()}")


def kind_of(files: list[str]) -> str:
    """Return how the files are read, a value of READERS. ConfigError for an unknown extension, or several kinds."""
    found: dict[str, str] = {}  # kind: an example
    for file in files:
        path = Path(file)
        extension = Path(path.stem if path.suffix in PACKED else path).suffix.lower()
        if extension not in READERS:
            raise ConfigError(
                f"data.files: {file} has no known extension: must be one of {', '.join(READERS)} "
                f"(or one of these and {', '.join(PACKED)})"
            )
        found.setdefault(READERS[extension], file)
    if len(found) > 1:
        examples = ", ".join(f"{kind} ({file})" for kind, file in sorted(found.items()))
        raise ConfigError(
            f"data.files: the files are of several kinds, {examples}: prepare one kind at a time, or use data=mixture"
        )
    return next(iter(found))


def check_column(lines: Stream, column: str, wrong: str, file: str) -> None:
    """Raise ConfigError if there are no lines, or none of the first has the column."""
    first = list(itertools.islice(lines, PEEK))
    if not first:
        raise ConfigError(f"{wrong}: it is empty")
    if not any(isinstance(document["text"], str) for document in first):
        with unpacked(file) as content:
            line = parsed(content.readline(1_000_000))
        if isinstance(line, dict) and column not in line:
            raise ConfigError(
                f"data.column={column}: no such column in the files of data.files; columns there: {', '.join(line)}"
            )


@contextmanager
def unpacked(file: str) -> Iterator[io.BufferedReader]:
    """Open a file that may be packed. ConfigError if its content is broken or breaks off."""
    try:  # pyarrow recognises .gz, .bz2 and .zst by the name, and reads several parts in one file
        plain = lzma.open(file) if file.endswith(".xz") else pyarrow.input_stream(file)
        with io.BufferedReader(plain, 1_000_000) as content:
            yield content
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); copy it again, or leave it out") from error


def whole_texts(files: list[str]) -> Iterator[dict]:
    """Yield one document a file; bytes that are not UTF-8 become lone surrogates, by which they are found later."""
    for file in files:
        with unpacked(file) as content:
            yield {"text": content.read().decode("utf-8", "surrogateescape")}


def json_lines(files: list[str], column: str, limit: int) -> Iterator[dict]:
    """Yield one document a line, of at most `limit` bytes. A broken line yields NotText, and the rest is still read."""
    for name in files:
        with unpacked(name) as file:
            while line := file.readline(limit):
                if len(line) == limit and not line.endswith(b"\n"):
                    while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                        pass
                    yield {"text": NotText("too long")}
                elif line.strip():
                    row = parsed(line)
                    yield {"text": row.get(column) if isinstance(row, dict) else row}


def parsed(line: bytes) -> dict | NotText:
    """Return the object on a line, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return NotText("not JSON")
    return row if isinstance(row, dict) else NotText("not text")
