"""The T6 transformer and its baselines: the LLaMA block (arXiv 2302.13971) with a choice of attention and core."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from configs.block import Block as ConfigBlock
from configs.kinds import WIDEST, Name
from model.attention.base import Attention, AttentionConfig, AttentionCore
from model.cache import KVCache, LayerCache
from model.generation import stream
from model.mask import AttentionMask

LOSS_CHUNK = 4096  # tokens whose logits are formed at a time while none are kept


class SizeConfig(ConfigBlock):
    """The transformer around the attention: `n_layers` blocks of width `d_model`, feed-forward width `d_ff`."""

    name: Name
    n_layers: int = Field(ge=1, le=10_000)
    d_model: int = Field(ge=1, le=WIDEST)
    head_dim: int = Field(64, ge=1, le=WIDEST)
    d_ff: int | None = Field(None, ge=1, le=8 * WIDEST)  # null: floor(8/3 d_model), as the TPA paper has it
    norm_eps: float = Field(1e-6, ge=0, lt=1)
    match: Literal["params", "flops", "kv_bytes"] = "params"  # what an open head count or rank makes equal to MHA's
    match_tolerance: float = Field(0.05, ge=0, le=100)  # beyond it a run reports that it is not matched

    @model_validator(mode="after")
    def _fill(self):
        if self.d_ff is None:
            self.d_ff = 8 * self.d_model // 3
        return self


@dataclass
class TransformerConfig:
    """Everything that defines the network. The vocabulary is as padded for the model."""

    attention: AttentionConfig
    core: AttentionCore
    n_layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    norm_eps: float = 1e-6
    document_end: int | None = None  # the token that ends a document, if documents do not see each other

    @property
    def cores(self) -> list[AttentionCore]:
        """The core of each layer."""
        return [self.core.for_layer(layer) for layer in range(self.n_layers)]

    @classmethod
    def of(
        cls, attention: AttentionConfig, core: AttentionCore, size: SizeConfig, vocab_size: int,
        document_end: int | None = None,
    ) -> "TransformerConfig":  # fmt: skip
        """Return the network of a run's blocks, with an `attention` of its own."""
        shape = {key: getattr(size, key) for key in ("n_layers", "d_model", "d_ff", "norm_eps")}
        return cls(attention.replace(), core, vocab_size=vocab_size, document_end=document_end, **shape)


