"""Loss, perplexity and bits per byte over a fixed set of sequences, spread over the ranks."""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from configs.errors import ConfigError
from configs.schema_eval import EvalConfig
from data.loader import IGNORED
from eval import ranks
from eval.loading import LoadedRun
from eval.plots import new_figure, plain_ticks, save_figure
from eval.results import Outcome
from eval.texts import Text, Windows, read_text, slide, some

SHORTEST = 64  # documents up to this length are one group, those up to twice as long the next


@torch.no_grad()
def evaluate(model: Callable, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, int]:
    """Mean loss in nats a token and the number of tokens, over the batches of all ranks.

    `model(tokens, targets)` returns the summed loss; targets that are IGNORED don't count.
    """
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, targets in batches:
        targets = targets.to(device)
        totals[0] += model(tokens.to(device), targets).double()
        totals[1] += (targets != IGNORED).sum()
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    return (totals[0] / totals[1]).item(), int(totals[1])


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Loss in a unit that does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


# --- the suite: any text, in windows, by position and by document ----------------------------------------------------


def perplexity_suite(run: LoadedRun, config: EvalConfig) -> Outcome:
    """Loss over the windows of a text, by position in the context and by document length."""
    suite = config.suite
    seq_len = suite.seq_len or run.context
    if suite.stride and suite.stride > seq_len:
        raise ConfigError(f"suite.stride={suite.stride}: must be at most the windows' length, {seq_len}")
    text = read_text(suite, run)
    windows = slide(text, seq_len, suite.stride, whole=text.starts is not None and suite.stride is None)
    if not len(windows):
        longest = max(len(stream) - 1 for stream in text.streams)
        raise ConfigError(f"suite.seq_len={seq_len}: {text.name} has no {seq_len} tokens in a row, at most {longest}")
    windows = some(windows, config.limit)
    sums = measure(run, text, windows, config.batch_size, seq_len)
    loss = sums["windows"][:, 0].sum() / (count := sums["windows"][:, 1].sum())
    residuals = sums["windows"][:, 0] - loss * sums["windows"][:, 1]
    results = {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": bits_per_byte(loss, text.bytes_per_token),
        "tokens": int(count),
    }
    if text.unigram_entropy is not None:
        results["unigram_entropy"] = text.unigram_entropy
    curves = {
        "by_position": means(sums["positions"], range(1, seq_len + 1)),
        "by_document_length": means(sums["lengths"], [SHORTEST * 2**n for n in range(len(sums["lengths"]))]),
    }
    settings = {"text": text.name, "seq_len": seq_len, "stride": suite.stride}
    title = f"{run.config.run.name} on {text.name}, step {run.step}"
    return Outcome(
        {key: float(value) if isinstance(value, np.floating) else value for key, value in results.items()},
        {"loss": float(np.sqrt((residuals**2).sum()) / count)},
        details=settings | {"curves": curves},
        files={".png": lambda path: plot(curves, seq_len, title, path)},
    )


def measure(run: LoadedRun, text: Text, windows: Windows, batch_size: int, seq_len: int) -> dict[str, np.ndarray]:
    """(sum of losses, number of tokens) of each window, position and group of document lengths: float64 [n, 2] each."""
    groups = 1 + max(int(group_of(np.array(len(stream)))) for stream in text.streams)
    sums = {
        "windows": np.zeros((len(windows), 2)),
        "positions": np.zeros((seq_len, 2)),
        "lengths": np.zeros((groups, 2)),
    }
    losses = token_losses(run, text, windows, batch_size)
    for number, stream, first, begin, values in losses:
        sums["windows"][number] += values.sum(), len(values)
        places = slice(first - begin - 1, first - begin - 1 + len(values))
        sums["positions"][places] += np.stack((values, np.ones_like(values)), axis=1)
        which = group_of(text.document_lengths(stream, first, first + len(values)))
        for column, weights in enumerate((values, None)):
            sums["lengths"][:, column] += np.bincount(which, weights, minlength=groups)
    device = run.runtime.device
    return {key: ranks.total(torch.from_numpy(value).to(device)).cpu().numpy() for key, value in sums.items()}


