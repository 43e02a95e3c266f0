"""Attention straight from the formulas, slow and differentiable, in any dtype: what fast paths are tested against."""

from collections.abc import Callable
from itertools import product
from math import prod

import torch
from torch import Tensor

from model.attention.tensor_product import Factored
from model.cores.folding import Axis

Turn = Callable[[Tensor, int], Tensor]  # x [N, D] at one coordinate


def factor_attention(factored: Factored, scale: float, starts: Tensor | None = None) -> Tensor:
    """Return attention in factor space [B, T, H, E], by the formulas of `model.cores.kernels.factors`.

    In fp32 (fp64 if the factors are); memory grows with T x H x S.
    """
    q, k, v = factored.q, factored.k, factored.v
    wide = torch.promote_types(q.b.dtype, torch.float32)
    b_q, b_k, b_v = (part.token_factor().to(wide) for part in (q, k, v))
    a_k, a_v = k.a.to(wide), v.a.to(wide)
    batch, n_queries, n_keys, heads = b_q.size(0), b_q.size(1), b_k.size(1), a_k.size(2)
    a_q, rank_q = torch.eye(heads, dtype=wide, device=b_q.device).expand(*b_q.shape[:2], -1, -1), 1
    if q.a is not None:
        a_q, rank_q = q.a.to(wide), q.a.size(-1)

    counts = torch.full((batch,), n_keys, device=b_q.device) if starts is None else starts + n_queries
    keys = torch.arange(n_keys, device=b_q.device)
    held = (keys < counts[:, None])[..., None, None]  # what lies beyond may be anything, NaN included
    a_k, b_k, a_v, b_v = (x.where(held, 0) for x in (a_k, b_k, a_v, b_v))
    last = counts[:, None] - n_queries + torch.arange(n_queries, device=b_q.device)
    seen = keys <= last[..., None]  # [B, T, S]

    shared = torch.einsum("btrd,bskd->btrsk", b_q, b_k)
    logits = torch.einsum("bthr,bshk,btrsk->bths", a_q, a_k, shared) * (scale / (rank_q * a_k.size(-1)))
    weights = logits.masked_fill(~seen[:, :, None], -torch.inf).softmax(-1)
    return torch.einsum("bths,bshu,bsue->bthe", weights, a_v, b_v) / a_v.size(-1)


def coordinates(fold: list[int], position: int) -> tuple[int, ...]:
    """Return (i_1, ..., i_m) of a position: t = i_1 + n_1 (i_2 + n_2 (i_3 + ...))."""
    place = []
    for size in fold:
        position, coordinate = divmod(position, size)
        place.append(coordinate)
    return tuple(place)


def folded_attention(q: Tensor, k: Tensor, v: Tensor, fold: list[int], scale: float, turn: Turn) -> Tensor:
    """Return O_m [T, H, E] for q, k [T, H, D], not yet turned, and v [T, H, E] of one sequence, T <= n_1 ... n_m.

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
    """Return A_1, ..., A_m of the paper's bidirectional form, [H, n_d, n_d] each, which all slices share.

    A_d is the softmax of the product of the mode-d unfoldings of q and k.
    """
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


def kronecker_attention(q: Tensor, k: Tensor, v: Tensor, fold: list[int], scale: float, turn: Turn) -> Tensor:
    """Return (A_m kron ... kron A_1) v, head by head: [T, H, E]."""
    matrices = shared_matrices(q, k, fold, scale, turn)
    heads = []
    for head in range(q.size(1)):
        whole = torch.ones(1, 1, dtype=q.dtype)
        for matrix in matrices:
            whole = torch.kron(matrix[head].contiguous(), whole)
        heads.append(whole @ v[:, head])
    return torch.stack(heads, dim=1)


def shared_hop(axis: Axis, q: Tensor, k: Tensor, values: Tensor, scale: float) -> Tensor:
    """Return values x_d A_d [B, T, H, E], A_d = softmax(Q_d K_d^T): the unfoldings have all other axes as features.

    The paper scales by the square root of the features' number; `scale`, for one vector, takes in the others.
    """
    q, k, values = (x.unflatten(1, (axis.outer, axis.size, axis.inner)) for x in (q, k, values))
    scores = torch.einsum("boixhd,bojxhd->bhij", q, k) * (scale / (axis.outer * axis.inner) ** 0.5)
    return torch.einsum("bhij,bojxhe->boixhe", scores.softmax(-1), values).flatten(1, 3)