def split_documents(tokens: Tensor, document_end: int) -> tuple[Tensor, Tensor]:
    """Return (each token's position in its document, the number of its document), both [B, T], for tokens [B, T]."""
    starts = F.pad(tokens[:, :-1] == document_end, (1, 0))
    places = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    return places - first, starts.cumsum(dim=1)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202); gate and up are one product, down starts at zero."""

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)
        nn.init.zeros_(self.down_proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)); norms have no learned weight, as in the TPA authors' code."""

    def __init__(self, attention: Attention, d_model: int, d_ff: int, norm_eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model, norm_eps, elementwise_affine=False)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(d_model, norm_eps, elementwise_affine=False)
        self.mlp = SwiGLU(d_model, d_ff)

    def forward(self, x: Tensor, positions: Tensor, mask: AttentionMask, cache: LayerCache | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, mask, cache)
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """Token embedding, blocks, a final norm and a head tied to the embedding."""

    def __init__(self, config: TransformerConfig, autocast_dtype: torch.dtype | None = None, recompute: bool = False):
        super().__init__()
        if config.document_end is not None and not config.core.masks_documents:
            raise ValueError(f"core={config.core.name}: cannot mask documents; use core=full core.kernel=sdpa")
        self.config = config
        self.autocast_dtype = autocast_dtype  # of the forward pass, with fp32 parameters, whatever wraps the model
        self.recompute = recompute  # drop each block's activations and compute them again in the backward pass
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        attentions = (config.attention.build(config.d_model, layer, core) for layer, core in enumerate(config.cores))
        self.blocks = nn.ModuleList(Block(a, config.d_model, config.d_ff, config.norm_eps) for a in attentions)
        self.final_norm = nn.RMSNorm(config.d_model, config.norm_eps, elementwise_affine=False)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.embedding.weight = self.head.weight  # tied; so the embedding starts as Linear does, U(+-1/sqrt(d_model))

    def forward(self, tokens: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """Return the `loss`: what DeepSpeed's engine and torch.compile call."""
        return self.loss(tokens, targets, reduction)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [B, T, M] after the last block, before the final norm, for tokens [B, T]."""
        with self._autocast(tokens.device.type):
            positions, documents = torch.arange(tokens.size(1), device=tokens.device)[None], None
            if self.config.document_end is not None:
                positions, documents = split_documents(tokens, self.config.document_end)
            rest = (positions, AttentionMask(documents=documents))
            x = self.embed(tokens)
            for block in self.blocks:
                recompute = self.recompute and self.training
                x = checkpoint(block, x, *rest, use_reentrant=False) if recompute else block(x, *rest)
            return x

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits [B, T, V] of what follows each of tokens [B, T]."""
        with self._autocast(tokens.device.type):
            return self._unembed(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        """Return the cross-entropy of `targets` [B, T] after tokens [B, T], in nats, in fp32.

        It is a sum over tokens, since the caller knows how many the global batch has, or with reduction="none" each
        token's, [B, T]. Logits take the most memory of what is not kept for the backward pass: if that is recomputed,
        or there is none, they are formed for LOSS_CHUNK tokens at a time.
        """

        def losses(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(self._unembed(x).float(), targets, reduction=reduction)

        recompute = self.recompute and self.training
        size = LOSS_CHUNK if recompute or not torch.is_grad_enabled() else targets.numel()
        with self._autocast(tokens.device.type):  # one context, so that the head is cast once for all chunks
            x = self.hidden(tokens).flatten(0, 1)
            chunks = list(zip(x.split(size), targets.flatten().split(size), strict=True))
            if recompute and len(chunks) > 1:
                parts = [checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks]
            else:
                parts = [losses(*chunk) for chunk in chunks]
        return torch.cat(parts).view_as(targets) if reduction == "none" else sum(parts)

    @torch.no_grad()
    def decode(self, tokens: Tensor, cache: KVCache, counts: Tensor | None = None, last: bool = True) -> Tensor:
        """Return the logits [B, V] of each row's last token, for tokens [B, T] that follow and join what `cache` holds.

        `counts` [B]: how many of the T tokens are a row's own, the rest being padding. last=False: logits [B, T, V].
        """
        with self._autocast(tokens.device.type):
            positions, mask = cache.begin(tokens, self.config.document_end, counts)
            x = self.embed(tokens)
            for block, layer in zip(self.blocks, cache.layers, strict=True):
                x = block(x, positions, mask, layer)
            cache.advance(tokens.size(1), counts)
            if last and counts is None:
                x = x[:, -1]
            elif last:
                x = x[torch.arange(x.size(0), device=x.device), counts.clamp_min(1) - 1]
            return self._unembed(x)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the residual stream [B, T, M] to start with: fp32 under autocast, however the weights are stored."""
        x = self.embedding(tokens)
        return x if self.autocast_dtype is None else x.float()

    def _unembed(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of the residual stream x [..., M]."""
        return self.head(self.final_norm(x))

    def _autocast(self, device_type: str):
        dtype = self.autocast_dtype
        return contextlib.nullcontext() if dtype is None else torch.autocast(device_type, dtype)

    def store_weights_as_computed(self) -> None:
        """Keep the matrices in the precision that autocast would cast them to at every step: for inference."""
        if self.autocast_dtype is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.to(self.autocast_dtype)

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options) -> list[list[int]]:
        """Return what follows each of `prompts`, without the stop token; `options` are those of `generation.stream`."""
        steps = zip(*stream(self, prompts, max_new_tokens, **options), strict=True)
        return [[token for token in row if token is not None] for row in steps] or [[] for _ in prompts]

    def new_cache(self, batch: int, capacity: int = 0, dtype: torch.dtype | None = None) -> KVCache:
        """Return a cache for `batch` rows of `capacity` tokens, which grows; `dtype` None: that of the forward pass."""
        device = self.embedding.weight.device
        dtype = dtype or self.autocast_dtype or self.embedding.weight.dtype
        attentions = (block.attention for block in self.blocks)
        layers = [a.core.cache(a.config, batch, capacity, dtype, device) for a in attentions]
        return KVCache(layers, batch, capacity, device, documents=self.config.document_end is not None)
