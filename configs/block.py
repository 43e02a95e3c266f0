"""What every configuration class is: checked blocks of keys, and choices whose `_target_` names their class.

The network's own classes need no more than this of a configuration, so that they run without Hydra.
"""

import importlib
import inspect
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator, model_serializer, model_validator

from configs.errors import Mistakes

T = TypeVar("T", bound="Block")


def types_of(annotation: Any) -> set[Any]:
    """Return the types that an annotation allows, without what `Annotated` adds to them."""
    if get_origin(annotation) is Annotated:
        return types_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(types_of, get_args(annotation)))
    return {annotation}


class Block(BaseModel):
    """A group of configuration keys. Unknown keys, wrong types and numbers that are not finite are mistakes."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @field_validator("*", mode="before")
    @classmethod
    def _no_flag_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and types_of(cls.model_fields[info.field_name].annotation) <= {int, float, NoneType}:
            raise ValueError("must be a number")
        return value

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


def target_of(node: Mapping, expected: type[T]) -> type[T]:
    """Return the class that `node["_target_"]` names, or `expected` without one. Mistakes if it cannot be that."""
    name = node.get("_target_")
    if name is None:
        return expected
    try:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever importing a stranger's module raises
        raise Mistakes(f"_target_={name}: cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, expected)):
        raise Mistakes(f"_target_={name}: must be a class derived from {expected.__name__}")
    return found


def to_dict(block: Block) -> dict[str, Any]:
    """Return a configuration as plain values, from which `load` makes it again."""
    return block.model_dump(serialize_as_any=True)