@torch.no_grad()
def token_losses(
    run: LoadedRun, text: Text, windows: Windows, batch_size: int
) -> Iterator[tuple[int, int, int, int, np.ndarray]]:
    """For each of this rank's windows: its number, stream, the first token that counts, where the window begins, and
    the losses [n] of the tokens that count. All ranks make the same number of forward passes."""
    rank, world_size, device = run.runtime.rank, run.runtime.world_size, run.runtime.device
    order = np.argsort(-(windows.end - windows.begin), kind="stable")  # alike lengths together
    mine, rounds = order[rank::world_size], -(-len(order) // (world_size * batch_size))
    steps = range(0, rounds * batch_size, batch_size)
    for start in track(steps, description="perplexity", transient=True, disable=rank != 0):
        numbers = mine[start : start + batch_size]
        padded = list(numbers) if len(numbers) else [order[0]]
        length = max(int(windows.end[n] - windows.begin[n]) for n in padded)
        tokens = torch.zeros(len(padded), length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        for row, n in enumerate(padded):
            begin, end, scored = int(windows.begin[n]), int(windows.end[n]), int(windows.scored[n])
            seen = torch.from_numpy(text.streams[windows.stream[n]][begin : end + 1].astype(np.int64))
            tokens[row, : end - begin] = seen[:-1]
            targets[row, scored - begin - 1 : end - begin] = seen[scored - begin :]
        losses = run.model(tokens.to(device), targets.to(device), reduction="none").double().cpu().numpy()
        for row, n in enumerate(numbers):
            begin, end, scored = int(windows.begin[n]), int(windows.end[n]), int(windows.scored[n])
            yield int(n), int(windows.stream[n]), scored, begin, losses[row, scored - begin - 1 : end - begin]


def group_of(lengths: np.ndarray) -> np.ndarray:
    """The group of a document's length: 0 up to SHORTEST tokens, 1 up to twice as many, and so on."""
    return np.ceil(np.log2(np.maximum(lengths, SHORTEST) / SHORTEST)).astype(np.int64)


def means(sums: np.ndarray, labels: Iterable[int]) -> dict[str, list]:
    """The mean losses of what has any tokens, beside their labels and counts."""
    there = [(label, total / count, int(count)) for label, (total, count) in zip(labels, sums, strict=True) if count]
    return {key: [row[place] for row in there] for place, key in enumerate(("up_to", "loss", "tokens"))}


def plot(curves: dict, seq_len: int, title: str, path: Path) -> None:
    """Loss against the position in the context, and against the document's length."""
    figure, (left, right) = new_figure(columns=2)
    by_position, by_length = curves["by_position"], curves["by_document_length"]
    places, losses = np.array(by_position["up_to"]), np.array(by_position["loss"])
    left.plot(places, losses, alpha=0.3, linewidth=0.8)
    edges = np.unique(np.geomspace(1, seq_len + 1, 17).astype(int))
    weights = np.array(by_position["tokens"])
    inside = [(places >= low) & (places < high) for low, high in pairwise(edges)]
    points = [(np.average(places[i], weights=weights[i]), np.average(losses[i], weights=weights[i]))
              for i in inside if i.any()]  # fmt: skip
    left.plot(*zip(*points, strict=True), marker="o", markersize=4)
    left.set(xscale="log", xlabel="position in the context", ylabel="loss (nats a token)", title=title)
    plain_ticks(left.xaxis, [4**n for n in range(12) if 4**n <= seq_len])
    right.plot(by_length["up_to"], by_length["loss"], marker="o")
    for x, y, count in zip(by_length["up_to"], by_length["loss"], by_length["tokens"], strict=True):
        right.annotate(f"{count:,}", (x, y), textcoords="offset points", xytext=(0, 6), fontsize=7, ha="center")
    right.set(xscale="log", xlabel="length of the document, up to (tokens)", title="by document (tokens scored)")
    plain_ticks(right.xaxis, by_length["up_to"])
    save_figure(figure, path)
