"""From the tree that Hydra composes, or a stored one, to typed configuration, with all mistakes reported together.

A configuration class stands next to the code that reads it; a default stands there and nowhere else.
"""

import inspect
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, TypeVar

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError, model_serializer, model_validator

from configs.errors import ConfigError, Mistakes, did_you_mean

REMEDIES = {  # by pydantic's type of an error, or by the type's first word
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "finite_number": "a finite number",
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "string_pattern_mismatch": "a plain folder name (use run.dir for a path)",
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
T = TypeVar("T", bound="Block")


class Block(BaseModel):
    """A group of configuration keys. Unknown keys, wrong types and numbers that are not finite are mistakes."""

    model_config = ConfigDict(extra="forbid", coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=())

    def replace(self: T, **changes: Any) -> T:
        """Return a copy with `changes`, which are not validated again."""
        return self.model_copy(update=changes)


class Choice(Block):
    """A block whose `_target_` names the class, derived from the expected one, that validates the other keys."""

    @model_validator(mode="wrap")
    @classmethod
    def _choose(cls, value: Any, handler):
        if not isinstance(value, Mapping) or "_target_" not in value:
            if inspect.isabstract(cls) and not isinstance(value, cls):
                raise Mistakes(f"_target_ is not set: it names a class derived from {cls.__name__}")
            return handler(value)
        rest = {key: item for key, item in value.items() if key != "_target_"}
        return target_of(value, cls).model_validate(rest)

    @model_serializer(mode="wrap")
    def _name(self, handler) -> dict[str, Any]:
        return {"_target_": f"{type(self).__module__}.{type(self).__qualname__}"} | handler(self)


class Command(Block):
    """The whole configuration of a command, composed from `configs/<yaml>.yaml`."""

    yaml: ClassVar[str] = "train"


def target_of(node: Mapping, expected: type[T]) -> type[T]:
    """Return the class that `node["_target_"]` names, or `expected` without one. Mistakes if it cannot be that."""
    name = node.get("_target_")
    if name is None:
        return expected
    try:
        found = get_object(name)
    except Exception as error:  # whatever importing a stranger's module raises
        raise Mistakes(f"_target_={name}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise Mistakes(f"_target_={name}: must be a class derived from {expected.__name__}")
    return found


def to_dict(block: Block) -> dict[str, Any]:
    """Return a configuration as plain values, from which `load` makes it again."""
    return block.model_dump(serialize_as_any=True)


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
    return [(key, f"{key}={shown(error['input'])}: {remedy(error)}")]


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
