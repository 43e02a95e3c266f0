"""How fast decoding is: `python -m eval.speed.decoding models=[t6,mha] lengths=[16384] batches=[1] size=small`.

One JSON line for every mechanism, batch and cache length: a step of one token a row, of one layer's attention alone
(scope attention: no projections) or of the whole model (scope model). Beside its time stand the bytes that it must
move (the cache, and for a whole step the weights, once each), the floor (those bytes at the bandwidth of a copy,
measured in the same run) and the share of that bandwidth achieved. Contestants of a point are timed in turns. Layers
take turns too, each with its own cache, so that a processor's cache does not stand in for memory. On a GPU a pass is a
CUDA graph, and explicit keys and values get the fastest of the kernels at hand.
"""

import json
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from configs.app import CONFIGS, app
from configs.errors import writing
from configs.load import load_flat
from configs.schema import SizeConfig, at_least, check_machine, parse_bytes
from eval.speed.contestants import Contestant, attention_inputs, contestants, kernels, model_step
from eval.speed.measure import copy_bandwidth, device_name, free_memory, in_turns, timer, versions
from model import counting

ROTATED_BYTES = {
    "cuda": 2**30,
    "cpu": 2**29,
}  # layers take turns until their caches are so large, many times an L2 cache
MOST_LAYERS = 16


@dataclass
class DecodingConfig:
    """`python -m eval.speed.decoding`; configs/decoding.yaml says what the keys are."""

    models: list[str]
    size: SizeConfig
    d_models: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=lambda: [1])
    scopes: list[str] = field(default_factory=lambda: ["attention"])
    device: str = "auto"
    dtype: str = "auto"
    rounds: int = 9
    memory: str | None = None
    materialized: bool = True
    folds: list[list[int]] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)
    out: str | None = None
    plan: bool = False

    def errors(self):
        yield from check_machine(self)
        yield from at_least(1, "", self, "rounds")
        for key, values in (("lengths", self.lengths), ("batches", self.batches)):
            if any(value < 1 for value in values):
                yield f"{key}={values}: must be at least 1 each"
        unknown = sorted(set(self.scopes) - {"attention", "model"})
        if unknown or not self.scopes:
            yield f"scopes={self.scopes}: must be of attention and model"
        models = sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
        if unknown := sorted(set(self.models) - set(models)):
            yield f"models={unknown}: no such model; there are {', '.join(models)}"
        if not self.models:
            yield "models=[]: name at least one"
        for fold in self.folds:
            if not fold or min(fold) < 1:
                yield f"folds={self.folds}: must be lists of sizes of at least 1, [n_1, ..., n_m]"
            if any(length < fold[0] for length in self.lengths):
                yield f"folds={self.folds}: lengths={self.lengths} must hold a block of {fold[0]} tokens"
        if self.folds and "model" not in self.scopes:
            yield f"folds={self.folds}: only whole steps can be timed, scopes=[model]"
        if any(width < 64 or width % 64 for width in self.d_models):
            yield f"d_models={self.d_models}: must be multiples of 64, the head size of the paper's setting"
        if self.memory is not None:
            try:
                parse_bytes(self.memory)
            except ValueError as error:
                yield f"memory={self.memory}: {error}"


