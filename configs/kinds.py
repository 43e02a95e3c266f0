"""Kinds of values that keys of several blocks have, with the limits beyond which nobody can mean them."""

import re
import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

LONGEST_TEXT = 2**24  # tokens in a row
MOST_STEPS = 10**9
MOST_SEQUENCES = 10**5  # that a device sees at a time
WIDEST = 2**17  # features
# Bytes. A system takes 255 and 4095, some files are written under a longer name first, and a run's name has two others.
LONGEST_PART, LONGEST_PATH, LONGEST_NAME = 200, 4000, 80
NAME = re.compile(r"[^./\\\x00-\x1f\x7f-\x9f][^/\\\x00-\x1f\x7f-\x9f]*")


def has_controls(text: str) -> bool:
    """Return whether a text has line breaks or other control characters, or bytes that are not UTF-8."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def usable_path(text: str | None) -> str | None:
    """Return a path that a system can take. ValueError for others."""
    if text is None:
        return None
    if not text.strip() or "\0" in text:
        raise ValueError("must be a path, not empty")
    if too_long(text, LONGEST_PATH) or any(too_long(part, LONGEST_PART) for part in Path(text).parts):
        raise ValueError(f"must be shorter: at most {LONGEST_PATH} bytes, and {LONGEST_PART} between two slashes")
    return text


def own_folder(text: str | None) -> str | None:
    """Return the path of a folder that has a name, so that other files can stand next to it. ValueError for others."""
    if usable_path(text) is not None and Path(text).name in ("", ".."):
        raise ValueError("must be a folder of its own, with a name; not the current one, one above it or the root")
    return text


def plain_name(text: str, most: int = LONGEST_NAME) -> str:
    """Return a name of at most `most` bytes that a folder can have. ValueError for others."""
    if not NAME.fullmatch(text) or too_long(text, most):
        raise ValueError(f"must be a plain folder name of at most {most} bytes, without slashes or a dot in front")
    return text


def too_long(text: str, most: int) -> bool:
    return len(text.encode(errors="surrogatepass")) > most


# Unions stand inside: by a field's annotation, `configs.app.kind_of` tells what is text.
PathText = Annotated[str, AfterValidator(usable_path)]
OptionalPath = Annotated[str | None, AfterValidator(usable_path)]
OptionalFolder = Annotated[str | None, AfterValidator(own_folder)]
Name = Annotated[str, AfterValidator(plain_name)]
