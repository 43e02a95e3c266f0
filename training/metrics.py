"""Where numbers go: metrics.jsonl (the truth), W&B (a view of it that may fail), the terminal, and loss.png."""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch

from training.checkpoint import write_atomic

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
    """Rank 0's record of a run. `log` writes a JSON line and passes it to W&B; other ranks make no such object."""

    def __init__(self, config, tree: dict, start_step: int):
        self.run_dir = Path(config.run.dir)
        self.path = self.run_dir / "metrics.jsonl"
        drop_lines_after(self.path, start_step)
        self.file = open(self.path, "a", encoding="utf-8")
        self.wandb = start_wandb(config, tree, self.run_dir)

    def log(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """One line; a number that is not finite becomes null, which JSON can hold."""
        line = {"step": step, "tokens": tokens}
        line |= {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self._wandb(lambda run: run.log(line))

    def note(self, group: str, facts: dict[str, float]) -> None:
        """Facts about this start of the run, for W&B's summary alone."""
        self._wandb(lambda run: run.summary.update({f"{group}/{key}": value for key, value in facts.items()}))

    def summarize(self, facts: dict, plot: Path | None = None) -> None:
        """summary.json, and the same in W&B's summary beside the plot."""
        write_atomic(self.run_dir / "summary.json", json.dumps(facts, indent=2) + "\n")
        self._wandb(lambda run: run.summary.update(facts))
        if plot:
            self._wandb(lambda run: log_image(run, plot))

    def close(self, exit_code: int = 0) -> None:
        self.file.close()
        self._wandb(lambda run: run.finish(exit_code=exit_code))

    def _wandb(self, action) -> None:
        if self.wandb is None:
            return
        try:
            action(self.wandb)
        except Exception as error:  # a dashboard is no reason to stop training
            print(f"W&B failed and is off from here on (metrics.jsonl goes on): {error}")
            self.wandb = None


def log_image(run, path: Path) -> None:
    import wandb

    run.log({path.stem: wandb.Image(str(path))})


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


def wandb_mode(mode: str) -> str:
    """`auto` is online where somebody is logged in (WANDB_API_KEY or a netrc entry), else offline."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    import netrc

    try:
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0].split(":")[0]
        logged_in = netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        logged_in = False
    return "online" if logged_in or os.environ.get("WANDB_API_KEY") else "offline"


def start_wandb(config, tree: dict, run_dir: Path):
    """The W&B run of a run folder: its id is a function of the folder, so that requeues and evaluations join it."""
    mode = wandb_mode(config.wandb.mode)
    if mode == "disabled":
        return None
    try:
        import wandb

        run = wandb.init(
            project=config.wandb.project,
            group=config.wandb.group,
            tags=[config.model.name, config.size.name, *config.wandb.tags],
            name=config.run.name,
            id=hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:16],
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            mode=mode,
            reinit="finish_previous",  # a run of this process whose dashboard failed is not to be joined
            config=tree,
            settings=wandb.Settings(silent=True, init_timeout=60),
        )
        run.define_metric("tokens")
        run.define_metric("step")
        run.define_metric("*", step_metric="tokens")
        return run
    except Exception as error:
        print(f"W&B could not start ({error}); metrics.jsonl has everything")
        return None


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
