"""What a run shows in the terminal: a live progress bar, or plain lines where the output is a file."""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class TrainingConsole:
    """Rank 0 writes, the others are silent."""

    def __init__(self, enabled: bool):
        self.console = Console(quiet=not enabled, highlight=False, soft_wrap=True)
        self.live = enabled and self.console.is_terminal
        self.progress = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    def table(self, title: str, rows: dict[str, str]) -> None:
        width = max(map(len, rows))
        self.console.print(f"\n[bold]{title}[/bold]")
        for key, value in rows.items():
            self.say(f"  {key:<{width}}  {value}")

    def introduce(self, config, runtime, counts: dict, manifest, start_step: int, epochs: float) -> None:
        """What is about to run, on what, from where."""
        trainer, size = config.trainer, f"{config.model.name} {config.size.name}"
        parameters, cache = (
            f"{counts['params'] / 1e6:.1f}M parameters",
            f"{counts['kv_bytes_per_token']:,} bytes a token",
        )
        entropy = f"unigram entropy {manifest.unigram_entropy:.3f}"
        ratio, size_config = (
            {k: counts[f"attention_{k}_over_mha"] for k in ("params", "flops", "kv_bytes")},
            config.size,
        )
        budget = (
            "{params:.3f} x MHA's attention parameters, {flops:.3f} x its FLOPs, {kv_bytes:.3f} x its cache".format(
                **ratio
            )
        )
        matched = abs(ratio[size_config.match] - 1) <= size_config.match_tolerance
        note = "" if matched else f" (NOT matched by {size_config.match} within {size_config.match_tolerance:.0%})"
        precision = str(runtime.dtype).removeprefix("torch.")
        rows = {
            "run": config.run.dir + (f", going on from step {start_step}" if start_step else ""),
            "model": f"{size}, {parameters}, {config.model.n_heads} heads, KV cache {cache}",
            "budget": budget + note,
            "data": f"{manifest.name}, {manifest.tokens('train'):,} tokens, {entropy}",
            "steps": f"{trainer.horizon} of {trainer.tokens_per_step:,} tokens, {epochs:.2f} epochs",
            "machine": f"{runtime.world_size} x {runtime.device.type}, {precision}, {config.deepspeed.name}",
        }
        self.table("T6", rows)

    def start(self, step: int, horizon: int) -> None:
        self.horizon, self.first_step, self.started = horizon, step, time.monotonic()
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        self.progress = Progress(*columns, console=self.console, disable=not self.live)
        self.task = self.progress.add_task("training", total=horizon, completed=step, status="")
        self.progress.start()

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """After every step; `metrics` is empty where nothing was logged."""
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
