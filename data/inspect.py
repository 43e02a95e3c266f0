"""What is in a data folder, and whether all of it is intact: `python -m data.inspect data=NAME [overrides] [out=PLOT]`.

Prints statistics, frequent tokens and samples, and plots the lengths of documents (default: lengths.png in data.dir).
Exits with 0 where all is intact, 1 where something is broken (each problem on a line), 2 where it is not prepared.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.app import app
from configs.load import load_extended
from configs.schema import Config, ConfigError
from data.prepare import ensure_prepared, not_prepared
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest, verify
from data.tokenizers import Tokenizer, load_tokenizer

SAMPLES, SAMPLE_TOKENS = 3, 100
FREQUENT = 20
CHUNK = 10_000_000  # tokens counted at a time
PERCENTILES = (0, 10, 50, 90, 99, 100)


def inspect(dir: str | Path, console: Console, seq_len: int | None = None, out: str | Path | None = None) -> list[str]:
    """Print the statistics of a data folder; the list of problems found. ConfigError where it is not prepared.

    `seq_len` is what document lengths are compared with, `out` the file of their plot.
    """
    dir = Path(dir)
    if not (dir / MANIFEST_FILE).is_file():
        read_manifest(dir)
    tokenizer, problems = None, []
    try:
        manifest = read_manifest(dir)
        tokenizer = load_tokenizer(manifest.tokenizer_config(), dir)
        problems = problems_with_tokenizer(dir, manifest, tokenizer)
    except ConfigError as error:
        problems = error.errors
    end_of_text = tokenizer.end_of_text if tokenizer else None
    problems = list(dict.fromkeys([*verify(dir, end_of_text), *problems]))
    if not problems:
        shards = {split: TokenShards(dir, split) for split in SPLITS}
        counts = {split: count_tokens(shards[split], tokenizer.vocab_size) for split in SPLITS}
        lengths = {split: np.concatenate(list(document_lengths(shards[split]))) for split in SPLITS}
        console.print(statistics(manifest, counts))
        console.print(length_table(lengths, seq_len))
        console.print(frequent_tokens(counts["train"], tokenizer))
        show_samples(shards["train"], tokenizer, console)
        plot = plot_lengths(lengths, manifest.name, seq_len, Path(out) if out else dir / "lengths.png")
        console.print(f"Document lengths are plotted in {plot}", markup=False)
    for problem in problems:
        console.print(problem, markup=False)
    say = f"{len(problems)} problem(s)" if problems else "all shards match their checksums"
    console.print(f"{dir}: {say}", markup=False)
    return problems


def problems_with_tokenizer(dir: Path, manifest: Manifest, tokenizer: Tokenizer) -> list[str]:
    if tokenizer.fingerprint == manifest.tokenizer["fingerprint"]:
        return []
    return [
        f"{dir}: the tokenizer is not the one that made the shards (fingerprint {tokenizer.fingerprint}, "
        f"the manifest says {manifest.tokenizer['fingerprint']})"
    ]


def count_tokens(shards: TokenShards, vocab_size: int) -> np.ndarray:
    """How often each token occurs [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for array in shards.arrays:
        for start in range(0, len(array), CHUNK):
            counts += np.bincount(array[start : start + CHUNK], minlength=vocab_size)
    return counts


def document_lengths(shards: TokenShards) -> Iterator[np.ndarray]:
    """The lengths in tokens of the documents, end-of-text included, shard by shard; they may go on in the next one."""
    before = 0  # tokens since the last document's start
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
        "tokens per byte": lambda split: f"{1 / manifest.bytes_per_token(split):.3f}",
        "vocabulary used": lambda split: f"{np.count_nonzero(counts[split]):,} of {len(counts[split]):,}",
        "unigram entropy": lambda split: f"{manifest.unigram_entropy:.4f} nats" if split == "train" else "",
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, SPLITS))
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped, {reason}", f"{count:,}", "")
    return table


def length_table(lengths: dict[str, np.ndarray], seq_len: int | None) -> Table:
    table = Table("", *SPLITS, title="Document lengths in tokens")
    for percentile in PERCENTILES:
        name = {0: "shortest", 50: "median", 100: "longest"}.get(percentile, f"{percentile}th percentile")
        table.add_row(name, *(f"{np.percentile(lengths[split], percentile):,.0f}" for split in SPLITS))
    table.add_row("mean", *(f"{lengths[split].mean():,.1f}" for split in SPLITS))
    if seq_len:
        fits = {split: lengths[split] <= seq_len for split in SPLITS}
        table.add_row(f"documents that fit into seq_len={seq_len}", *(f"{fits[s].mean():.1%}" for s in SPLITS))
        inside = (f"{lengths[s][fits[s]].sum() / lengths[s].sum():.1%}" for s in SPLITS)
        table.add_row("tokens in such documents", *inside)
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


def plot_lengths(lengths: dict[str, np.ndarray], title: str, seq_len: int | None, path: Path) -> Path:
    """Draw how documents and their tokens spread over lengths. ConfigError where the file cannot be written."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    top = max(int(each.max()) for each in lengths.values())
    bins = np.geomspace(1, top + 1, 50)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for split in SPLITS:
        every = lengths[split]
        axes.hist(
            every, bins, weights=np.full(len(every), 1 / len(every)), histtype="step", label=f"{split}, documents"
        )
    every = lengths["train"]
    axes.hist(every, bins, weights=every / every.sum(), histtype="stepfilled", alpha=0.3, label="train, tokens")
    if seq_len:
        axes.axvline(seq_len, color="grey", linestyle="--", linewidth=1, label=f"seq_len {seq_len}")
    axes.set(xscale="log", xlabel="length of a document (tokens)", ylabel="share", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path.with_suffix(".partial.png"), dpi=150)
        os.replace(path.with_suffix(".partial.png"), path)
    except OSError as error:
        raise ConfigError(f"out={path}: cannot be written ({error.strerror}); choose another file with out=") from error
    finally:
        plt.close(figure)
    return path


@dataclass
class InspectConfig(Config):
    out: str | None = None  # the plot's file


def main(config: InspectConfig) -> int:
    if config.data.source == "shards":  # a look is a use
        ensure_prepared(config)
    if not (Path(config.data.dir) / MANIFEST_FILE).is_file():
        raise not_prepared(config)
    return 1 if inspect(config.data.dir, Console(soft_wrap=True), config.trainer.seq_len, config.out) else 0


if __name__ == "__main__":
    app(main, load=partial(load_extended, cls=InspectConfig))
