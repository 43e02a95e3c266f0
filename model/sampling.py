"""From logits to a token: the usual filters, in the order of Hugging Face transformers, and a draw by seed."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The filters, in the order in which they are applied; null (or 1) leaves one out."""

    repetition_penalty: float = 1.0  # divides positive logits of tokens seen before, multiplies negative ones
    temperature: float = 1.0  # 0: always the most likely token
    top_k: int | None = None  # keep the k most likely tokens
    top_p: float | None = None  # keep the most likely tokens that together have this probability
    min_p: float | None = None  # keep tokens with at least this share of the highest probability

    def filter(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return logits [B, V], -inf for what is not to be drawn; `seen` [B, V] is true for a row's tokens so far."""
        if self.repetition_penalty != 1:
            punished = torch.where(logits < 0, logits * self.repetition_penalty, logits / self.repetition_penalty)
            logits = torch.where(seen, punished, logits)
        if self.temperature == 0:
            return logits
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.size(-1))).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ascending, order = logits.sort(dim=-1)
            drop = ascending.softmax(-1).cumsum(-1) <= 1 - self.top_p
            drop[:, -1] = False
            logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
        if self.min_p is not None:
            probabilities = logits.softmax(-1)
            least = self.min_p * probabilities.amax(-1, keepdim=True)
            logits = logits.masked_fill(probabilities < least, -torch.inf)
        return logits

    def choose(self, logits: Tensor, uniforms: Tensor, seen: Tensor | None = None) -> Tensor:
        """Return a token [B] for each row of logits [B, V], drawn by `uniforms` [B] from [0, 1)."""
        logits = self.filter(logits.float(), seen)
        if self.temperature == 0:
            return logits.argmax(-1)
        # in fp64, the first place that lies above the point: a token of probability 0 is never drawn
        cumulated = logits.double().softmax(-1).cumsum(-1)
        points = uniforms[:, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, points, right=True)[:, 0].clamp_max(logits.size(-1) - 1)


GREEDY = Sampling(temperature=0)


def draws(seeds: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return uniform numbers [count, B], a column for each seed, made on the CPU: the same on every device."""
    columns = [torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    return torch.stack(columns, dim=1).to(device)
