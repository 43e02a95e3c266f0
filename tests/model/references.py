"""Attention over a folded sequence straight from the formulas: loops over positions, nothing shared, nothing skipped.

What `model.cores.sequence_tensor` is tested against. Slow; any dtype; differentiable.
"""

from collections.abc import Callable
from itertools import product
from math import prod

import torch
from torch import Tensor

Turn = Callable[[Tensor, int], Tensor]  # x [N, D] at one coordinate


def coordinates(fold: list[int], position: int) -> tuple[int, ...]:
    """(i_1, ..., i_m) of a position: t = i_1 + n_1 (i_2 + n_2 (i_3 + ...))."""
    place = []
    for size in fold:
        position, coordinate = divmod(position, size)
        place.append(coordinate)
    return tuple(place)


def causal(q: Tensor, k: Tensor, v: Tensor, fold: list[int], scale: float, turn: Turn) -> Tensor:
    """O_m [T, H, E] for q, k [T, H, D], not yet turned, and v [T, H, E] of one sequence, T <= n_1 ... n_m.

    A block that the sequence ends in is nobody's past, so closed values of tokens that are not there are never read.
    """
    places = [coordinates(fold, t) for t in range(q.size(0))]
    index = {place: t for t, place in enumerate(places)}
    closed = opened = list(v)
    for axis, size in enumerate(fold):
        turned_q = [turn(x, place[axis]) for x, place in zip(q, places, strict=True)]
        turned_k = [turn(x, place[axis]) for x, place in zip(k, places, strict=True)]
        next_closed, next_open = [], []
        for t, place in enumerate(places):
            line = [index.get((*place[:axis], j, *place[axis + 1 :])) for j in range(size)]
            line = [j for j in line if j is not None]
            scores = torch.stack([(turned_q[t] * turned_k[j]).sum(-1) * scale for j in line])  # [n, H]
            past = line.index(t)
            weights = scores.softmax(0)
            next_closed.append(sum(w[:, None] * closed[j] for w, j in zip(weights, line, strict=True)))
            weights = scores[: past + 1].softmax(0)
            own = weights[past][:, None] * opened[t]
            next_open.append(
                own + sum(w[:, None] * closed[j] for w, j in zip(weights[:past], line[:past], strict=True))
            )
        closed, opened = next_closed, next_open
    return torch.stack(opened)


def shared_matrices(q: Tensor, k: Tensor, fold: list[int], scale: float, turn: Turn) -> list[Tensor]:
    """A_1, ..., A_m of the paper, [H, n_d, n_d] each: softmax of the product of the mode-d unfoldings of q and k."""
    matrices = []
    for axis, size in enumerate(fold):
        others = prod(fold) // size
        scores = [[0.0] * size for _ in range(size)]
        for rest in product(*(range(n) for d, n in enumerate(fold) if d != axis)):
            for i, j in product(range(size), repeat=2):
                row, column = ([*rest[:axis], x, *rest[axis:]] for x in (i, j))
                a, b = (sum(x * prod(fold[:d]) for d, x in enumerate(place)) for place in (row, column))
                scores[i][j] = scores[i][j] + (turn(q[a], i) * turn(k[b], j)).sum(-1) * scale / others**0.5
        matrices.append(torch.stack([torch.stack(line) for line in scores]).permute(2, 0, 1).softmax(-1))
    return matrices


def shared(q: Tensor, k: Tensor, v: Tensor, fold: list[int], scale: float, turn: Turn) -> Tensor:
    """(A_m kron ... kron A_1) v, head by head: [T, H, E]."""
    matrices = shared_matrices(q, k, fold, scale, turn)
    heads = []
    for head in range(q.size(1)):
        whole = torch.ones(1, 1, dtype=q.dtype)
        for matrix in matrices:
            whole = torch.kron(matrix[head].contiguous(), whole)
        heads.append(whole @ v[:, head])
    return torch.stack(heads, dim=1)
