"""Words that leave for bash or for a script's `#SBATCH` lines: quoted here and nowhere else."""

import shlex
from collections.abc import Iterable

from configs.errors import ConfigError
from configs.kinds import has_controls


def quote(word: str) -> str:
    """Return a word that bash reads as it stands, always on one line. It must be UTF-8."""
    if not has_controls(word):
        return shlex.quote(word)
    escaped = (f"\\x{ord(c):02x}" if ord(c) < 128 and not c.isalnum() else c for c in word)
    return f"$'{''.join(escaped)}'"


def join(words: Iterable[str]) -> str:
    return " ".join(map(quote, words))


def directive(option: str) -> str:
    """Return the line of a script by which sbatch gets an option. ConfigError for what no such line can hold.

    sbatch has rules of its own for these lines, which are not those of bash.
    """
    if has_controls(option):
        raise ConfigError(f"{option!r}: has a line break or another control character; Slurm takes options without")
    escaped = option.replace("\\", "\\\\").replace('"', '\\"')
    return f'#SBATCH "{escaped}"' if set(option) & set(" \"'\\#") else f"#SBATCH {option}"
