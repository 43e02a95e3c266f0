"""Decoding kernels of other packages: FlashAttention, FlashInfer and FlashMLA, as far as they are installed."""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch

from model.attention.base import Dense
from model.attention.latent import Absorbed

PAGE = 64  # tokens in a page of FlashMLA's cache
LATENT = 576  # numbers per token, the only size that FlashMLA has: DeepSeek's 512 + 64


def installed(name: str) -> ModuleType | None:
    try:
        return import_module(name)
    except ImportError:
        return None


def installed_kernels(qkv: Dense | Absorbed) -> dict[str, Callable]:
    """Return, by name, the kernels that take such queries, keys and values; each is called as a core's `attend`."""
    found = {}
    if isinstance(qkv, Absorbed):
        batch, length, width = qkv.latent.shape
        if width == LATENT and length % PAGE == 0 and (mla := installed("flash_mla")):
            pages = torch.arange(batch * length // PAGE, dtype=torch.int32, device=qkv.q.device).view(batch, -1)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=qkv.q.device)
            schedule = mla.get_mla_metadata(lengths, qkv.q.size(2), 1)
            found["flash_mla"] = lambda views, mask, scale: mla.flash_mla_with_kvcache(
                views[0].q, views[0].latent.view(-1, PAGE, 1, width), pages, lengths, 512, *schedule,
                softmax_scale=scale, causal=True,
            )  # fmt: skip
        return found
    if flash := installed("flash_attn"):
        found["flash_attn"] = lambda views, mask, scale: flash.flash_attn_with_kvcache(
            views[0].q, views[0].k, views[0].v, softmax_scale=scale, causal=True
        )
    if qkv.q.size(0) == 1 and (infer := installed("flashinfer")):  # its batched kernels want a paged cache
        found["flashinfer"] = lambda views, mask, scale: infer.single_decode_with_kv_cache(
            views[0].q[0, 0], views[0].k[0], views[0].v[0], kv_layout="NHD", sm_scale=scale, use_tensor_cores=True
        )
    return found
