"""The built-in corpus: the English in the source of the standard library (docstrings, comments, topics of pydoc) and of
the installed torch and numpy (docstrings). Nothing is imported, and the same versions give the same documents."""

import ast
import functools
import importlib.util
import inspect
import itertools
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

from data.parallel import ordered_map, with_rates
from data.sources.base import Source, Stream

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
MIN_PARAGRAPH = 40  # characters that are not blanks
MIN_DOCUMENT = 200  # characters
DOC_CALLS = ("docstr", "newdoc")  # torch's add_docstr(..., "text") and numpy's add_newdoc(..., "text")
NOT_PROSE = re.compile(r"#!|#.*coding[:=]")


class Tree(NamedTuple):
    """A folder of Python source; its documents are named `<name>/<path in the folder>`."""

    name: str
    root: Path
    comments: bool = False  # take full-line comments too


class Builtin(Source):
    """The corpus of this Python; its documents have names."""

    on_first_use = True

    def open(self) -> Stream:
        import datasets  # takes half a second

        return datasets.Dataset.from_list(self.corpus()).to_iterable_dataset()

    def facts(self) -> list:
        return [[document["name"], document["text"]] for document in self.corpus()]

    def corpus(self) -> list[dict[str, str]]:
        return builtin_corpus(self.config.workers, self.progress)


@functools.cache
def builtin_corpus(workers: int | None = None, progress: bool = False) -> list[dict[str, str]]:
    """Return the corpus as [{"name", "text"}], sorted by name, whatever the number of workers; read once a process."""
    trees = [Tree("stdlib", Path(sysconfig.get_path("stdlib")), comments=True)]
    for package in ("torch", "numpy"):
        spec = importlib.util.find_spec(package)
        if spec and spec.submodule_search_locations:
            trees.append(Tree(package, Path(spec.submodule_search_locations[0])))
    return collect(trees, workers, progress)


def collect(trees: list[Tree], workers: int | None = None, progress: bool = False) -> list[dict[str, str]]:
    """Return a document for each module of `trees`: paragraphs in source order, each once in the corpus."""
    files = sorted(
        (f"{tree.name}/{path.relative_to(tree.root).as_posix()}", path, tree.comments)
        for tree in trees
        for path in tree.root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(tree.root).parts)
    )
    found = ordered_map(extract, files, workers)
    modules = with_rates(found, "Reading the built-in corpus", progress, modules=lambda _: 1)
    first: dict[str, tuple[str, str]] = {}  # words: the document that has them first, and the paragraph
    for name, paragraphs in sorted(itertools.chain.from_iterable(modules)):
        for paragraph in paragraphs:
            first.setdefault(" ".join(paragraph.split()), (name, paragraph))
    documents = itertools.groupby(first.values(), key=itemgetter(0))
    texts = {name: "\n\n".join(paragraph for _, paragraph in group) for name, group in documents}
    return [{"name": name, "text": text} for name, text in texts.items() if len(text) >= MIN_DOCUMENT]


def extract(file: tuple[str, Path, bool]) -> list[tuple[str, list[str]]]:
    """Return the documents of a module as (name, paragraphs); none if the file cannot be read or parsed."""
    name, path, comments = file
    try:
        with tokenize.open(path) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            source = stream.read()
            module = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    if name.endswith("pydoc_data/topics.py"):
        topics = ast.literal_eval(module.body[-1].value)  # the module assigns a dictionary
        return [(f"pydoc/topics/{topic}", list(paragraphs_of(text))) for topic, text in topics.items()]
    passages = [*prose_strings(module), *(comment_blocks(source, module) if comments else ())]
    return [(name, [paragraph for _, text in sorted(passages) for paragraph in paragraphs_of(text)])]


def prose_strings(module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of every docstring, and of the strings in calls that attach documentation."""
    for node in ast.walk(module):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node, clean=False):
                yield node.body[0].lineno, text
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", "")
            inside = ast.walk(node) if any(part in called for part in DOC_CALLS) else ()
            strings = (part for part in inside if isinstance(part, ast.Constant) and isinstance(part.value, str))
            yield from ((part.lineno, part.value) for part in strings)


def comment_blocks(source: str, module: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each run of full-line comments; a line inside a string that looks like one is none."""
    in_string = set()
    for node in ast.walk(module):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            in_string.update(range(node.lineno + 1, node.end_lineno + 1))
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        comment = line.strip()
        if comment.startswith("#") and number not in in_string:
            if not NOT_PROSE.match(comment):
                block.append(re.sub(r"^#+ ?", "", comment))
        elif block:
            yield number, "\n".join(block)
            block = []


def paragraphs_of(text: str) -> Iterator[str]:
    """Yield the paragraphs of a docstring that hold words: dedented, with no blanks at the ends of lines."""
    text = text.encode("utf-8", "replace").decode()  # a "\ud800" in a docstring is not a character
    for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        paragraph = "\n".join(line.rstrip() for line in textwrap.dedent(paragraph).strip("\n").split("\n"))
        characters = "".join(paragraph.split())
        if len(characters) >= MIN_PARAGRAPH and 2 * sum(map(str.isalpha, characters)) >= len(characters):
            yield paragraph
