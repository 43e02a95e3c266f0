"""Log-likelihoods of continuations, in as few and as full forward passes as the requests allow."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

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
            lengths = f"{len(context)} and {len(continuation)}"
            raise ValueError(f"a request needs a context and 1 to {max_length} tokens after it, not {lengths}")
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
    answers = torch.zeros(2, len(requests), dtype=torch.float64, device=device)  # log p; tokens that are not greedy
    for batch in progress(batches + idle):
        wanted = [
            (row, first + step, target, number)
            for row, shared in enumerate(batch)
            for number, first, continuation in shared.requests
            for step, target in enumerate(continuation)
        ]
        rows, columns, targets, numbers = torch.tensor(wanted, dtype=torch.int64, device=device).view(-1, 4).T
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.tokens) for row in batch], batch_first=True)
        with model.head.register_forward_pre_hook(lambda _, inputs, places=(rows, columns): (inputs[0][places],)):
            logits = model.logits(tokens.to(device))  # [N, V] of what is wanted instead of [B, T, V]
        parts = (values.split(VOCABULARY_ROWS) for values in (logits, targets, numbers))
        for part, target, number in zip(*parts, strict=True):
            part = part.float()
            answers[0].index_add_(0, number, -F.cross_entropy(part, target, reduction="none").double())
            answers[1].index_add_(0, number, (part.argmax(-1) != target).double())
    return [(log_p, others == 0) for log_p, others in ranks.total(answers).T.tolist()]
