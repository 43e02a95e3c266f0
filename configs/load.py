"""From the tree that Hydra composes to the typed configuration, with every mistake found reported at once."""

import dataclasses
import difflib
import os
import types
import typing

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.schema import Config, ConfigError, check_machine, name_run
from model.counting.match import fill_by_size, fill_heads

SHOWN = 40  # known names in a message


def _type_name(hint) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(_type_name(arg) for arg in typing.get_args(hint))
    names = {int: "an integer", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}
    origin = typing.get_origin(hint)
    if origin is list:
        inner = {dict: "mappings", str: "texts", int: "integers", float: "numbers"}
        of = typing.get_args(hint)[0]
        return f"a list of {inner.get(typing.get_origin(of) or of, of)}, as in [A,B]"
    return "a mapping" if origin is dict else names.get(hint, str(hint))


def did_you_mean(key: str, known, prefix: str = "") -> str:
    """The known name nearest to `key`, after `prefix`; where none is near, what there is."""
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    shown = sorted(known)[:SHOWN]
    more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
    return f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(shown)}{more}"


def _merge(cls: type, node: DictConfig, prefix: str, errors: list[str]):
    """An instance of the dataclass `cls` from `node`; every unknown key and wrong type goes to `errors`."""
    unusable = False
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    values = {}
    for key in node:
        if key == "_target_":
            continue
        if key not in known:
            errors.append(f"{prefix}{key}: unknown key; {did_you_mean(str(key), known, prefix)}")
            continue
        try:
            if dataclasses.is_dataclass(hints[key]):
                values[key] = load_block(node, key, hints[key], errors)
                if values[key]:
                    errors.extend(values[key].errors())
                else:
                    unusable = True
                continue
            raw = node[key]
            if raw is None and types.NoneType not in (*typing.get_args(hints[key]), hints[key]):
                errors.append(f"{prefix}{key} is not set: give it as {prefix}{key}=...")
                unusable = True
                continue
            value = OmegaConf.to_container(raw, resolve=True) if OmegaConf.is_config(raw) else raw
            if isinstance(value, str) and str in (hints[key], *typing.get_args(hints[key])):
                values[key] = value  # as it is: "${" in it is no interpolation any more
                continue
            typed = OmegaConf.structured(dataclasses.make_dataclass("Typed", [(key, hints[key])]))
            typed[key] = value
            values[key] = OmegaConf.to_container(typed)[key]
        except OmegaConfBaseException as error:
            unusable |= key in required  # where there is a default, go on with it to find more mistakes
            text = str(OmegaConf.to_container(node, resolve=False)[key])
            if "${" in text:  # an interpolation that leads nowhere
                errors.append(f"{prefix}{key}={text}: {str(error).splitlines()[0]}")
            else:
                brackets = str in (hints[key], *typing.get_args(hints[key])) and OmegaConf.is_list(raw)
                quotes = "; brackets need quotes inside quotes, as in 'KEY=\"[A]\"'" if brackets else ""
                errors.append(f"{prefix}{key}={text}: must be {_type_name(hints[key])}{quotes}")
    missing = sorted(required - {str(key) for key in node})
    errors.extend(f"{prefix}{key} is not set" for key in missing)
    if unusable or missing:
        return None
    return cls(**values)


def load_block(tree: DictConfig, key: str, cls: type, errors: list[str]):
    """One block of the tree as its dataclass; a block with `_target_` becomes that subclass of `cls`."""
    node = tree.get(key)
    if not isinstance(node, DictConfig):
        errors.append(
            f"{key}={node!r}: must be a group of keys, as in {key}.KEY=VALUE" if node else f"{key} is not set"
        )
        return None
    if "_target_" in node:
        try:
            target = get_class(node._target_)
        except Exception as error:
            errors.append(f"{key}._target_={node._target_}: cannot be imported ({error})")
            return None
        if not (dataclasses.is_dataclass(target) and issubclass(target, cls)):
            errors.append(f"{key}._target_={node._target_}: must be a dataclass derived from {cls.__name__}")
            return None
        cls = target
    return _merge(cls, node, f"{key}.", errors)


