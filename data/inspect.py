"""What is in a data folder, and whether all of it is intact: `python -m data.inspect data=NAME [overrides] [out=PLOT]`.

Prints statistics, frequent tokens and samples, and plots the lengths of documents (default: lengths.png in data.dir).
Exits with 0 if all is intact, 1 if something is broken (a line for each problem), 2 if the data is not prepared.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from pydantic import Field
from rich.console import Console
from rich.table import Table

from configs.app import app
from configs.errors import writing
from configs.load import Block
from data.config import DataCommand
from data.files import write_atomic
from data.prepare import ensure_prepared, not_prepared
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest, verify
from data.sources.base import source_of
from data.tokenizers import Tokenizer, load_tokenizer

SAMPLES, SAMPLE_TOKENS = 3, 100
FREQUENT = 20
CHUNK = 10_000_000  # tokens counted at a time
PERCENTILES = {
    0: "shortest", 10: "10th percentile", 50: "median", 90: "90th percentile", 99: "99th percentile", 100: "longest",
}  # fmt: skip


class TrainerKeys(Block, extra="ignore"):
    """What is read here of a run's `trainer`."""

    seq_len: int | None = Field(None, ge=1)  # compared with the lengths of documents, if it is given


class InspectConfig(DataCommand):
    out: str | None = None  # the file of the plot
    trainer: TrainerKeys = Field(default_factory=TrainerKeys)


def inspect(dir: str | Path, console: Console, seq_len: int | None = None, out: str | Path | None = None) -> list[str]:
    """Print the statistics of a data folder, if it is intact, and return the problems found.

    `seq_len` is compared with the lengths of documents, whose plot goes into the file `out`.
    """
    dir = Path(dir)
    problems = verify(dir)
    if not problems:
        show(dir, console, seq_len, Path(out or dir / "lengths.png"))
    for problem in problems:
        console.print(problem, markup=False)
    result = f"{len(problems)} problem(s)" if problems else "all shards match their checksums"
    console.print(f"{dir}: {result}", markup=False)
    return problems


def show(dir: Path, console: Console, seq_len: int | None, plot: Path) -> None:
    """Print the statistics of an intact folder, and draw the plot."""
    manifest = read_manifest(dir)
    tokenizer = load_tokenizer(manifest.tokenizer_config(), dir)
    shards = {split: TokenShards(dir, split) for split in SPLITS}
    counts = {split: count_tokens(shards[split], tokenizer.vocab_size) for split in SPLITS}
    lengths = {split: np.concatenate(list(document_lengths(shards[split]))) for split in SPLITS}
    console.print(statistics(manifest, counts))
    console.print(length_table(lengths, seq_len))
    console.print(frequent_tokens(counts["train"], tokenizer))
    show_samples(shards["train"], tokenizer, console)
    plot_lengths(lengths, manifest.name, seq_len, plot)
    console.print(f"Document lengths are plotted in {plot}", markup=False)


def count_tokens(shards: TokenShards, vocab_size: int) -> np.ndarray:
    """Return how often each token occurs [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for array in shards.arrays:
        for start in range(0, len(array), CHUNK):
            counts += np.bincount(array[start : start + CHUNK], minlength=vocab_size)
    return counts


def document_lengths(shards: TokenShards) -> Iterator[np.ndarray]:
    """Yield the lengths of the documents in tokens, end-of-text included, that end in each shard."""
    before = 0  # tokens since the start of the last document
    for starts, array in zip(shards.documents(), shards.arrays, strict=True):
        edges = np.concatenate(([-before], starts.astype(np.int64)))
        yield np.diff(edges)[0 if before else 1 :]
        before = len(array) - int(edges[-1])
    yield np.array([before] if before else [], dtype=np.int64)


def statistics(manifest: Manifest, counts: dict[str, np.ndarray]) -> Table:
    table = Table("", *SPLITS, title=f"{manifest.name}, tokenizer {manifest.tokenizer['name']}")

    rows = {
        "shards": lambda split: f"{len(manifest.splits[split].shards):,} of {manifest.token_dtype}",
        "documents": lambda split: f"{manifest.documents(split):,}",
        "tokens": lambda split: f"{manifest.tokens(split):,}",
        "bytes of text": lambda split: f"{manifest.splits[split].bytes:,}",
        "bytes per token": lambda split: f"{manifest.bytes_per_token(split):.3f}",
        "vocabulary used": lambda split: f"{np.count_nonzero(counts[split]):,} of {len(counts[split]):,}",
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, SPLITS))
    table.add_row("unigram entropy", f"{manifest.unigram_entropy:.4f} nats")
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped, {reason}", f"{count:,}")
    return table


def length_table(lengths: dict[str, np.ndarray], seq_len: int | None) -> Table:
    table = Table("", *lengths, title="Document lengths in tokens")
    for percentile, name in PERCENTILES.items():
        table.add_row(name, *(f"{np.percentile(each, percentile):,.0f}" for each in lengths.values()))
    table.add_row("mean", *(f"{each.mean():,.1f}" for each in lengths.values()))
    if seq_len:
        fits = [(each, each <= seq_len) for each in lengths.values()]
        table.add_row(f"documents that fit into seq_len={seq_len}", *(f"{fit.mean():.1%}" for _, fit in fits))
        table.add_row("tokens in them", *(f"{each[fit].sum() / each.sum():.1%}" for each, fit in fits))
    return table


def frequent_tokens(counts: np.ndarray, tokenizer: Tokenizer) -> Table:
    table = Table("token", "text", "count", "share", title=f"The {FREQUENT} most frequent tokens of the train split")
    for token in np.argsort(-counts, kind="stable")[:FREQUENT]:
        text = "end of text" if token == tokenizer.end_of_text else ascii(tokenizer.decode([token]))
        table.add_row(str(token), text.replace("[", r"\["), f"{counts[token]:,}", f"{counts[token] / counts.sum():.2%}")
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


def plot_lengths(lengths: dict[str, np.ndarray], title: str, seq_len: int | None, path: Path) -> None:
    """Draw how documents and their tokens spread over lengths. ConfigError if the file cannot be written."""
    bins = np.geomspace(1, max(int(each.max()) for each in lengths.values()) + 1, 50)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for split, each in lengths.items():
        shares = np.full(len(each), 1 / len(each))
        axes.hist(each, bins, weights=shares, histtype="step", label=f"{split}, documents")
    train = lengths["train"]
    axes.hist(train, bins, weights=train / train.sum(), histtype="stepfilled", alpha=0.3, label="train, tokens")
    if seq_len:
        axes.axvline(seq_len, color="grey", linestyle="--", linewidth=1, label=f"seq_len {seq_len}")
    axes.set(xscale="log", xlabel="length of a document (tokens)", ylabel="share", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    with writing("out", path, "; choose another file with out="):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, picture.getvalue())


def main(config: InspectConfig) -> int:
    if source_of(config.data).in_place:  # inspecting is a first use
        ensure_prepared(config.data, config.tokenizer)
    if not (Path(config.data.dir) / MANIFEST_FILE).is_file():
        raise not_prepared(config.data, config.tokenizer)
    return 1 if inspect(config.data.dir, Console(soft_wrap=True), config.trainer.seq_len, config.out) else 0


if __name__ == "__main__":
    app(main, InspectConfig)
