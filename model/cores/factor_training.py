"""Factor-space attention with a gradient for every factor, for the ranks at which it takes fewer operations.

The products b_q b_k are made once for all heads, so that at R_k = R_v = 1 a head's logits take R_q multiply-adds a key
and not D (arXiv 2501.06425, A.4). Queries go in blocks, each against all the keys it sees; the backward pass makes the
block's weights again, so nothing larger than a block is kept. The same in PyTorch for every device.
"""

import torch
from torch import Tensor

BLOCK_NUMBERS = 2**20  # logits of one block: what is made of them stays in the cache of the processor


class FactorSpaceAttention(torch.autograd.Function):
    """a_q [B, T, H, Rq], b_q [B, T, Rq, D], a_k [B, S, H, Rk], b_k [B, S, Rk, D], a_v [B, S, H, Rv], b_v [B, S, Rv, E]
    to [B, T, H, E]; the queries are the last T of the S positions. `scale` includes 1 / (Rq Rk), and the output 1 / Rv.
    """

    @staticmethod
    def forward(ctx, a_q, b_q, a_k, b_k, a_v, b_v, scale: float, causal: bool) -> Tensor:
        ctx.save_for_backward(a_q, b_q, a_k, b_k, a_v, b_v)
        ctx.scale, ctx.causal = scale, causal
        out = a_q.new_empty(*a_q.shape[:3], b_v.size(-1))
        for row in range(a_q.size(0)):
            keys = Keys(a_k[row], b_k[row], a_v[row], b_v[row])
            for t in query_blocks(a_q.size(1), a_q.size(2) * a_k.size(1)):
                block = Block(a_q[row, t], b_q[row, t], keys, t, a_q.size(1), scale, causal)
                out[row, t] = block.attend()
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        a_q, b_q, a_k, b_k, a_v, b_v = ctx.saved_tensors
        grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in ctx.saved_tensors]
        for row in range(a_q.size(0)):
            keys = Keys(a_k[row], b_k[row], a_v[row], b_v[row])
            for t in query_blocks(a_q.size(1), a_q.size(2) * a_k.size(1)):
                block = Block(a_q[row, t], b_q[row, t], keys, t, a_q.size(1), ctx.scale, ctx.causal)
                block.add_gradients(grad[row, t], *(g[row, t] for g in grads[:2]), *(g[row] for g in grads[2:]))
        return *grads, None, None


def query_blocks(n_queries: int, numbers: int) -> list[slice]:
    size = max(1, BLOCK_NUMBERS // numbers)
    return [slice(t, min(t + size, n_queries)) for t in range(0, n_queries, size)]


class Keys:
    """One sequence's factors, head factors as [R, H, S] and token factors as [R, S, D]."""

    def __init__(self, a_k: Tensor, b_k: Tensor, a_v: Tensor, b_v: Tensor):
        self.a_k, self.a_v = (a.permute(2, 1, 0).contiguous() for a in (a_k, a_v))
        self.b_k, self.b_v = (b.transpose(0, 1) for b in (b_k, b_v))


class Block:
    """The queries `t` of one sequence against the S' keys they see: weights [T, H, S'] and what they are made of."""

    def __init__(self, a_q, b_q, keys: Keys, t: slice, n_queries: int, scale: float, causal: bool):
        n_keys = keys.b_k.size(1)
        seen = n_keys - n_queries + t.stop if causal else n_keys
        self.a_q, self.b_q = a_q * scale, b_q.flatten(0, 1)
        self.scale, self.seen = scale, seen
        self.a_k, self.a_v = keys.a_k[..., :seen], keys.a_v[..., :seen]
        self.b_k, self.b_v = keys.b_k[:, :seen], keys.b_v[:, :seen]
        self.shared = [(self.b_q @ b.T).unflatten(0, a_q.shape[::2]) for b in self.b_k]  # of all heads: [T, Rq, S']
        self.by_rank = [torch.bmm(self.a_q, shared) for shared in self.shared]  # [T, H, S']
        logits = self.by_rank[0] * self.a_k[0]
        for product, a in zip(self.by_rank[1:], self.a_k[1:], strict=True):
            logits.addcmul_(product, a)
        size = t.stop - t.start
        if causal and size > 1:
            future = torch.ones(size, size, dtype=torch.bool, device=logits.device).triu(1)
            logits[..., -size:].masked_fill_(future[:, None], -torch.inf)
        self.weights = logits.softmax(-1)

    def attend(self) -> Tensor:
        out = 0
        for a, b in zip(self.a_v, self.b_v, strict=True):
            out = out + (self.weights * a).flatten(0, 1) @ b
        return out.div_(len(self.a_v)).view(*self.weights.shape[:2], -1)

    def add_gradients(self, grad, da_q, db_q, da_k, db_k, da_v, db_v) -> None:
        """Add to the gradients of this block's queries and of all keys, given that of its output [T, H, E]."""
        grad = grad.flatten(0, 1) / len(self.a_v)
        d_weights = None
        for r, (a, b) in enumerate(zip(self.a_v, self.b_v, strict=True)):
            meets = (grad @ b.T).view_as(self.weights)
            da_v[: self.seen, :, r] += torch.einsum("ths,ths->sh", self.weights, meets)
            db_v[: self.seen, r] += (self.weights * a).flatten(0, 1).T @ grad
            meets *= a
            d_weights = meets if d_weights is None else d_weights.add_(meets)
        d_logits = torch._softmax_backward_data(d_weights, self.weights, -1, self.weights.dtype)
        for r, (a, b) in enumerate(zip(self.a_k, self.b_k, strict=True)):
            da_k[: self.seen, :, r] += torch.einsum("ths,ths->sh", d_logits, self.by_rank[r])
            d_product = d_logits * a
            da_q += torch.bmm(d_product, self.shared[r].mT) * self.scale
            d_shared = torch.bmm(self.a_q.mT, d_product).flatten(0, 1)
            db_q += (d_shared @ b).view_as(db_q)
            db_k[: self.seen, r] += d_shared.T @ self.b_q
