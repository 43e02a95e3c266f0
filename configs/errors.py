"""What bad configuration and bad input raise."""

import difflib
import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNWRITABLE = (  # what a place answers that cannot be written; /proc says that it does not exist
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT, errno.EINVAL,
)  # fmt: skip
SHOWN = 40  # known names in a message


class ConfigError(Exception):
    """One or more mistakes in the configuration or the input; each names the key or file, the value and the remedy."""

    def __init__(self, *errors: str):
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


class Mistakes(ConfigError, ValueError):
    """What a validator that looks at several keys raises: the same, with keys relative to its block."""


def each(check: Callable, items: Iterable) -> list:
    """Return `check(item)` of every item; the ConfigErrors of all of them are raised as one, each line once."""
    results, errors = [], []
    for item in items:
        try:
            results.append(check(item))
        except ConfigError as error:
            errors += error.errors
    if errors:
        raise ConfigError(*dict.fromkeys(errors))
    return results


def did_you_mean(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Suggest the known name nearest to `key`, after `prefix`; list the known names if none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"known: {', '.join(names[:SHOWN])}{more}"


@contextmanager
def writing(key: str, path: str | Path, after: str = "") -> Iterator[None]:
    """Turn the OSError of a folder that is full or cannot be written into a ConfigError that names `key` and `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = f" {error.filename}" if error.filename else ""
        raise ConfigError(f"{key}={path}: cannot write{where} ({error.strerror}){after}") from error
