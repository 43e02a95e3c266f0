"""How fast decoding is: `python -m eval.speed.decoding models=[t6,mha] lengths=[16384] batches=[1] size=small`.

One JSON line for every mechanism, batch and cache length: a step of one token a row, of one layer's attention alone
(scope attention: no projections) or of the whole model (scope model). Next to its time are the bytes that it must move
(the cache, and for a whole step the weights, once each), the floor (those bytes at the bandwidth of a copy, measured in
the same run) and the share of that bandwidth achieved. The contestants of a point are timed in turns. Layers take turns
too, each with its own cache, so that a processor's cache does not stand in for memory. On a GPU a pass is a CUDA graph,
and explicit keys and values get the fastest of the available kernels.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import AfterValidator, Field, model_validator

from configs.app import app, configured
from configs.errors import Mistakes, writing
from configs.kinds import WIDEST, OptionalPath
from configs.load import Command
from data.files import write_atomic
from eval.speed.contestants import Contestant, MaterializedConfig, attention_inputs, kernels, model_step
from eval.speed.measure import Batch, Count, Rounds, Some, copy_bandwidth, in_turns, timer, versions
from eval.speed.plots import plot_decoding
from model import counting
from model.attention.tensor_product import TensorProductConfig
from model.cores.full import Full
from model.cores.sequence_tensor import SequenceTensor
from model.transformer import SizeConfig
from training import device as machine
from training.config import Config
from training.device import Device, Dtype, format_bytes

PAPER_SETTING = {  # Figures 5, 7 and 8: d_model / 64 heads each; MLA's size, not stated, is that which fits its curve
    "gqa": ["model.n_kv_heads=4"],
    "mla": ["model.kv_lora_rank=512", "model.qk_rope_head_dim=64"],
    "t6": ["model.q_rank=16", "model.k_rank=1", "model.v_rank=1"],
}
LENGTHS = {"cpu": [2**12, 2**14], "cuda": [2**n for n in range(12, 20)]}
ROTATED_BYTES = {"cpu": 2**29, "cuda": 2**30}  # of the caches of layers that take turns: many times an L2 cache
MOST_LAYERS = 16


def _widths(widths: list[int]) -> list[int]:
    if any(width % 64 for width in widths):
        raise ValueError("must be multiples of 64, the head size of the paper's setting")
    return widths


class DecodingConfig(Command):
    yaml: ClassVar[str] = "decoding"

    models: Annotated[list[str], Some] = Field(["mha", "gqa", "mqa", "mla", "t6"])
    size: SizeConfig
    # Instead of a size, the paper's setting at these widths; its Figures 5, 7 and 8 are [1024,2048,3072].
    d_models: Annotated[list[Annotated[int, Field(ge=64, le=WIDEST)]], AfterValidator(_widths)] = Field([])
    lengths: list[Count] = Field([])  # tokens in the cache; default: LENGTHS
    batches: Annotated[list[Batch], Some] = Field([1])  # the paper's: [1,2,4,8,16]
    scopes: Annotated[list[Literal["attention", "model"]], Some] = Field(["attention"])
    device: Device = "auto"
    dtype: Dtype = "auto"  # of weights and cache
    rounds: Rounds = 9  # every contestant of a point is timed so many times, in turns; the median counts
    materialized: bool = True  # next to t6 and its variants, the same model with its keys and values cached
    # Next to every model, the same one over each of these folds, such as [[128,128]]; whole steps only.
    folds: list[Annotated[list[Count], Some]] = Field([])
    overrides: list[str] = Field([])  # for every model, such as ['model.q_rank=16','model.k_rank=1']
    out: OptionalPath = None  # a folder for decoding.jsonl and plots, with the paper's curves if it has them

    @model_validator(mode="after")
    def _folds_fit(self):
        lines = []
        if self.folds and "model" not in self.scopes:
            lines.append(f"folds={self.folds}: only whole steps can be timed, scopes=[model]")
        blocks = {fold[0] for fold in self.folds if min(self.lengths, default=math.inf) < fold[0]}
        lines += [f"folds={self.folds}: lengths={self.lengths} must hold a block of {block} tokens" for block in blocks]
        if lines:
            raise Mistakes(*lines)
        return self


def contestants(config: DecodingConfig) -> list[Contestant]:
    """Return the models at a size, or at each width of the paper's setting, with what else is compared with each."""
    size, found = config.size, []
    own = [f"size.{key}={value}" for key, value in size.model_dump(exclude={"name"}).items() if value is not None]
    for d_model, model in product(config.d_models or [None], config.models):
        name, chosen = size.name, [f"size={size.name}", *own]
        if d_model is not None:
            name, special = f"paper_{d_model}", PAPER_SETTING.get("t6" if model.startswith("t6") else model, [])
            chosen = ["size=medium", f"size.d_model={d_model}", f"model.n_heads={d_model // 64}", *special]
        overrides = [f"model={model}", "tokenizer=gpt2", *chosen, *config.overrides]
        network = replace(configured(Config, overrides, world_size=1).network(), core=Full(kernel="sdpa"))
        networks = [network]
        if isinstance(network.attention, TensorProductConfig):
            networks = [replace(network, core=Full(kernel="factors"))]
            if config.materialized:
                networks.append(replace(network, attention=MaterializedConfig(**dict(network.attention))))
        networks += [replace(network, core=SequenceTensor(fold=fold, kernel="sdpa")) for fold in config.folds]
        found += [Contestant(model, name, network) for network in networks]
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr)


