"""What bad configuration and bad input raise."""

import errno
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

UNWRITABLE = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EEXIST
}  # fmt: skip


class ConfigError(Exception):
    """One or more mistakes in the configuration or the input; each names the key or file, the value and the remedy."""

    def __init__(self, *errors: str):
        self.errors = list(errors)
        super().__init__("\n".join(self.errors))


def each(check: Callable, items: Iterable) -> list:
    """`check(item)` of every item. ConfigError has the mistakes of all of them, each said once."""
    results, errors = [], []
    for item in items:
        try:
            results.append(check(item))
        except ConfigError as error:
            errors += [line for line in error.errors if line not in errors]
    if errors:
        raise ConfigError(*errors)
    return results


@contextmanager
def writing(key: str, path: str | Path, after: str = "") -> Iterator[None]:
    """What a folder says that cannot be written, or is full, as a ConfigError that names `key` and `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        where = f" {error.filename}" if error.filename else ""
        raise ConfigError(f"{key}={path}: cannot write{where} ({error.strerror}){after}") from error


def at_least(low: int, block: str, config, *keys: str):
    """Mistakes in the keys of a block that must not be less than `low`; null is left to others."""
    for key in keys:
        value = getattr(config, key)
        if value is not None and value < low:
            yield f"{block}{'.' * bool(block)}{key}={value}: must be at least {low}"
