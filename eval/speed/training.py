"""How fast training is: `python -m eval.speed.training model=t6 size=small trainer.micro_batch_size=8 [overrides]`.

One JSON line for steps of forward, backward and optimizer on random tokens: train.py's model, optimizer and precision
on one device, without data, DeepSpeed or logging. Keys are those of train.py, `steps`, and `document_tokens`.
"""

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from rich.progress import track

from configs.app import app
from configs.errors import at_least
from configs.load import load_extended
from configs.schema import Config, ConfigError
from eval.speed.measure import device_name, versions
from model import counting
from model.transformer import Transformer, TransformerConfig
from training.metrics import memory_gb, peak_flops
from training.optim import build_optimizer
from training.setup import find_runtime

WARM_UP = 2  # steps that compile, allocate and tune
DOCUMENT_END = 0


@dataclass
class SpeedConfig(Config):
    steps: int = 10  # timed ones
    document_tokens: int = 500  # of a document, on average, where data.document_mask is set

    def own_errors(self):
        yield from at_least(1, "", self, "steps", "document_tokens")


def main(config: SpeedConfig) -> int:
    runtime, trainer = find_runtime(config), config.trainer
    device = runtime.device
    try:
        config.core.check(config.model, device.type, runtime.dtype)
    except ValueError as error:
        raise ConfigError(f"core={config.core.name}: {error}") from None
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.run.seed)
    network = TransformerConfig.from_config(config, DOCUMENT_END)
    model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing).to(device)
    optimizer = build_optimizer(model, config.optim)
    compute = torch.compile(model) if trainer.compile else model
    shape = (trainer.micro_batch_size, trainer.seq_len)
    tokens, targets = torch.randint(DOCUMENT_END + 1, network.vocab_size, (2, *shape), device=device)
    if config.data.document_mask:
        tokens[torch.rand(shape, device=device) < 1 / config.document_tokens] = DOCUMENT_END
    times = []
    console = Console(stderr=True)
    for _ in track(range(WARM_UP + config.steps), description="training", console=console, transient=True):
        began = time.perf_counter()
        loss = compute(tokens, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[WARM_UP:])
    flops = counting.training_flops_per_token(network, trainer.seq_len) * targets.numel()
    line = {
        "model": config.model.name, "size": config.size.name, "core": config.core.name, "device": device_name(device),
        "dtype": str(runtime.dtype).removeprefix("torch."), "batch": shape[0], "length": shape[1],
        "document_tokens": config.document_tokens if config.data.document_mask else None,
        "n_heads": config.model.n_heads, "params": counting.num_params(network),
        "tokens_per_second": targets.numel() / seconds, "ms": seconds * 1e3,
        "bytes": counting.activation_bytes_per_token(network, runtime.dtype.itemsize) * targets.numel(),
        "mfu": flops / seconds / peak_flops(device, runtime.dtype), "memory_bytes": int(memory_gb(device) * 1e9),
        "compile": trainer.compile, "steps": config.steps, "loss": loss.item(), "versions": versions(device),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    app(main, load=partial(load_extended, cls=SpeedConfig))
