"""Weights from a Hugging Face folder that `trainer.init_from` names: an export of ours, or another that fits.

Everything is read as data: config.json is compared, tensors are renamed, and no code of the folder runs.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.block import to_dict
from configs.errors import ConfigError
from configs.load import flatten
from data.tokenizers import HuggingFaceTokenizer
from model import dialects
from model.attention.tensor_product import TensorProductConfig
from model.cores.full import Full
from model.dialects.common import State
from model.dialects.factors import as_multi_head, to_factors, why_no_factors
from model.transformer import Transformer, TransformerConfig
from training.checkpoint import NOT_ARCHITECTURE

KEYS = {  # of config.json, and ours
    "vocab_size": "tokenizer.vocab_size, padded to a multiple of 128",
    "hidden_size": "size.d_model",
    "intermediate_size": "size.d_ff",
    "num_hidden_layers": "size.n_layers",
    "num_attention_heads": "model.n_heads",
    "num_key_value_heads": "model.n_kv_heads",
    "head_dim": "size.head_dim",
    "rms_norm_eps": "size.norm_eps",
    "rope_theta": "model.rope_base",
    "rope_scaling": "model.rope_scaling",
    "sliding_window": "core.window",
    "q_lora_rank": "model.q_lora_rank",
    "kv_lora_rank": "model.kv_lora_rank",
    "qk_nope_head_dim": "size.head_dim",
    "qk_rope_head_dim": "model.qk_rope_head_dim",
    "v_head_dim": "size.head_dim",
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps")
YARN = {  # its keys, and what they are if they are not there
    "original_max_position_embeddings": None, "attention_factor": None, "mscale": None, "mscale_all_dim": None,
    "beta_fast": 32, "beta_slow": 1, "truncate": True,
}  # fmt: skip
NAMED = 3  # tensors in a message


def is_export(source: str | Path) -> bool:
    """Return whether `trainer.init_from` names a Hugging Face folder."""
    return (Path(source) / "config.json").is_file()


def check(source: str | Path, network: TransformerConfig) -> None:
    """Raise a ConfigError that names what of the folder does not fit `network`; reads no more than headers."""
    folder = Path(source)
    tree = read_config(folder)
    check_config(folder, tree, network)
    check_tensors(folder, expected(tree, network))


def load(source: str | Path, model: Transformer) -> None:
    """Fill the model from the folder. ConfigError if it does not fit, with one line for each file, key or tensor."""
    folder, network = Path(source), model.config
    check(folder, network)
    tree, theirs = read_config(folder), dict(tensors(folder))
    if dialect := dialects.of_model_type(tree["model_type"]):
        check_last_norm(folder, theirs["model.norm.weight"])
        groups = described(tree)["num_key_value_heads"]
        state = dialect.from_theirs(theirs, as_multi_head(network, groups))
        if isinstance(network.attention, TensorProductConfig):
            state = to_factors(state, model.state_dict(), network.attention, groups)
    else:
        state = {name.removeprefix("model."): tensor for name, tensor in theirs.items()}
    model.load_state_dict(state | {"head.weight": state["embedding.weight"]})


def check_tokenizer(source: str | Path, fingerprint: str, end_of_text: str) -> None:
    """Raise a ConfigError if the folder's tokenizer is another than that of the data, as far as the folder tells."""
    folder = Path(source)
    facts = read_config(folder).get("pretraining")
    kept = facts.get("tokenizer_fingerprint") if isinstance(facts, dict) else None
    known = [kept] if isinstance(kept, str) else []
    if (file := folder / HuggingFaceTokenizer.file).is_file():  # which may be the original's copy in another form
        known.append(HuggingFaceTokenizer.fingerprint_of(file.read_text(encoding="utf-8"), end_of_text))
    if known and fingerprint not in known:
        raise ConfigError(
            f"trainer.init_from={source}: was trained with another tokenizer than the data (fingerprint "
            f"{known[0][:12]}, not {fingerprint[:12]}); prepare the data with tokenizer=huggingface "
            f"tokenizer.path={source}"
        )


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"trainer.init_from: {path} cannot be read as JSON ({error})") from None
    kind = tree.get("model_type") if isinstance(tree, dict) else None
    if not isinstance(kind, str | None):
        kind = None
    if kind != "t6" and dialects.of_model_type(kind) is None:
        known = [name for dialect in dialects.DIALECTS for name in dialect.model_types]
        raise ConfigError(f"trainer.init_from: {path}: model_type={kind}: must be {', '.join(known)} or t6")
    try:
        described(tree)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ConfigError(f"trainer.init_from: {path} has a value of a wrong kind ({error})") from None
    return tree


def check_config(folder: Path, tree: dict[str, Any], network: TransformerConfig) -> None:
    """Raise a ConfigError with each key of config.json that says something else than the run, and both values."""
    dialect = dialects.of_model_type(tree["model_type"])
    there, here = in_dialect(dialect, folder, tree, network) if dialect else as_t6(tree, network)
    lines = [
        f"\n    {key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} here"
        + (f" ({KEYS[key]})" if key in KEYS else "")
        for key in sorted(here.keys() | there.keys())
        if there.get(key) != here.get(key)
    ]
    if lines:
        raise ConfigError(f"trainer.init_from: {folder / 'config.json'} is of another network:{''.join(lines)}")


