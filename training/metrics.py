"""Where numbers go: metrics.jsonl (the truth), W&B (a view of it, training/wandb_run.py), and loss.png."""

import json
import math
import os
import time
from pathlib import Path

import torch

from training.checkpoint import write_atomic
from training.wandb_run import WandbRun

# Dense bf16 matrix throughput in FLOP/s by the maker's data sheets (without sparsity); longest matching name wins.
PEAK_BF16_FLOPS = {
    "A10": 125e12, "A100": 312e12, "A40": 149.7e12, "A6000": 154.8e12, "B200": 2250e12, "GH200": 989e12,
    "H100": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H200": 989e12, "L4": 121e12, "L40S": 362e12,
    "L40": 181e12, "RTX 3090": 71e12, "RTX 4090": 165.2e12, "V100": 125e12,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """What MFU is a share of: the data sheet's bf16 rate of a known GPU, else the fastest product measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = [key for key in PEAK_BF16_FLOPS if key in name]
        if known:
            return PEAK_BF16_FLOPS[max(known, key=len)]
    size, best = 1024 if device.type == "cpu" else 8192, float("inf")
    a = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(6):
        start = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gb(device: torch.device) -> float:
    """Peak memory: allocated on the GPU, or resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Metrics:
    """Rank 0's record of a run. `log` writes a JSON line, which W&B then shows; other ranks make no such object."""

    def __init__(self, config, tree: dict, start_step: int):
        self.run_dir = Path(config.run.dir)
        self.path = self.run_dir / "metrics.jsonl"
        drop_lines_after(self.path, start_step)
        self.file = open(self.path, "ab", buffering=0)
        self.unwritten = b""  # what a full disk has no room for yet
        self.wandb = WandbRun(config, tree)

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        was_full = bool(self.unwritten)
        self.unwritten += metrics_line(step, tokens, metrics).encode()
        if (failure := self._write()) and not was_full:
            print(f"{self.path} CANNOT BE WRITTEN, training goes on; lines wait until there is room: {failure}")
        self.wandb.catch_up()

    def _write(self) -> OSError | None:
        """Write what is to be written, as far as there is room; why it went no further."""
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            return error
        return None

    def note(self, group: str, facts: dict[str, float]) -> None:
        """Facts about this start of the run, for W&B's summary alone."""
        self.wandb.note({f"{group}/{key}": value for key, value in facts.items()})

    def summarize(self, facts: dict, plot: Path | None = None, texts: list[str] | None = None) -> None:
        """summary.json, and the same in W&B's summary beside the plot and the sample texts."""
        write_atomic(self.run_dir / "summary.json", json.dumps(facts, indent=2) + "\n")
        self.wandb.catch_up()
        self.wandb.summarize(facts)
        if plot:
            self.wandb.show_images([plot])
        if texts:
            self.wandb.show_texts("samples", texts)

    def close(self, exit_code: int = 0) -> None:
        if failure := self._write():
            print(f"{self.path}: THE LAST LINES ARE LOST: {failure}")
        self.file.close()
        self.wandb.finish(exit_code)


def metrics_line(step: int, tokens: int, metrics: dict[str, float]) -> str:
    """A line of metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
    numbers = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    return json.dumps({"step": step, "tokens": tokens} | numbers) + "\n"


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; torn ones, as a killed run may leave them, are left out."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def drop_lines_after(path: Path, step: int) -> None:
    """Forget what was logged past the checkpoint that the run goes on from."""
    if path.exists():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_atomic(path, "".join(json.dumps(line) + "\n" for line in kept))


def plot_loss(run_dir: Path, title: str, unigram_entropy: float | None = None) -> Path:
    """Draw train and validation loss against tokens, with the unigram entropy as the line to beat."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(run_dir / "metrics.jsonl")
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, style in (("train/loss", "train", {"alpha": 0.7}), ("val/loss", "validation", {"marker": "o"})):
        points = [(line["tokens"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=f"{label} ({points[-1][1]:.3f})", markersize=4, **style)
    if unigram_entropy:
        axes.axhline(unigram_entropy, color="grey", linestyle="--", linewidth=1)
        where = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate(
            f"unigram entropy {unigram_entropy:.3f} ", (1, unigram_entropy), **where, fontsize=8, color="grey"
        )
    axes.set(xlabel="tokens", ylabel="loss (nats a token)", title=title)
    axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    path = run_dir / "loss.png"
    figure.savefig(path.with_suffix(".partial.png"), dpi=150)
    plt.close(figure)
    os.replace(path.with_suffix(".partial.png"), path)
    return path
