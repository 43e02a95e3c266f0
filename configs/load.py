"""From the tree that Hydra composes, or a stored one, to typed configuration, with all mistakes reported together.

A configuration class stands next to the code that reads it; a default stands there and nowhere else.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from configs.block import Block, target_of, to_dict
from configs.errors import ConfigError, Mistakes, did_you_mean

REMEDIES = {  # by pydantic's type of an error, or by the type's first word
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "finite_number": "a finite number",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string_pattern_mismatch": "a plain file name",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "string": "text",
    "list": "a list, as in [A,B]",
    "dict": "a mapping",
    "model": "a group of keys, as in KEY.SUBKEY=VALUE",
}
RENAMED = {  # what older command lines have: what does the same now
    "core=sdpa": "core=full",
    "core=flash_tpa": "core=full core.kernel=factors",
    "factors": "core.kernel=factors",
}
T = TypeVar("T", bound=Block)


class Command(Block):
    """The whole configuration of a command, composed from `configs/<yaml>.yaml`."""

    yaml: ClassVar[str] = "train"


def flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def load(tree: Mapping | DictConfig, schema: type[T], **context: Any) -> T:
    """Return `tree`, resolved, as a `schema`, whose validators see `context`. ConfigError has all mistakes at once."""
    if isinstance(tree, DictConfig):
        tree = resolved(tree, schema)
    found: list[tuple[str, str]] = []
    while True:  # again without the keys that are wrong, for the mistakes that they hid
        wrong = {key for key, _ in found}
        more = []
        try:
            config = schema.model_validate(without(tree, wrong), context=context)
        except ValidationError as error:
            details = [detail for detail in error.errors() if not (wrong and detail["type"] == "missing")]
            more = [pair for detail in details for pair in explain(detail, tree, schema) if pair[0] not in wrong]
        if not (found or more):
            return config
        if not more:
            raise ConfigError(*(message for _, message in found))
        found += more


def resolved(tree: DictConfig, schema: type[Block]) -> dict[str, Any]:
    """Return the tree as plain values. ConfigError for an interpolation that leads nowhere."""
    try:
        whole = OmegaConf.merge(OmegaConf.create(defaults(tree, schema)), tree)
        return OmegaConf.to_container(whole, resolve=True)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "configuration"
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from None


def defaults(tree: Mapping, schema: type[Block]) -> dict[str, Any]:
    """Return the defaults of the classes that `tree` chooses, which interpolations may name."""
    found: dict[str, Any] = {}
    for key, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Block):
            node = tree.get(key)
            with suppress(Mistakes):  # validation reports them
                if isinstance(node, Mapping | DictConfig):
                    found[key] = defaults(node, target_of(node, field.annotation))
        elif not field.is_required():
            default = field.get_default(call_default_factory=True)
            found[key] = to_dict(default) if isinstance(default, Block) else default
    return found


def without(tree: Mapping, keys: set[str], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings without the entries whose dotted keys are in `keys`."""
    return {
        key: without(value, keys, f"{prefix}{key}.") if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if f"{prefix}{key}" not in keys
    }


def explain(error: dict[str, Any], tree: Mapping, schema: type[Block]) -> list[tuple[str, str]]:
    """Return (key, message) of each mistake in one of pydantic's errors about `tree`."""
    *parents, last = error["loc"] or ("",)
    key = ".".join(map(str, error["loc"]))
    prefix = "".join(f"{part}." for part in parents)
    cause = error.get("ctx", {}).get("error")
    if isinstance(cause, Mistakes):
        dot = f"{key}." if key else ""
        return [(re.match(r"[\w.]*", f"{dot}{line}")[0], f"{dot}{line}") for line in cause.errors]
    if key in RENAMED:
        return [(key, f"{key}: is no key any more; use {RENAMED[key]}")]
    if error["type"] == "extra_forbidden":
        return [(key, f"{key}: unknown key; {did_you_mean(str(last), known_at(parents, tree, schema), prefix)}")]
    if error["type"] == "missing" or error["input"] is None:
        return [(key, f"{key} is not set: give it as {key}=...")]
    value = shown(error["input"])
    return [(key, f"{key}={value if value.isprintable() else repr(value)}: {remedy(error)}")]


def known_at(path: list, tree: Mapping, schema: type[Block]) -> list[str]:
    """Return the keys of the block at `path`, of the class that `tree` chooses for it."""
    for part in path:
        tree = tree[part]
        schema = target_of(tree, schema.model_fields[part].annotation)
    return list(schema.model_fields)


def remedy(error: dict[str, Any]) -> str:
    """Say what a value must be, given pydantic's error about it."""
    kind, limits = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(limits["error"])
    if kind == "greater_than" and limits["gt"] == 0:
        return "must be a positive number"
    text = REMEDIES.get(kind) or REMEDIES.get(kind.partition("_")[0])
    return f"must be {text.format(**limits)}".replace("'", "") if text else error["msg"]


def shown(value: Any) -> str:
    """Return a value as an override would give it."""
    if isinstance(value, list | tuple):
        return f"[{','.join(map(shown, value))}]"
    return {"None": "null", "True": "true", "False": "false"}.get(repr(value), str(value))
