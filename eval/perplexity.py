"""Loss, perplexity and bits per byte over a fixed set of sequences, spread over the ranks."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

IGNORED = -100  # targets that pad a batch: cross_entropy's default ignore_index


@torch.no_grad()
def evaluate(model: Callable, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device) -> tuple[float, int]:
    """Mean loss in nats a token and the number of tokens, over the batches of all ranks.

    `model(tokens, targets)` returns the summed loss; targets that are -100 don't count.
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
