"""Log-likelihoods of continuations, in as few and as full forward passes as the requests allow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from model.transformer import Transformer
from training import ranks

VOCABULARY_ROWS = 2048  # positions whose logits are normalised at a time


@dataclass
class Row:
    """One sequence of a forward pass, and the requests that are read from it: (number, first position, targets)."""

    tokens: list[int]
    requests: list[tuple[int, int, list[int]]] = field(default_factory=list)


def share_rows(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """Return rows, longest first, from which every (context, continuation) can be read.

    What the model sees of a request is its last `max_length` tokens but one. Requests that begin alike share a row: the
    one whose input begins with the others' holds them, since later tokens change no earlier logits. So the answers A to
    D of a question cost one row, and so does a continuation of another's beginning. ValueError for an empty part, or a
    continuation longer than `max_length`.
    """
    inputs = []
    for number, (context, continuation) in enumerate(requests):
        if not context or not 1 <= len(continuation) <= max_length:
            raise ValueError(
                f"a request needs a context and 1 to {max_length} tokens after it, not {len(context)} and "
                f"{len(continuation)}"
            )
        seen = (context + continuation)[-(max_length + 1) : -1]
        inputs.append((seen, number, len(seen) - len(continuation), continuation))
    rows: list[Row] = []
    for seen, number, first, continuation in sorted(inputs, key=lambda item: item[0], reverse=True):
        # In descending order an input comes right after those that begin with it.
        if not rows or rows[-1].tokens[: len(seen)] != seen:
            rows.append(Row(seen))
        rows[-1].requests.append((number, first, continuation))
    return sorted(rows, key=lambda row: -len(row.tokens))


def batched(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Yield rows in batches of at most `budget` tokens, padding included, and at least one row each."""
    start = 0
    while start < len(rows):
        count = max(1, budget // len(rows[start].tokens))
        yield rows[start : start + count]
        start += count


@contextmanager
def head_at(model: Transformer, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Make the model's logits those of the positions (rows[i], columns[i]) alone: [N, V] instead of [B, T, V]."""
    handle = model.head.register_forward_pre_hook(lambda module, inputs: (inputs[0][rows, columns],))
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def log_likelihoods(
    model: Transformer,
    requests: list[tuple[list[int], list[int]]],
    max_length: int,
    batch_size: int,
    device: torch.device,
    progress: Callable[[list], Iterator] = iter,
) -> list[tuple[float, bool]]:
    """Return (log p(continuation | context) in nats, whether greedy decoding would give it) of each request.

    A request is (context, continuation). Batches hold `batch_size` sequences of `max_length`, or more if they are
    shorter. Every rank gives all requests and gets all answers; they share the rows, and make equally many forward
    passes, as ZeRO-3 needs it.
    """
    rows = share_rows(requests, max_length)[ranks.rank() :: ranks.world_size()]
    batches = list(batched(rows, batch_size * max_length))
    idle = [[Row([0])]] * (max(ranks.gather(len(batches))) - len(batches))
    answers = torch.zeros(len(requests), 2, dtype=torch.float64)  # log p, and 1 if it is greedy
    for batch in progress(batches + idle):
        spans = [(row, request) for row, shared in enumerate(batch) for request in shared.requests]
        logits = logits_at(model, batch, spans, device)
        targets = torch.tensor([token for _, (_, _, wanted) in spans for token in wanted], dtype=torch.int64)
        log_p, greedy = read(logits, targets.to(device))
        start = 0
        for _, (number, _, wanted) in spans:
            end = start + len(wanted)
            answers[number] = torch.tensor([sum(log_p[start:end]), all(greedy[start:end])])
            start = end
    return [(log_p, bool(greedy)) for log_p, greedy in ranks.total(answers.to(device)).tolist()]


def logits_at(model: Transformer, batch: list[Row], spans: list[tuple[int, tuple]], device: torch.device) -> Tensor:
    """Return the logits [N, V] at the N positions of the spans (row, (number, first position, targets))."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in batch], batch_first=True)
    positions = [(row, first + step) for row, (_, first, targets) in spans for step in range(len(targets))]
    rows, columns = torch.tensor(positions, dtype=torch.int64, device=device).view(-1, 2).T
    with head_at(model, rows, columns):
        return model.logits(tokens.to(device))


def read(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """Return each target's log-probability, and whether it is the most likely token; logits [N, V], targets [N]."""
    log_p, greedy = [], []
    for part, wanted in zip(logits.split(VOCABULARY_ROWS), targets.split(VOCABULARY_ROWS), strict=True):
        part = part.float()
        log_p += (-F.cross_entropy(part, wanted, reduction="none")).tolist()
        greedy += (part.argmax(-1) == wanted).tolist()
    return log_p, greedy