class Setting(NamedTuple):
    """What the contestants of a point have in common."""

    scope: str
    batch: int
    length: int


@dataclass
class Bench:
    """The machine of a run."""

    device: torch.device
    dtype: torch.dtype
    bandwidth: float  # bytes a second, of a copy
    memory: float  # bytes to fill at most
    rounds: int

    def lines(self, rivals: list[Contestant], setting: Setting) -> Iterator[dict]:
        """Yield a line for every contestant that fits in memory, as many timed in turns as fit together."""
        group, used = [], 0.0
        for rival in rivals:
            if rival.is_folded and setting.scope == "attention":
                continue
            need = self.needed(rival, setting)
            if need > self.memory:
                where = "{}, batch {}, {:,} tokens".format(*setting)
                fits = f"it needs {format_bytes(need)} of {format_bytes(self.memory)}"
                say(f"{rival}, {where}: skipped, {fits}")
                continue
            if used + need > self.memory:
                yield from self.run_in_turns(group, setting)
                group, used = [], 0.0
            group.append(rival)
            used += need
        yield from self.run_in_turns(group, setting)

    def run_in_turns(self, rivals: list[Contestant], setting: Setting) -> Iterator[dict]:
        """Yield the line of each contestant, with the fastest of its kernels."""
        points = [self.prepare(rival, setting) for rival in rivals]
        times = iter(in_turns([way for ways, _ in points for way in ways.values()], self.rounds))
        for ways, facts in points:
            if timed := [(next(times), kernel) for kernel in ways]:
                (passed, _), kernel = min(timed)
                ms, floor = passed / (facts["layers"] * facts["tokens"]), facts["bytes"] / self.bandwidth * 1e3
                yield facts | {
                    "kernel": kernel, "ms": ms, "floor_ms": floor, "bandwidth_share": floor / ms,
                    "tokens_per_second": setting.batch / ms * 1e3, "copy_bytes_per_second": self.bandwidth,
                    "versions": versions(self.device),
                }  # fmt: skip

    def prepare(self, rival: Contestant, setting: Setting) -> tuple[dict[str, Callable], dict]:
        """Return by kernel the ways to time a pass over a full cache, each compiled and run once; and the facts."""
        network, (scope, batch, length) = rival.network, setting
        counted = self.cache_bytes(rival, setting)
        layers, tokens, ways = 1, 1, {}
        if scope == "model":
            way, tokens, cache_bytes, moved = model_step(network, batch, length, self.device, self.dtype)
            ways[network.core.kernel] = way
        else:
            wanted, room = math.ceil(ROTATED_BYTES[self.device.type] / counted), int(self.memory / (2 * counted))
            layers = max(1, min(MOST_LAYERS, wanted, room))
            calls, moved = attention_inputs(network, batch, length, layers, self.device, self.dtype)
            cache_bytes = moved
            for name, kernel in kernels(calls[0], network.core, self.device).items():
                try:
                    ways[name] = timer(lambda kernel=kernel: [kernel(*call) for call in calls], self.device)
                except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                    say(f"{rival}: no {name}: {str(error).splitlines()[0][:120]}")
        if cache_bytes != counted:
            raise RuntimeError(f"{rival}: the cache has {cache_bytes} bytes, and {counted} are counted")
        return ways, rival.facts | {
            "scope": scope, "device": machine.device_name(self.device), "dtype": machine.dtype_name(self.dtype),
            "batch": batch, "length": length, "layers": layers, "tokens": tokens, "bytes": moved,
            "memory_bytes": cache_bytes,
        }  # fmt: skip

    def cache_bytes(self, rival: Contestant, setting: Setting) -> int:
        """Return the bytes of a layer's cache, or of the model's, as they are counted."""
        whole = counting.kv_bytes_per_token(rival.network, self.dtype) * setting.batch * setting.length
        return whole if setting.scope == "model" else whole // rival.network.n_layers

    def needed(self, rival: Contestant, setting: Setting) -> float:
        """Return the bytes that a point takes: caches, what attention makes of them, weights."""
        cache = self.cache_bytes(rival, setting)
        if setting.scope == "model":
            return 1.1 * cache + 1.5 * counting.num_params(rival.network) * self.dtype.itemsize
        return 1.1 * min(ROTATED_BYTES[self.device.type] + cache, MOST_LAYERS * cache)


@torch.no_grad()
def main(config: DecodingConfig) -> int:
    runtime = machine.find_runtime(config.device, config.dtype)
    device, rivals = runtime.device, contestants(config)
    if config.out:
        with writing("out", config.out):  # before it is measured what will lie there
            Path(config.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    memory = 0.9 * machine.available_memory(device)
    bench = Bench(device, runtime.dtype, copy_bandwidth(device), memory, config.rounds)
    say(f"{machine.device_name(device)}: a copy moves {bench.bandwidth / 1e9:,.0f} GB/s")
    lines = []
    for setting in product(config.scopes, config.batches, config.lengths or LENGTHS[device.type]):
        for line in bench.lines(rivals, Setting(*setting)):
            lines.append(line)
            print(json.dumps(line), flush=True)
    if config.out:
        path = Path(config.out) / "decoding.jsonl"
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in lines))
        for written in [path, *plot_decoding(lines, path.parent)]:
            say(f"written to {written}")
    return 0


if __name__ == "__main__":
    app(main, DecodingConfig)
