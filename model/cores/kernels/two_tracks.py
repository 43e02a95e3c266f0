"""One hop of `model.cores.sequence_tensor`, both tracks from the same scores, as one operation (core.kernel=triton)."""

import torch
from torch import Tensor

from model.cores.kernels import load_triton


def two_tracks(
    q: Tensor, k: Tensor, values: Tensor, own: Tensor, scale: float, inner: int, size: int, closing: bool
) -> tuple[Tensor, Tensor | None]:
    """Return O_d, and C_d if `closing`, [B, T, H, E] each, along an axis of `size` steps of `inner` positions each.

    q [B, T, H, D], turned, k [B, T, G, D], `values` C_{d-1} and `own` O_{d-1}, whose heads divide H. T need not fill
    the fold. Closed values are right for lines that T fills; nothing reads the others.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, values, own = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, values, own))
    opened, closed, *_ = hop(q, k, values, own, float(scale), [inner, size], closing)
    return opened, closed if closing else None


@torch.library.custom_op("t6::two_tracks", mutates_args=())
def hop(
    q: Tensor, k: Tensor, values: Tensor, own: Tensor, scale: float, axis: list[int], closing: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return load_triton().two_tracks(q, k, values, own, scale, axis, closing)


@hop.register_fake
def _(q, k, values, own, scale, axis, closing):
    opened, lse = q.new_empty(*q.shape[:3], values.size(-1)), q.new_empty(q.shape[:3], dtype=torch.float32)
    closed, closed_lse = (torch.empty_like(x) if closing else x.new_empty(0) for x in (opened, lse))
    return opened, closed, lse, closed_lse


@torch.library.custom_op("t6::two_tracks_backward", mutates_args=())
def hop_backward(
    q: Tensor, k: Tensor, values: Tensor, own: Tensor, results: list[Tensor], d_opened: Tensor, d_closed: Tensor | None,
    scale: float, axis: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return load_triton().two_tracks_backward(q, k, values, own, results, d_opened, d_closed, scale, axis)


@hop_backward.register_fake
def _(q, k, values, own, results, d_opened, d_closed, scale, axis):
    return tuple(x.new_empty(x.shape) for x in (q, q, results[0], results[0]))


def setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.axis, ctx.closing = inputs
    ctx.save_for_backward(*tensors, *output)


def backward(ctx, d_opened, d_closed, *_):
    q, k, values, own, *results = ctx.saved_tensors
    made = hop_backward(q, k, values, own, results, d_opened, d_closed if ctx.closing else None, ctx.scale, ctx.axis)
    summed = (
        d.unflatten(2, (x.size(2), -1)).sum(3) if d.size(2) != x.size(2) else d
        for d, x in zip(made, (q, k, values, own), strict=True)
    )
    return *summed, None, None, None


torch.library.register_autograd("t6::two_tracks", backward, setup_context=setup_context)
