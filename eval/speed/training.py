"""How fast training is: `python -m eval.speed.training model=t6 size=small trainer.micro_batch_size=8 [overrides]`.

One JSON line for steps of forward, backward and optimizer on random tokens: train.py's model, optimizer and precision
on one device, without data, DeepSpeed or logging. Keys are those of train.py, and `steps`.
"""

import json
import math
import statistics
import time

import torch
from pydantic import Field

from configs.app import app
from eval.speed.measure import check_memory, versions
from model import counting
from model.transformer import Transformer
from training.checks import check_core
from training.config import Config
from training.device import device_name, dtype_name, find_runtime, memory_gb, peak_flops, synchronize
from training.optim import build_optimizer
from training.preflight import needed_memory

WARM_UP = 2  # steps that compile, allocate and tune
MARGIN = 1.5  # what is estimated may be so many times as large as what is there, before it is refused
DOCUMENT_END = 0
DOCUMENT_TOKENS = 500  # in a document, on average, with data.document_mask


class SpeedConfig(Config):
    steps: int = Field(10, ge=1, le=10**6)  # timed ones


def main(config: SpeedConfig) -> int:
    trainer = config.trainer
    runtime = find_runtime(config.device, trainer.dtype)
    device = runtime.device
    check_core(config.core, config.model, runtime)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(config.run.seed)
    network = config.network(DOCUMENT_END)
    keys = f"trainer.seq_len={trainer.seq_len}, trainer.micro_batch_size={trainer.micro_batch_size}"
    check_memory(keys, sum(needed_memory(config, runtime, network).values()) / MARGIN, device)
    model = Transformer(network, runtime.autocast_dtype, recompute=trainer.activation_checkpointing).to(device)
    optimizer = build_optimizer(model, config.optim)
    compute = torch.compile(model) if trainer.compile else model
    shape = (trainer.micro_batch_size, trainer.seq_len)
    tokens, targets = torch.randint(DOCUMENT_END + 1, network.vocab_size, (2, *shape), device=device)
    if config.data.document_mask:
        tokens[torch.rand(shape, device=device) < 1 / DOCUMENT_TOKENS] = DOCUMENT_END
    times = []
    for _ in range(WARM_UP + config.steps):
        began = time.perf_counter()
        loss = compute(tokens, targets) / targets.numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip or math.inf)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - began)
    seconds = statistics.median(times[WARM_UP:])
    flops = counting.training_flops_per_token(network, trainer.seq_len) * targets.numel()
    line = {
        "model": config.model.name, "size": config.size.name, "core": config.core.name, "kernel": config.core.kernel,
        "device": device_name(device), "dtype": dtype_name(runtime.dtype), "batch": shape[0], "length": shape[1],
        "document_tokens": DOCUMENT_TOKENS if config.data.document_mask else None,
        "n_heads": config.model.n_heads, "params": counting.num_params(network),
        "tokens_per_second": targets.numel() / seconds, "ms": seconds * 1e3,
        "bytes": counting.activation_bytes_per_token(network, runtime.dtype.itemsize) * targets.numel(),
        "mfu": flops / seconds / peak_flops(device, runtime.dtype), "memory_bytes": int(memory_gb(device) * 1e9),
        "compile": trainer.compile, "steps": config.steps, "loss": loss.item(), "versions": versions(device),
    }  # fmt: skip
    print(json.dumps(line), flush=True)
    return 0


if __name__ == "__main__":
    app(main, SpeedConfig)
