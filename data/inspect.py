"""What is in a data folder, and whether all of it is intact: `python -m data.inspect data=NAME [overrides]`.

Exits with 0 where it is, 1 where something is broken (each problem on a line), 2 where it is not prepared.
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from configs.app import app
from configs.schema import Config, ConfigError
from data.shards import MANIFEST_FILE, SPLITS, Manifest, TokenShards, read_manifest, verify
from data.tokenizers import load_tokenizer

SNIPPET_TOKENS = 120
CHUNK = 10_000_000  # tokens counted at a time


def inspect(dir: str | Path, console: Console) -> list[str]:
    """Print the statistics of a data folder; the list of problems found. ConfigError where it is not prepared."""
    dir = Path(dir)
    if not (dir / MANIFEST_FILE).is_file():
        read_manifest(dir)
    problems = verify(dir)
    if not problems:
        manifest = read_manifest(dir)
        shards = {split: TokenShards(dir, split) for split in SPLITS}
        console.print(statistics(manifest, shards))
        problems = show_text(dir, manifest, shards["train"], console)
    for problem in problems:
        console.print(problem, markup=False)
    say = f"{len(problems)} problem(s)" if problems else "all shards match their checksums"
    console.print(f"{dir}: {say}", markup=False)
    return problems


def statistics(manifest: Manifest, shards: dict[str, TokenShards]) -> Table:
    table = Table("", *SPLITS, title=f"{manifest.name}, tokenizer {manifest.tokenizer['name']}")
    rows = {
        "shards": lambda split: f"{len(manifest.splits[split].shards):,}",
        "documents": lambda split: f"{manifest.documents(split):,}",
        "tokens": lambda split: f"{manifest.tokens(split):,}",
        "bytes of text": lambda split: f"{manifest.splits[split].bytes:,}",
        "bytes per token": lambda split: f"{manifest.bytes_per_token(split):.3f}",
        "vocabulary used": lambda split: f"{vocabulary_used(shards[split]):,} of {manifest.tokenizer['vocab_size']:,}",
        "unigram entropy": lambda split: f"{manifest.unigram_entropy:.4f} nats" if split == "train" else "",
    }
    for name, value in rows.items():
        table.add_row(name, *map(value, SPLITS))
    for reason, count in manifest.skipped.items():
        table.add_row(f"skipped, {reason}", f"{count:,}", "")
    return table


def vocabulary_used(shards: TokenShards) -> int:
    seen = np.zeros(2**16, dtype=bool)
    for array in shards.arrays:
        for start in range(0, len(array), CHUNK):
            seen[array[start : start + CHUNK]] = True
    return int(seen.sum())


def show_text(dir: Path, manifest: Manifest, shards: TokenShards, console: Console) -> list[str]:
    """Print how the train split begins; the problems found with the tokenizer."""
    try:
        tokenizer = load_tokenizer(manifest.tokenizer_config(), dir)
    except ConfigError as error:
        return error.errors
    if tokenizer.fingerprint != manifest.tokenizer["fingerprint"]:
        return [
            f"{dir}: the tokenizer is not the one that made the shards (fingerprint {tokenizer.fingerprint}, "
            f"the manifest says {manifest.tokenizer['fingerprint']})"
        ]
    console.print("The train split begins:")
    console.print(tokenizer.decode(shards.arrays[0][:SNIPPET_TOKENS].tolist()), markup=False, highlight=False)
    return []


def main(config: Config) -> int:
    return 1 if inspect(config.data.dir, Console(soft_wrap=True)) else 0


if __name__ == "__main__":
    app(main)