@dataclass
class Bench:
    """One run's machine and what it has measured so far."""

    config: DecodingConfig
    device: torch.device
    dtype: torch.dtype
    bandwidth: float
    memory: float
    say: Console

    def points(self, contestant: Contestant, batch: int, length: int, scope: str) -> tuple[list, list, dict]:
        """(the ways to run it, their names, what is known of the point before it is timed)."""
        network = contestant.network
        if scope == "model":
            step = model_step(network, batch, length, self.device, self.dtype)
            moved, cache_bytes, layers, tokens = step.moved, step.cache_bytes, 1, step.tokens
            ways = {contestant.core: timer(step.run, self.device, step.reset, captured=not contestant.folds)}
        else:
            one = counting.kv_numbers_per_token(network.attention) * batch * length * self.dtype.itemsize
            layers = min(MOST_LAYERS, max(1, math.ceil(ROTATED_BYTES[self.device.type] / one)))
            layers = max(1, min(layers, int(self.memory // (2 * one))))
            inputs, cache_bytes = attention_inputs(network, batch, length, layers, self.device, self.dtype)
            moved, ways, tokens = cache_bytes, {}, 1
            for name, kernel in kernels(inputs[0][0], network.core, self.device).items():
                try:
                    ways[name] = timer(lambda kernel=kernel: [kernel(*call) for call in inputs], self.device)
                except (RuntimeError, ValueError, TypeError, AssertionError) as error:
                    self.say.print(f"{contestant.model}: no {name}: {str(error).splitlines()[0][:120]}", markup=False)
        counted = expected_bytes(network, batch, length, self.dtype, scope)
        if cache_bytes != counted:
            raise RuntimeError(f"{contestant.model}: the cache has {cache_bytes} bytes, and {counted} are counted")
        known = {
            "model": contestant.model, "size": contestant.size, "scope": scope, "core": contestant.core,
            "device": device_name(self.device), "dtype": str(self.dtype).removeprefix("torch."), "batch": batch,
            "length": length, "n_heads": network.attention.n_heads, "d_model": network.d_model, "layers": layers,
            "tokens": tokens, "bytes": moved, "memory_bytes": cache_bytes,
        }  # fmt: skip
        return list(ways.values()), list(ways), known

    def record(self, known: dict, kernel: str, milliseconds: float) -> dict:
        """The line of a point, given the time of a pass over its layers, or of its tokens."""
        each = milliseconds / (known["layers"] * known["tokens"])
        floor = known["bytes"] / self.bandwidth * 1e3
        return known | {
            "kernel": kernel,
            "ms": each,
            "floor_ms": floor,
            "bandwidth_share": floor / each,
            "tokens_per_second": known["batch"] / each * 1e3,
            "copy_bytes_per_second": self.bandwidth,
            "versions": versions(self.device),
        }

    def run_together(self, group: list[tuple], batch: int, length: int, scope: str) -> list[dict]:
        """The lines of contestants that are in memory at the same time, timed in turns."""
        ways, owners = [], []
        for contestant in group:
            runs, names, known = self.points(contestant, batch, length, scope)
            ways += runs
            owners += [(known, name) for name in names]
        best: dict[int, dict] = {}
        for (known, name), time in zip(owners, in_turns(ways, self.config.rounds), strict=True):
            line = self.record(known, name, time)
            if id(known) not in best or line["ms"] < best[id(known)]["ms"]:
                best[id(known)] = line
        return list(best.values())

    def needed(self, contestant: Contestant, batch: int, length: int, scope: str) -> float:
        """Bytes that a point takes: caches, what attention makes of them, weights."""
        network = contestant.network
        cache = expected_bytes(network, batch, length, self.dtype, scope)
        if scope == "model":
            return 1.1 * cache + 1.5 * counting.num_params(network) * self.dtype.itemsize
        return 1.1 * min(max(cache, ROTATED_BYTES[self.device.type] + cache), MOST_LAYERS * cache)


def expected_bytes(network, batch: int, length: int, dtype: torch.dtype, scope: str) -> int:
    """What the counting says that the cache has: a layer's, or the model's."""
    whole = counting.kv_bytes_per_token(network, dtype) * batch * length
    return whole if scope == "model" else whole // network.n_layers


def groups_that_fit(sized: list[tuple[float, Contestant]], memory: float) -> list[list[Contestant]]:
    """The contestants in order, as many at a time as fit."""
    groups, used = [[]], 0.0
    for size, contestant in sized:
        if groups[-1] and used + size > memory:
            groups.append([])
            used = 0.0
        groups[-1].append(contestant)
        used += size
    return groups


@torch.no_grad()
def main(config: DecodingConfig) -> int:
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[
        config.dtype if config.dtype != "auto" else "bf16" if kind == "cuda" else "fp32"
    ]
    say = Console(stderr=True, highlight=False, soft_wrap=True)
    rivals = list(
        contestants(
            config.models, config.size, config.d_models, config.overrides, config.materialized, config.folds
        )
    )  # fmt: skip
    if config.plan:
        from eval.speed.plan import show_plan

        return show_plan(rivals, device, config.rounds)
    if config.out:
        with writing("out", config.out):  # before it is measured what will lie there
            Path(config.out).mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    memory = parse_bytes(config.memory) if config.memory else 0.9 * free_memory(device)
    bench = Bench(config, device, dtype, copy_bandwidth(device), memory, say)
    say.print(f"{device_name(device)}: a copy moves {bench.bandwidth / 1e9:,.0f} GB/s")
    lengths = config.lengths or ([2**n for n in range(12, 20)] if kind == "cuda" else [2**12, 2**14])
    lines = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=say, transient=True) as progress:
        task = progress.add_task(
            "decoding", total=len(config.scopes) * len(config.batches) * len(lengths) * len(rivals)
        )
        for scope in config.scopes:
            for batch in config.batches:
                for length in lengths:
                    progress.update(task, description=f"{scope}, batch {batch}, {length:,} tokens")
                    able = [rival for rival in rivals if scope == "model" or not rival.folds]
                    progress.advance(task, len(rivals) - len(able))
                    sized = [(bench.needed(rival, batch, length, scope), rival) for rival in able]
                    for need, rival in sized:
                        if need > memory:
                            say.print(
                                f"{rival.model} {rival.core}, batch {batch}, {length} tokens: skipped, it needs "
                                f"{need / 1e9:,.1f} GB of {memory / 1e9:,.1f}", markup=False,
                            )  # fmt: skip
                            progress.advance(task)
                    for group in groups_that_fit([pair for pair in sized if pair[0] <= memory], memory):
                        for line in bench.run_together(group, batch, length, scope):
                            lines.append(line)
                            print(json.dumps(line), flush=True)
                        progress.advance(task, len(group))
    if config.out:
        write(lines, Path(config.out), say)
    return 0


def write(lines: list[dict], folder: Path, say: Console) -> None:
    from eval.speed.plots import plot_decoding

    (folder / "decoding.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    for path in [folder / "decoding.jsonl", *plot_decoding(lines, folder)]:
        say.print(f"written to {path}")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    app(main, "decoding", load=lambda tree: load_flat(tree, DecodingConfig))
