"""What is in a data folder, and whether all of it is intact: `python -m data.inspect data=NAME [overrides] [out=PLOT]`.

Prints statistics and samples, and plots the lengths of documents (default: lengths.png in data.dir).
Exits with 0 if all is intact, 1 if something is broken (a line for each problem), 2 if the data is not prepared.
"""

import glob
import io
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from configs.app import app
from configs.errors import ConfigError, writing
from configs.kinds import OptionalPath
from data.config import DataCommand, DataConfig, TokenizerConfig
from data.files import write_atomic
from data.prepare import ensure_prepared
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest, verify
from data.sources.base import source_of
from data.tokenizers import Tokenizer, load_tokenizer

SAMPLES, SAMPLE_TOKENS = 3, 100


class InspectConfig(DataCommand):
    out: OptionalPath = None  # the file of the plot


def inspect(dir: str | Path, console: Console, out: str | Path | None = None) -> list[str]:
    """Return the problems of a data folder; if it has none, print statistics and plot lengths of documents in `out`."""
    dir = Path(dir)
    problems = verify(dir)
    for problem in problems:
        console.print(problem, markup=False)
    if problems:
        console.print(f"{dir}: {len(problems)} problem(s)", markup=False)
        return problems
    manifest, plot = read_manifest(dir), Path(out or dir / "lengths.png")
    shards = {split: TokenShards(dir, split) for split in SPLITS}
    lengths = {split: document_lengths(each) for split, each in shards.items()}
    console.print(statistics(manifest, lengths))
    show_samples(shards["train"], load_tokenizer(manifest.tokenizer_config(), dir), console)
    plot_lengths(lengths, manifest.name, plot)
    console.print(f"Document lengths are plotted in {plot}\n{dir}: all shards match their checksums", markup=False)
    return []


def document_lengths(shards: TokenShards) -> np.ndarray:
    """Return the length of each document in tokens, end-of-text included."""
    ends = np.cumsum([len(array) for array in shards.arrays])
    starts = [index + end - len(a) for index, end, a in zip(shards.documents(), ends, shards.arrays, strict=True)]
    return np.diff(np.concatenate([*starts, ends[-1:]]))


def statistics(manifest: Manifest, lengths: dict[str, np.ndarray]) -> Table:
    table = Table("", *SPLITS, title=f"{manifest.name}, tokenizer {manifest.tokenizer['name']}")
    rows = {
        "shards": lambda split: f"{len(manifest.splits[split].shards):,} of {manifest.token_dtype}",
        "documents": lambda split: f"{manifest.splits[split].documents:,}",
        "tokens": lambda split: f"{manifest.splits[split].tokens:,}",
        "bytes of text": lambda split: f"{manifest.splits[split].bytes:,}",
        "bytes per token": lambda split: f"{manifest.splits[split].bytes_per_token:.3f}",
        "tokens of the median document": lambda split: f"{np.median(lengths[split]):,.0f}",
        "of the longest document": lambda split: f"{lengths[split].max():,}",
        "of a document on average": lambda split: f"{lengths[split].mean():,.1f}",
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, SPLITS))
    table.add_row("unigram entropy", f"{manifest.unigram_entropy:.4f} nats")
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped, {reason}", f"{count:,}")
    return table


def show_samples(shards: TokenShards, tokenizer: Tokenizer, console: Console) -> None:
    """Print how a few documents begin, spread over the shards."""
    indexes = shards.documents()
    for number in range(SAMPLES):
        which = number * len(indexes) // SAMPLES
        starts, tokens = indexes[which], shards.arrays[which]
        start = int(starts[number * len(starts) // SAMPLES]) if len(starts) else 0
        shown = tokens[start : start + SAMPLE_TOKENS]
        ends = np.flatnonzero(shown[1:] == tokenizer.end_of_text) + 1
        console.rule(f"{shards.split} shard {which}, token {start:,}", align="left")
        text = tokenizer.decode(shown[: ends[0]] if len(ends) else shown)
        console.print(text.strip(), markup=False, highlight=False)
    console.rule()


def plot_lengths(lengths: dict[str, np.ndarray], title: str, path: Path) -> None:
    """Draw how documents spread over lengths. ConfigError if the file cannot be written."""
    bins = np.geomspace(1, max(int(each.max()) for each in lengths.values()) + 1, 50)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, each in lengths.items():
        axes.hist(each, bins, weights=np.full(len(each), 1 / len(each)), histtype="step", label=split)
    axes.set(xscale="log", xlabel="length of a document (tokens)", ylabel="share of documents", title=title)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    with writing("out", path, "; choose another file with out="):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.getvalue())


def find_folder(data: DataConfig, tokenizer: TokenizerConfig) -> Path:
    """Return the folder to inspect: data.dir or, if no documents are named, the only one that was prepared of such.

    ConfigError if nothing is prepared, or several are.
    """
    dir = Path(data.dir)
    if (dir / MANIFEST_FILE).is_file():
        return dir
    is_open = source_of(data).is_any and not (data.files or data.path or data.mixture)
    name, _, digest = dir.name.rpartition("-")
    others = sorted(path.parent for path in dir.parent.glob(f"{glob.escape(name)}-{'?' * len(digest)}/{MANIFEST_FILE}"))
    if is_open and len(others) > 1:
        names = " or ".join(map(str, others))
        raise ConfigError(f"data={data.name}: several are prepared; choose one with data.dir={names}")
    if is_open and others:
        return others[0]
    ensure_prepared(data, tokenizer)  # inspecting is a first use
    return dir


def main(config: InspectConfig) -> int:
    folder = find_folder(config.data, config.tokenizer)
    return 1 if inspect(folder, Console(soft_wrap=True), config.out) else 0


if __name__ == "__main__":
    app(main, InspectConfig)
