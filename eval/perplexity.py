"""Loss, perplexity and bits per byte over a fixed set of sequences, spread over the ranks."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field
from rich.progress import track
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from configs.errors import ConfigError
from configs.kinds import LONGEST_TEXT, Name
from data.loader import EVAL_KEY, IGNORED, permute
from eval.config import EvalConfig
from eval.loading import LoadedRun
from eval.plots import plain_ticks
from eval.results import Outcome
from eval.texts import Text, TextSource, read_text
from training.plots import new_figure, save_figure
from training.ranks import rank, total, world_size

SHORTEST = 64  # documents up to this length are one group, those up to twice as long the next


@torch.no_grad()
def evaluate(model: Callable, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, int]:
    """Return the mean loss in nats a token and the number of tokens, over the batches of all ranks.

    `model(tokens, targets)` returns the summed loss; targets that are IGNORED don't count.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for tokens, targets in batches:
        targets = targets.to(device)
        sums[0] += model(tokens.to(device), targets).double()
        sums[1] += (targets != IGNORED).sum()
    loss, count = total(sums).tolist()
    return loss / count, int(count)


def perplexity(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Return a loss in a unit that does not depend on the tokenizer."""
    return loss / math.log(2) / bytes_per_token


class PerplexitySuite(TextSource):
    """Loss over a text in windows of `seq_len` tokens, by position in the window and by document length.

    Without a stride each window begins where the one before ends. With one they overlap: each begins `stride` tokens
    after the one before, and only its last `stride` tokens count (all of the first), so that each token counts once.
    """

    name: Name = "perplexity"
    seq_len: int | None = Field(None, ge=1, le=LONGEST_TEXT)  # null: the run's
    stride: int | None = Field(None, ge=1, le=LONGEST_TEXT)

    def run(self, run: LoadedRun, options: EvalConfig) -> Outcome:
        seq_len = self.seq_len or run.context
        if self.stride and self.stride > seq_len:
            raise ConfigError(f"suite.stride={self.stride}: must be at most the windows' length, {seq_len}")
        text = read_text(self, run)
        windows = cut(text, seq_len, self.stride or seq_len)
        if not windows:
            longest = max(len(stream) - 1 for stream in text.streams)
            raise ConfigError(
                f"suite.seq_len={seq_len}: {text.name} has no {seq_len} tokens in a row, at most {longest}"
            )
        if options.limit is not None and options.limit < len(windows):  # spread over all, the same as an EvalLoader's
            windows = [windows[place] for place in permute(np.arange(options.limit), len(windows), EVAL_KEY)]
        by_window, by_position, by_length = measure(run, text, windows, options.batch_size, seq_len)
        loss_sum, count = by_window.sum(0)
        loss = float(loss_sum / count)
        residuals = by_window[:, 0] - loss * by_window[:, 1]
        results = {"loss": loss, "perplexity": perplexity(loss)}
        results |= {"bits_per_byte": bits_per_byte(loss, text.bytes_per_token), "tokens": int(count)}
        curves = {
            "by_position": means(by_position, range(1, seq_len + 1)),
            "by_document_length": means(by_length, [SHORTEST * 2**n for n in range(len(by_length))]),
        }
        title = f"{run.config.run.name} on {text.name}, step {run.step}"
        return Outcome(
            results,
            {"loss": float(np.sqrt((residuals**2).sum()) / count)},
            details={"text": text.name, "seq_len": seq_len, "stride": self.stride, "curves": curves},
            files={".png": partial(plot, curves, seq_len, title)},
        )


class Window(NamedTuple):
    """A model sees tokens [begin, end) of a stream, and predicts tokens begin + 1 to end; those after `known` count."""

    stream: int
    begin: int
    end: int
    known: int


def cut(text: Text, seq_len: int, stride: int) -> list[Window]:
    """Return windows of at most `seq_len` tokens, `stride` after each other, in which every token counts once."""
    overlap = seq_len - stride
    windows = (
        Window(number, begin, min(begin + seq_len, len(stream) - 1), begin + (overlap if begin else 0))
        for number, stream in enumerate(text.streams)
        for begin in range(0, max(1, len(stream) - 1 - overlap), stride)
    )
    whole = text.whole_windows and not overlap  # as in training's validation
    return [one for one in windows if one.end > one.known and (not whole or one.end - one.begin == seq_len)]


def share_out(windows: list[Window], batch_size: int) -> list[list[int]]:
    """Return the numbers of this rank's windows in batches, like lengths together.

    All ranks get the same number of batches; those of ranks that have no more windows are empty.
    """
    order = sorted(range(len(windows)), key=lambda n: windows[n].begin - windows[n].end)
    mine, count = order[rank() :: world_size()], -(-len(order) // (world_size() * batch_size))
    return [mine[start : start + batch_size] for start in range(0, count * batch_size, batch_size)]


@torch.no_grad()
def measure(run: LoadedRun, text: Text, windows: list[Window], batch_size: int, seq_len: int) -> list[np.ndarray]:
    """Return (sum of losses, number of tokens) of each window, position, and group of document lengths: float64 [n, 2]
    each, over all ranks, which make the same number of forward passes."""
    groups, device = 1 + max(int(group_of(np.array(len(stream)))) for stream in text.streams), run.runtime.device
    by_window, by_position, by_length = (np.zeros((n, 2)) for n in (len(windows), seq_len, groups))
    batches = share_out(windows, batch_size)
    for numbers in track(batches, description="perplexity", transient=True, disable=not run.runtime.is_main):
        chosen = [windows[n] for n in numbers] or windows[:1]  # a rank that has no more windows takes part all the same
        seen = [torch.from_numpy(text.streams[n][begin : end + 1].astype(np.int64)) for n, begin, end, _ in chosen]
        tokens = pad_sequence([one[:-1] for one in seen], batch_first=True).to(device)
        targets = pad_sequence([one[1:] for one in seen], batch_first=True, padding_value=IGNORED).to(device)
        rows = run.model(tokens, targets, reduction="none").double().cpu().numpy()
        for number, row in zip(numbers, rows, strict=False):
            stream, begin, end, known = windows[number]
            losses = row[known - begin : end - begin]
            by_window[number] += losses.sum(), len(losses)
            by_position[known - begin : end - begin] += np.stack((losses, np.ones_like(losses)), axis=1)
            group = group_of(text.document_lengths(stream, known + 1, end + 1))
            by_length[:, 0] += np.bincount(group, losses, minlength=groups)
            by_length[:, 1] += np.bincount(group, minlength=groups)
    return [total(torch.from_numpy(sums).to(device)).cpu().numpy() for sums in (by_window, by_position, by_length)]


def group_of(lengths: np.ndarray) -> np.ndarray:
    """Return the group of a document's length: 0 up to SHORTEST tokens, 1 up to twice as many, and so on."""
    return np.ceil(np.log2(np.maximum(lengths, SHORTEST) / SHORTEST)).astype(np.int64)


def means(sums: np.ndarray, labels: Iterable[int]) -> dict[str, list]:
    """Return the labels, mean losses and counts of whatever has any tokens."""
    filled = sums[:, 1] > 0
    losses, counts = sums[filled].T
    up_to = np.array(labels)[filled]
    return {"up_to": up_to.tolist(), "loss": (losses / counts).tolist(), "tokens": counts.astype(int).tolist()}


def plot(curves: dict, seq_len: int, title: str, path: Path) -> None:
    """Draw loss against the position in the context, and against the document's length."""
    figure, (left, right) = new_figure(columns=2)
    by_position, by_length = curves["by_position"], curves["by_document_length"]
    positions, losses, counts = (np.array(by_position[key]) for key in ("up_to", "loss", "tokens"))
    (raw,) = left.plot(positions, losses, alpha=0.3, linewidth=0.8)
    edges = np.unique(np.geomspace(1, seq_len + 1, 17).astype(int))
    inside = [found for low, high in pairwise(edges) if (found := (positions >= low) & (positions < high)).any()]
    centres, averages = ([np.average(values[i], weights=counts[i]) for i in inside] for values in (positions, losses))
    left.plot(centres, averages, color=raw.get_color(), marker="o", markersize=4)
    left.set(xscale="log", xlabel="position in the context", ylabel="loss (nats a token)", title=title)
    plain_ticks(left.xaxis, [4**n for n in range(12) if 4**n <= seq_len])
    right.plot(by_length["up_to"], by_length["loss"], marker="o")
    right.set(xscale="log", xlabel="length of the document, at most (and number of tokens scored)", title="by document")
    labels = [f"{x:,}\n({count:,})" for x, count in zip(by_length["up_to"], by_length["tokens"], strict=True)]
    right.set_xticks(by_length["up_to"], labels, fontsize=8)
    right.minorticks_off()
    save_figure(figure, path)