def in_dialect(
    dialect: dialects.Dialect, folder: Path, tree: dict[str, Any], network: TransformerConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a dialect's config.json says, and what it would say of `network`, or of the MHA that a TPA equals.

    ConfigError if the dialect does not have the network. What is attended to may differ, as if it started from a run,
    but full attention does not start from a window unnoticed.
    """
    attention, there = network.attention, described(tree)
    if isinstance(attention, TensorProductConfig) and dialect is dialects.LLAMA:
        if why := why_no_factors(attention, there["num_attention_heads"], there["num_key_value_heads"]):
            raise ConfigError(*(f"trainer.init_from={folder}: {line}" for line in why))
        network = as_multi_head(network, there["num_key_value_heads"])
    plain = replace(network, core=Full(), document_end=None)
    if why := dialect.why_not(plain):
        kind = tree["model_type"]
        raise ConfigError(f"trainer.init_from={folder}: is of type {kind}, which cannot start this run: {why}")
    here = described(dialect.config(plain))
    if type(network.core) is not Full:
        here["sliding_window"] = there["sliding_window"]
    return there, here


def as_t6(tree: dict[str, Any], network: TransformerConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the config.json of an export of T6 says, and what it would say of `network`."""
    sizes = (network.vocab_size, network.d_model, network.d_ff, network.n_layers, network.norm_eps)
    mechanism = flatten({"model": to_dict(network.attention.replace(by_size={}))})
    fields = type(network.attention).model_fields
    later = {key: fields[name].default for key in mechanism if (name := key.partition(".")[2]) in fields}
    here = dict(zip(SIZES, sizes, strict=True)) | mechanism
    there = {key: tree.get(key) for key in SIZES} | later | flatten({"model": tree.get("mechanism")})
    return tuple({k: v for k, v in side.items() if k not in NOT_ARCHITECTURE} for side in (there, here))


def described(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of a dialect's config.json that decide its function, under one of their several spellings."""
    rope = tree.get("rope_parameters") or {}
    scaling = rope or tree.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind in ("linear", "yarn"):
        given = {key: scaling[key] for key in (*YARN, "factor") if scaling.get(key) is not None}
        scaling = {"rope_type": kind} | (YARN if kind == "yarn" else {}) | given
    usual = {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
    }  # fmt: skip
    found = {key: tree.get(key, value) for key, value in usual.items()}
    heads = found["num_attention_heads"]
    found |= {
        "num_key_value_heads": tree.get("num_key_value_heads") or heads,
        "rope_theta": rope.get("rope_theta", tree.get("rope_theta", 10000.0)),
        "rope_scaling": None if kind == "default" else scaling,
    }
    if tree["model_type"] in dialects.LLAMA.model_types:
        window = tree.get("sliding_window", 4096 if tree["model_type"] == "mistral" else None)
        return found | {"head_dim": tree.get("head_dim") or found["hidden_size"] // heads, "sliding_window": window}
    latent = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    found |= {key: tree.get(key) for key in latent} | {"rope_interleave": tree.get("rope_interleave", True)}
    dense = tree.get("first_k_dense_replace", 3)
    return found | {"first_k_dense_replace": min(dense, found["num_hidden_layers"]), "sliding_window": None}


def expected(tree: dict[str, Any], network: TransformerConfig) -> State:
    """Return the tensors that the folder must have, without data."""
    dialect = dialects.of_model_type(tree["model_type"])
    if dialect is dialects.LLAMA:
        network = as_multi_head(network, described(tree)["num_key_value_heads"])
    with torch.device("meta"):
        state = {name: x for name, x in Transformer(network).state_dict().items() if name != "head.weight"}
        if dialect:
            return dialect.to_theirs(state, network)
    return {f"model.{name}": tensor for name, tensor in state.items()}


def check_tensors(folder: Path, wanted: State) -> None:
    """Raise a ConfigError for a file that is torn, and for tensors that are missing, too many or of another shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        with opened(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    shapes = {name: shape for name, shape in shapes.items() if not name.endswith("rotary_emb.inv_freq")}
    missing = [name for name in wanted if name not in shapes]
    surplus = [name for name in shapes if name not in wanted]
    others = [
        f"{name} is {list(shapes[name])} and not {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in shapes and shapes[name] != tuple(tensor.shape)
    ]
    kinds = (("lacks tensors", missing), ("has tensors that this network has not", surplus), ("differs", others))
    lines = [f"trainer.init_from: {folder} {what}: {few(names)}" for what, names in kinds if names]
    if lines:
        raise ConfigError(*lines)


def few(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights. ConfigError if there are none, or the index of shards names one that is missing."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except FileNotFoundError:
        raise ConfigError(f"trainer.init_from: {folder} has no model.safetensors") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"trainer.init_from: {index} cannot be read ({error!r})") from None
    if strange := [name for name in names if Path(name).name != name]:
        raise ConfigError(f"trainer.init_from: {index}: {strange[0]} is no file of this folder")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise ConfigError(f"trainer.init_from: {folder / missing[0]} is missing, which its index names")
    return [folder / name for name in names]


def opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"trainer.init_from: {path} cannot be read, it may be cut off ({error})") from None


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name).float()


def check_last_norm(folder: Path, weight: Tensor) -> None:
    if not torch.equal(weight, torch.ones_like(weight)):
        raise ConfigError(
            f"trainer.init_from={folder}: model.norm.weight is not all ones; the last norm has no weight here, and the "
            "head behind it is the embedding, so that it cannot be folded into it"
        )
