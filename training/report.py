"""What a run shows in the terminal: tables before and after, and a live progress bar or plain lines between them."""

import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from data.files import write_atomic
from data.shards import Manifest
from training.config import Config
from training.device import Runtime, dtype_name
from training.jsonl import read_lines
from training.metrics import Metrics
from training.plots import plot_loss


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Report:
    """Rank 0 writes to the terminal, the others are silent."""

    def __init__(self, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.live = enabled and self.console.is_terminal
        self.progress: Progress | None = None

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
        trainer, model, size = config.trainer, config.model, config.size
        parameters = f"{counts['params'] / 1e6:.1f}M parameters"
        cache = f"KV cache {counts['kv_bytes_per_token']:,} bytes a token"
        resumed = f", resumed from step {start_step}" if start_step else ""
        rows = {
            "run": config.run.dir + resumed,
            "model": f"{model.name} {size.name}, {parameters}, {model.n_heads} heads, {cache}",
            "budget": budget(counts, size.match, size.match_tolerance),
            "data": f"{manifest.name}, {manifest.splits['train'].tokens:,} tokens, "
            f"unigram entropy {manifest.unigram_entropy:.3f}",
            "steps": f"{trainer.horizon} of {trainer.tokens_per_step:,} tokens, {epochs:.2f} epochs",
            "machine": f"{runtime.world_size} x {runtime.device.type}, {dtype_name(runtime.dtype)}, "
            f"{config.deepspeed.name}",
        }
        self.table("T6", rows)

    def start(self, step: int, horizon: int) -> None:
        """Start the progress bar of a run that stands at `step`."""
        self.first_step, self.horizon = step, horizon
        self.started = time.monotonic()
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task("training", total=horizon, completed=step, status="")
        self.progress.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """Show a step; `metrics` is empty if nothing was logged."""
        if not metrics:
            self.progress.update(self.task, completed=step)
            return
        left = (time.monotonic() - self.started) / (step - self.first_step) * (self.horizon - step)
        parts = []
        if "train/loss" in metrics:
            parts.append(f"loss {metrics['train/loss']:.4f}")
        if "val/loss" in metrics:
            parts.append(f"val loss {metrics['val/loss']:.4f} (perplexity {metrics['val/perplexity']:.1f})")
        if "perf/tokens_per_second" in metrics:
            parts.append(f"{metrics['perf/tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{duration(left)} left")
        brief = ", ".join(part for part in parts if not part.startswith("val"))  # the bar has one line of a terminal
        self.progress.update(self.task, completed=step, status=brief)
        if not self.live or "val/loss" in metrics:
            self.say(f"step {step}/{self.horizon}: {', '.join(parts)}")

    def stop(self) -> None:
        if self.progress is not None:
            self.progress.stop()

    def finish(self, config: Config, counts: dict, manifest: Manifest, texts: list[str], metrics: Metrics) -> None:
        """Write samples.txt, loss.png and summary.json, and show them. Rank 0 calls it."""
        self.stop()
        run_dir = Path(config.run.dir)
        samples = run_dir / "samples.txt"
        write_atomic(samples, "\n\n".join(f"--- sample {i}\n{text}" for i, text in enumerate(texts, 1)) + "\n")
        last = [line for line in read_lines(run_dir / "metrics.jsonl") if "val/loss" in line][-1]
        entropy = manifest.unigram_entropy
        plot = plot_loss(run_dir, config.run.name, entropy)
        metrics.summarize({"run": config.run.name} | counts | last | {"unigram_entropy": entropy}, plot, texts)
        if texts:
            self.say(f"\nA sample:\n\n{texts[0]}")
        rows = validation_rows(last, entropy) | {"loss plot": str(plot), "samples": str(samples)}
        self.table("Done", rows)


def validation_rows(last: dict, entropy: float) -> dict[str, str]:
    """Return what the last line of metrics.jsonl with a validation says, next to the data's unigram entropy."""
    loss = last["val/loss"]
    if loss is None:
        return {"validation loss": "not finite"}
    side = "under" if loss < entropy else "over"
    return {
        "validation loss": f"{loss:.4f} nats a token, {abs(entropy - loss):.4f} {side} the unigram entropy of "
        f"{entropy:.4f}",
        "perplexity": f"{last['val/perplexity']:.2f}, {last['val/bits_per_byte']:.4f} bits a byte",
    }


def budget(counts: dict, match: str, tolerance: float) -> str:
    """Return how the attention's cost compares with MHA's, and whether it is matched."""
    ratio = {key: counts[f"attention_{key}_over_mha"] for key in ("params", "flops", "kv_bytes")}
    text = (
        f"{ratio['params']:.3f} x MHA's attention parameters, {ratio['flops']:.3f} x its FLOPs, "
        f"{ratio['kv_bytes']:.3f} x its cache"
    )
    if abs(ratio[match] - 1) <= tolerance:
        return text
    return f"{text} (not matched by {match} within {tolerance:.0%})"
