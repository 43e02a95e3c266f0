"""`--help`: every key of a command, with its value, and what the comment next to it in its class says."""

import inspect
import re
from collections.abc import Iterator, Mapping

from omegaconf import DictConfig

from configs.block import Block, target_of
from configs.load import shown

FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (?P<comment>.*))?")
WIDTH = 44  # of `key=value`, if it is not longer


def comments_of(schema: type[Block]) -> dict[str, str]:
    """Return the comments of a class's fields: those behind them, or on the lines above them."""
    found: dict[str, str] = {}
    for cls in reversed([base for base in schema.__mro__ if issubclass(base, Block) and base is not Block]):
        above: list[str] = []
        try:
            lines = inspect.getsource(cls).splitlines()
        except (OSError, TypeError):  # made by a function
            continue
        for line in lines:
            field = FIELD.fullmatch(line)
            if field and field[1] in cls.model_fields:
                found[field[1]] = " ".join([*above, *filter(None, [field["comment"]])])
            above = [*above, line.strip().removeprefix("# ")] if line.startswith("    # ") else []
    return found


def keys_of(tree: Mapping | DictConfig, schema: type[Block], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (`key=value`, comment) of every key of the classes that a composed `tree` chooses."""
    comments = comments_of(schema)
    for key, field in schema.model_fields.items():
        is_block = inspect.isclass(field.annotation) and issubclass(field.annotation, Block)
        node = tree.get(key)
        if is_block:
            node = {} if node is None else node
            yield from keys_of(node, target_of(node, field.annotation), f"{prefix}{key}.")
        else:
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            value = default if node is None else node
            yield (
                f"{prefix}{key}={'...' if field.is_required() and node is None else shown(value)}",
                comments.get(key, ""),
            )


def help_text(usage: str, tree: DictConfig, schema: type[Block], groups: Mapping[str, list[str]]) -> str:
    """Return what `--help` prints; `groups` has the choices of each group."""
    chosen = [f"  {group}={'|'.join(names)}" for group, names in groups.items()]
    keys = [f"  {pair:<{WIDTH}}{'  ' + comment if comment else ''}" for pair, comment in keys_of(tree, schema)]
    footer = "--cfg job prints the configuration that would run; -m runs every combination of comma-separated values."
    groups = ["Groups, each of which chooses values of its keys:", *chosen, ""] if chosen else []
    return "\n".join([usage.strip(), "", *groups, "Keys:", *keys, "", footer])
