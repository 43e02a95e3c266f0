"""Log-likelihoods of continuations: as few and as full forward passes as the requests allow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import ranks
from model.transformer import Transformer

VOCABULARY_ROWS = 2048  # positions whose logits are normalised at a time


@dataclass
class Row:
    """One sequence of a forward pass, and the requests that are read from it: (number, first position, targets)."""

    tokens: list[int]
    requests: list[tuple[int, int, list[int]]] = field(default_factory=list)


def share_rows(requests: list[tuple[list[int], list[int]]], max_length: int) -> list[Row]:
    """Rows, longest first, from which every (context, continuation) can be read.

    What the model sees of a request is its last `max_length` tokens but one. Requests that begin alike share a row: the
    one whose input begins with the others' holds them, since later tokens change no earlier logits. So the answers A to
    D of a question cost one row, and so does a continuation of another's beginning.
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
    """Rows in batches of at most `budget` tokens, padding included, and at least one row each."""
    start = 0
    while start < len(rows):
        size = max(1, budget // len(rows[start].tokens))
        yield rows[start : start + size]
        start += size


@contextmanager
def head_at(model: Transformer, rows: Tensor, columns: Tensor):
    """The model's logits are those of the positions (rows[i], columns[i]) alone: [N, V] instead of [B, T, V]."""
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
    """(log p(continuation | context) in nats, whether greedy decoding would give it) for each (context, continuation).

    Batches hold `batch_size` sequences of `max_length`, or as many more as are shorter. Every rank gives all requests
    and gets all answers; they share the rows, and make equally many forward passes, as ZeRO-3 wants it. ValueError for
    an empty part, or a continuation longer than `max_length`.
    """
    rank, world_size = ranks.place()
    batches = list(batched(share_rows(requests, max_length)[rank::world_size], batch_size * max_length))
    idle = [[Row([0], [])]] * (ranks.largest(len(batches), device) - len(batches))
    answers = torch.zeros(len(requests), 2, dtype=torch.float64)  # log p, and 1 where it is greedy
    for batch in progress(batches + idle):
        tokens = torch.zeros(len(batch), max(len(row.tokens) for row in batch), dtype=torch.int64)
        for number, row in enumerate(batch):
            tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        spans = [(n, request) for n, row in enumerate(batch) for request in row.requests]
        places = [(n, first + step) for n, (_, first, targets) in spans for step in range(len(targets))] or [(0, 0)]
        rows, columns = torch.tensor(places, device=device).T
        with head_at(model, rows, columns):
            logits = model(tokens.to(device))
        targets = torch.tensor([token for _, request in spans for token in request[2]] or [0], device=device)
        log_p, greedy = read(logits, targets)
        start = 0
        for _, (number, _, continuation) in spans:
            end = start + len(continuation)
            answers[number] = torch.tensor([sum(log_p[start:end]), all(greedy[start:end])])
            start = end
    return [(log_p, bool(greedy)) for log_p, greedy in ranks.total(answers.to(device)).tolist()]


def read(logits: Tensor, targets: Tensor) -> tuple[list[float], list[bool]]:
    """(the log-probability of each target, whether it is the likeliest token) for logits [N, V] and targets [N]."""
    log_p, greedy = [], []
    for some, wanted in zip(logits.split(VOCABULARY_ROWS), targets.split(VOCABULARY_ROWS), strict=True):
        some = some.float()
        log_p += (-F.cross_entropy(some, wanted, reduction="none")).tolist()
        greedy += (some.argmax(-1) == wanted).tolist()
    return log_p, greedy
