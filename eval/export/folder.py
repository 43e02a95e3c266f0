"""A folder that is there whole or not at all, and weights in shards."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from configs.errors import ConfigError, writing

MAX_SHARD = 5_000_000_000  # bytes of a file of weights
WEIGHTS = "model.safetensors"


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """Yield a folder next to `out`, which becomes `out` in the end, and is removed if something fails.

    ConfigError if `out` cannot be written, or exists by then.
    """
    out = Path(out)
    partial = out.with_name(f".{out.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        with writing("out", out, "; choose another folder"):
            partial.mkdir(parents=True)
            yield partial
            mode = partial.stat().st_mode & 0o666  # as the user's other files have it; safetensors has its own
            for path in partial.iterdir():
                path.chmod(mode)
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            if out.exists():
                raise ConfigError(f"out={out}: exists already; choose another folder, or remove it")
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_weights(weights: dict[str, Tensor], folder: Path, max_shard: int = MAX_SHARD) -> None:
    """Write one file of weights, or several of at most `max_shard` bytes with an index, as transformers has them."""
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in weights.items():
        if shards[-1] and sum(other.nbytes for other in shards[-1].values()) + tensor.nbytes > max_shard:
            shards.append({})
        shards[-1][name] = tensor.contiguous()
    names = [WEIGHTS]
    if len(shards) > 1:
        stem, suffix = WEIGHTS.split(".")
        names = [f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}" for number in range(1, len(shards) + 1)]
        places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        size = sum(tensor.nbytes for tensor in weights.values())
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for name, shard in zip(names, shards, strict=True):
        save_file(shard, folder / name, metadata={"format": "pt"})
