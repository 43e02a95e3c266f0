"""Local files: parquet, JSON lines, or text with one document a file; all but parquet may be packed."""

import codecs
import glob
import io
import itertools
import json
import lzma
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet

from configs.errors import ConfigError, each
from data.documents import NotText
from data.sources.base import Source, Stream

READERS = {".parquet": "parquet", ".jsonl": "json lines", ".json": "json lines", ".txt": "text", ".md": "text"}
PACKED = (".gz", ".xz", ".bz2", ".zst")  # unpacked while reading
ROWS = 1000  # of parquet, read at a time
OTHER_COLUMNS = 100_000_000  # bytes of a line of JSON
CHUNK = 2**20  # bytes read at a time
PEEK = 100  # lines in which the column is looked for


class Files(Source):
    """The files that the patterns in `data.files` match, sorted."""

    divisible = True
    is_watched = True
    is_any = True

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
            check_parquet(files, config.column, wrong)
            return generated(parquet_rows, files=files, column=config.column)
        if kind == "text":
            given = {"files": files, "limit": config.max_document_bytes}
            if config.separator:
                return generated(separated_texts, separator=config.separator.encode(), **given)
            return generated(whole_texts, **given)
        # Of a line: escapes may take six bytes for one of the text, and there may be other columns.
        limit = 6 * config.max_document_bytes + OTHER_COLUMNS
        lines = generated(json_lines, files=files, column=config.column, limit=limit)
        check_column(lines, config.column, wrong, files[0])
        return lines

    def facts(self) -> list:
        stats = [(file, Path(file).stat()) for file in self.files()]
        return [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]


def generated(documents: Callable[..., Iterator[dict]], **arguments) -> Stream:
    import datasets  # takes half a second

    return datasets.IterableDataset.from_generator(documents, gen_kwargs=arguments)


def matches(pattern: str) -> list[str]:
    if Path(pattern).is_file():  # whatever characters are in its name
        return [pattern]
    paths = glob.iglob(pattern)
    if "**" in pattern:  # pathlib follows no links to folders there, which may lead back
        root = Path(pattern).anchor
        paths = map(str, Path(root).glob(str(Path(pattern).relative_to(root))))
    if found := [path for path in paths if Path(path).is_file()]:
        return found
    if Path(pattern).is_dir():
        raise ConfigError(f"data.files: {pattern!r} is a folder: give a pattern, such as {pattern.rstrip('/')}/*.txt")
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
            beginning = content.readline(1_000_000).removeprefix(codecs.BOM_UTF8)
        if beginning.lstrip().startswith(b"["):
            raise ConfigError(f"{wrong}: {file} is one JSON array; write one object a line: jq -c '.[]' {file}")
        line = parsed(beginning)
        if isinstance(line, dict) and column not in line:
            raise ConfigError(f"data.column={column}: no such column in data.files; columns there: {', '.join(line)}")


def check_parquet(files: list[str], column: str, wrong: str) -> None:
    """Raise ConfigError if a file is not parquet, or none has the column, or none has a row."""
    opened = (open_parquet(file, wrong) for file in files)
    found = [(file.metadata.num_rows, file.schema_arrow.names) for file in opened]
    if not any(rows for rows, _ in found):
        raise ConfigError(f"{wrong}: it is empty")
    if not any(column in names for _, names in found):
        names = ", ".join(found[0][1])
        raise ConfigError(f"data.column={column}: no such column in the documents; columns there: {names}")


def open_parquet(file: str, wrong: str) -> pyarrow.parquet.ParquetFile:
    try:
        return pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{wrong}: {file}: {str(error).splitlines()[0]}") from error


def parquet_rows(files: list[str], column: str) -> Iterator[dict]:
    """Yield one document a row. Only the column is read, so files may differ in the others, and in its type."""
    for name in files:
        file = open_parquet(name, "data.files")
        columns = [column] if column in file.schema_arrow.names else []
        for batch in file.iter_batches(ROWS, columns=columns):
            values = batch.column(0).to_pylist() if columns else [NotText("missing")] * batch.num_rows
            yield from ({"text": value} for value in values)


@contextmanager
def unpacked(file: str) -> Iterator[io.BufferedReader]:
    """Open a file that may be packed. ConfigError if its content is broken or breaks off."""
    try:  # pyarrow recognises .gz, .bz2 and .zst by the name, and reads several parts in one file
        plain = lzma.open(file) if file.endswith(".xz") else pyarrow.input_stream(file)
        with io.BufferedReader(plain, 1_000_000) as content:
            yield content
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise ConfigError(f"{file}: cannot be read ({error}); copy it again, or leave it out") from error


def whole_texts(files: list[str], limit: int) -> Iterator[dict]:
    """Yield one document a file, of at most `limit` bytes.

    Bytes that are not UTF-8 become lone surrogates, by which they are found later.
    """
    for file in files:
        with unpacked(file) as stream:
            content = stream.read(limit + 4).removeprefix(codecs.BOM_UTF8)  # a packed file may hold gigabytes
        is_long = len(content) > limit
        yield {"text": NotText("too long") if is_long else content.decode("utf-8", "surrogateescape")}


def separated_texts(files: list[str], separator: bytes, limit: int) -> Iterator[dict]:
    """Yield the documents between which a separator stands, of at most `limit` bytes; blank ones are none."""
    for file in files:
        with unpacked(file) as stream:
            left, is_long, content = b"", False, stream.read(CHUNK + 3).removeprefix(codecs.BOM_UTF8)
            while content:
                *whole, left = (left + content).split(separator)
                for part in whole:
                    yield from document_of(part, limit, is_long)
                    is_long = False
                is_long = is_long or len(left) > limit
                left = left[-len(separator) :] if is_long else left  # of what is too long nothing is kept
                content = stream.read(CHUNK)
            yield from document_of(left, limit, is_long)


def document_of(content: bytes, limit: int, is_long: bool) -> Iterator[dict]:
    """Yield the document that `content` is, if it is one; `is_long`: it is the end of a longer one."""
    if is_long or len(content) > limit:
        yield {"text": NotText("too long")}
    elif text := content.decode("utf-8", "surrogateescape").strip():
        yield {"text": text}


def json_lines(files: list[str], column: str, limit: int) -> Iterator[dict]:
    """Yield one document a line, of at most `limit` bytes. A broken line yields NotText, and the rest is still read."""
    for name in files:
        with unpacked(name) as file:
            line = file.readline(limit).removeprefix(codecs.BOM_UTF8)  # which some programs begin a file with
            while line:
                if len(line) == limit and not line.endswith(b"\n"):
                    while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                        pass
                    yield {"text": NotText("too long")}
                elif line.strip():
                    row = parsed(line)
                    yield {"text": row.get(column) if isinstance(row, dict) else row}
                line = file.readline(limit)


def parsed(line: bytes) -> dict | NotText:
    """Return the object on a line, or why there is none."""
    try:
        row = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        return NotText("not JSON")
    return row if isinstance(row, dict) else NotText("not text")
