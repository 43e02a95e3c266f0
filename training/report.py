"""What a run shows in the terminal: tables before and after, and a line for each logged step between them."""

import time
from datetime import timedelta
from pathlib import Path

from rich.console import Console

from data.files import write_atomic
from data.shards import Manifest
from training.config import Config
from training.device import Runtime, dtype_name
from training.jsonl import read_lines
from training.metrics import Metrics
from training.optim import describe
from training.plots import plot_loss

SHOWN = {  # of the metrics of a step
    "train/loss": "loss {:.4f}",
    "val/loss": "val loss {:.4f}",
    "val/perplexity": "val perplexity {:.1f}",
    "perf/tokens_per_second": "{:,.0f} tokens/s",
}


class Report:
    """Rank 0 writes to the terminal, the others are silent."""

    def __init__(self, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, rows: dict[str, str]) -> None:
        width = max(map(len, rows))
        self.console.print(f"\n[bold]{title}[/bold]")
        for key, value in rows.items():
            self.say(f"  {key:<{width}}  {value}")

    def introduce(
        self, config: Config, runtime: Runtime, counts: dict, manifest: Manifest, start_step: int, epochs: float
    ) -> None:
        """Show what is about to run, on what, from which step."""
        trainer, model, size, dtype = config.trainer, config.model, config.size, dtype_name(runtime.dtype)
        tokens, entropy = manifest.splits["train"].tokens, manifest.unigram_entropy
        rows = {
            "run": config.run.dir + (f", resumed from step {start_step}" if start_step else ""),
            "model": f"{model.name} {size.name}, {counts['params'] / 1e6:.1f}M parameters, {model.n_heads} heads, "
            f"KV cache {counts['kv_bytes_per_token']:,} bytes a token",
            "pattern": config.core.described(trainer.seq_len),
            "budget": budget(counts, size.match, size.match_tolerance),
            "data": f"{manifest.name}, {tokens:,} tokens, unigram entropy {entropy:.3f}",
            "steps": f"{trainer.horizon} of {trainer.tokens_per_step:,} tokens, {epochs:.2f} epochs",
            "learning rate": describe(config.optim.lr, config.schedule, trainer.horizon),
            "machine": f"{runtime.world_size} x {runtime.device.type}, {dtype}, {config.deepspeed.name}",
        }
        self.table("T6", rows)
        self.first_step, self.started = start_step, time.monotonic()

    def update(self, step: int, horizon: int, metrics: dict[str, float]) -> None:
        """Show what was logged of a step, and the time that is left."""
        seconds = (time.monotonic() - self.started) / (step - self.first_step) * (horizon - step)
        parts = [text.format(metrics[key]) for key, text in SHOWN.items() if key in metrics]
        self.say(f"step {step}/{horizon}: {', '.join(parts)}, {timedelta(seconds=round(seconds))} left")

    def finish(self, config: Config, counts: dict, manifest: Manifest, texts: list[str], metrics: Metrics) -> None:
        """Write samples.txt, loss.png and summary.json, and show them. Rank 0 calls it."""
        run_dir, entropy = Path(config.run.dir), manifest.unigram_entropy
        samples = run_dir / "samples.txt"
        write_atomic(samples, "\n\n".join(f"--- sample {i}\n{text}" for i, text in enumerate(texts, 1)) + "\n")
        last = [line for line in read_lines(run_dir / "metrics.jsonl") if "val/loss" in line][-1]
        plot = plot_loss(run_dir, config.run.name, entropy)
        metrics.summarize({"run": config.run.name} | counts | last | {"unigram_entropy": entropy}, plot, texts)
        if texts:
            self.say(f"\nA sample:\n\n{texts[0]}")
        rows = {"validation loss": "not finite", "loss plot": str(plot), "samples": str(samples)}
        if last["val/loss"] is not None:
            rows["validation loss"] = f"{last['val/loss']:.4f} nats a token (unigram entropy {entropy:.4f})"
            rows["perplexity"] = f"{last['val/perplexity']:.2f}, {last['val/bits_per_byte']:.4f} bits a byte"
        self.table("Done", rows)


def budget(counts: dict, match: str, tolerance: float) -> str:
    """Return how the attention's cost compares with MHA's, and whether it is matched."""
    ratio = {key: counts[f"attention_{key}_over_mha"] for key in ("params", "flops", "kv_bytes")}
    text = "{params:.3f} x MHA's attention parameters, {flops:.3f} x its FLOPs, {kv_bytes:.3f} x its cache"
    warning = f" (not matched by {match} within {tolerance:.0%})" if abs(ratio[match] - 1) > tolerance else ""
    return text.format(**ratio) + warning