def load(tree: DictConfig, world_size: int | None = None) -> Config:
    """The configuration of a run on `world_size` processes (default: torchrun's). ConfigError has all mistakes."""
    errors: list[str] = []
    hints = typing.get_type_hints(Config)
    blocks = {key: load_block(tree, key, cls, errors) for key, cls in hints.items() if dataclasses.is_dataclass(cls)}
    for key in tree:
        if key not in hints:
            errors.append(f"{key}: unknown key; " + did_you_mean(key, list(hints)))
    device = tree.get("device", "auto")
    errors.extend(check_machine(types.SimpleNamespace(device=device)))
    model, size = blocks["model"], blocks["size"]
    if model and size:
        blocks["model"] = fill_by_size(model, size.name)
        size.d_ff = size.d_ff if size.d_ff is not None else 8 * size.d_model // 3
    sound, wrong = set(), {error.partition("=")[0] for error in errors}  # a default now stands for a wrong value
    for key, block in blocks.items():
        found = [error for error in block.errors() if error.partition("=")[0] not in wrong] if block else []
        errors.extend(found)
        if block and not found:
            sound.add(key)
    if sound >= {"core", "trainer"}:
        blocks["core"] = blocks["core"].resolved(blocks["trainer"].seq_len)
    if sound >= {"model", "trainer"}:
        blocks["model"] = blocks["model"].resolved(blocks["trainer"].seq_len)
        errors.extend(blocks["model"].errors())
    if sound >= {"model", "size", "core", "trainer"}:
        blocks["model"] = fill_heads(blocks["model"], blocks["core"], size, blocks["trainer"].seq_len)
    if sound >= {"data", "tokenizer", "core"}:
        errors.extend(data_errors(blocks["data"], blocks["tokenizer"], blocks["core"]))
    if sound >= {"trainer", "deepspeed"} and blocks["deepspeed"].bf16_engine and blocks["trainer"].dtype == "fp32":
        errors.append("trainer.dtype=fp32: deepspeed.config.bf16.enabled=true keeps the parameters in bf16")
    if "trainer" in sound:
        try:
            blocks["trainer"].accumulation_steps(world_size or int(os.environ.get("WORLD_SIZE", 1)))
        except ConfigError as error:
            errors.extend(error.errors)
    if errors:
        raise ConfigError(*errors)
    return name_run(Config(**blocks, device=device))


def load_extended(tree: DictConfig, cls: type):
    """`load` for a command with top-level keys of its own: those that the dataclass `cls` adds to `Config`.

    `cls.own_errors`, where there is one, yields the mistakes in them.
    """
    common = {field.name for field in dataclasses.fields(Config)}
    fields = [field for field in dataclasses.fields(cls) if field.name not in common]
    own = dataclasses.make_dataclass("Own", [(f.name, f.type, dataclasses.field(default=f.default)) for f in fields])
    names = {field.name for field in fields}
    errors: list[str] = []
    values = _merge(own, OmegaConf.masked_copy(tree, [key for key in tree if key in names]), "", errors)
    if values and hasattr(cls, "own_errors"):
        errors.extend(cls.own_errors(values))
    try:
        config = load(OmegaConf.masked_copy(tree, [key for key in tree if key not in names]))
    except ConfigError as error:
        errors.extend(error.errors)
    if errors:
        raise ConfigError(*errors)
    return cls(**vars(config), **vars(values))


def data_errors(data, tokenizer, core):
    """Mistakes between the data, its tokenizer and the core."""
    try:
        data.dtype_for(tokenizer.vocab_size)
    except ConfigError as error:
        yield from error.errors
    if data.document_mask and not core.masks_documents:
        why = f", {core.why_no_documents}" if core.why_no_documents else ""
        yield f"data.document_mask=true: core={core.name} cannot mask documents{why}; use core=sdpa"


def load_flat(tree: DictConfig, cls: type):
    """The small configuration of an evaluation command, as `load` does it for a run."""
    errors: list[str] = []
    config = _merge(cls, tree, "", errors)
    if config:
        errors.extend(config.errors())
    if errors:
        raise ConfigError(*errors)
    return config
