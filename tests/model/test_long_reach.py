"""What lies further back than a window: a folded sequence finds it, a sliding window of the fold's block cannot."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from model.transformer import Transformer
from tests.model.helpers import small_network

BLOCK, LENGTH, VALUES = 4, 16, 6
ASK = 2 * VALUES  # tokens below VALUES are what is looked for, those from there to ASK are noise
CORES = {"sequence_tensor": f"core.fold=[{BLOCK},{LENGTH // BLOCK}]", "sliding_window": f"core.window={BLOCK}"}


def passkey(rows: int):
    """Noise with one value somewhere in its first half, and the question at the end: (tokens, targets) [B, T]."""
    tokens = torch.randint(VALUES, ASK, (rows, LENGTH))
    value = torch.randint(0, VALUES, (rows, 1))
    tokens.scatter_(1, torch.randint(0, LENGTH // 2, (rows, 1)), value)
    tokens[:, -1] = ASK
    targets = torch.full_like(tokens, -100)
    targets[:, -1:] = value
    return tokens, targets


def copying(rows: int):
    """The first half once more: each token of the second is the one half a sequence before."""
    half = torch.randint(0, VALUES, (rows, LENGTH // 2))
    tokens = torch.cat((half, half, half[:, :1]), dim=1)
    targets = tokens[:, 1:].clone()
    targets[:, : LENGTH // 2 - 1] = -100
    return tokens[:, :-1], targets


def accuracy(task, core: str, steps: int) -> float:
    """The share of targets that are the most likely token, on fresh data, after `steps` of training."""
    torch.manual_seed(0)
    network = replace(small_network("mha", f"core={core}", CORES[core]), vocab_size=ASK + 1)
    net = Transformer(network)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(steps):
        tokens, targets = task(24)
        loss = F.cross_entropy(net.logits(tokens).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens, targets = task(128)
        right = net.logits(tokens).argmax(-1) == targets
    return right[targets >= 0].float().mean().item()


@pytest.mark.parametrize(("task", "steps", "enough"), [(passkey, 80, 0.9), (copying, 150, 0.5)])
def test_a_fold_reaches_what_a_window_cannot(task, steps, enough):
    assert accuracy(task, "sequence_tensor", steps) > enough
    assert accuracy(task, "sliding_window", steps) < 0.3  # a guess is right once in 6
