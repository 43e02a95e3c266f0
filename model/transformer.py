"""The T6 transformer and its baselines: the LLaMA block with a choice of attention mechanism and core."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.base import AttentionConfig
from model.cache import KVCache
from model.cores.base import AttentionCore, AttentionMask
from model.generation import stream
from model.layers import Block, RMSNorm

LOSS_CHUNK = 4096  # tokens whose logits are formed at a time, where none are kept


@dataclass
class TransformerConfig:
    """Everything that defines the network. Vocabulary as padded for the model."""

    attention: AttentionConfig
    core: AttentionCore
    n_layers: int
    d_model: int
    d_ff: int
    vocab_size: int
    norm_eps: float = 1e-6
    document_end: int | None = None  # the token that ends a document, where documents do not see each other

    @classmethod
    def from_config(cls, config, end_of_text: int | None = None) -> "TransformerConfig":
        """From a `configs.schema.Config`, and the tokenizer's end-of-text token for `data.document_mask`."""
        size = config.size
        return cls(
            replace(config.model), config.core, size.n_layers, size.d_model, size.d_ff,
            config.tokenizer.padded_vocab_size, size.norm_eps, end_of_text if config.data.document_mask else None,
        )  # fmt: skip


def split_documents(tokens: Tensor, document_end: int) -> tuple[Tensor, Tensor]:
    """(the position of each token in its document, the number of its document), both [B, T], for tokens [B, T].

    `document_end` is its document's last token; what a sequence starts with counts as a document's start.
    """
    starts = F.pad(tokens[:, :-1] == document_end, (1, 0))
    places = torch.arange(tokens.size(1), device=tokens.device).expand_as(tokens)
    first = torch.where(starts, places, 0).cummax(dim=1).values
    return places - first, starts.cumsum(dim=1)


class Transformer(nn.Module):
    """Token embedding, blocks, a final norm and a head tied to the embedding.

    `autocast_dtype` runs the forward pass under torch.autocast with fp32 parameters, whatever wraps the model.
    """

    def __init__(self, config: TransformerConfig, autocast_dtype: torch.dtype | None = None, recompute: bool = False):
        super().__init__()
        if config.document_end is not None and not config.core.masks_documents:
            raise ValueError(f"core={config.core.name}: cannot mask documents (data.document_mask); use core=sdpa")
        self.config = config
        self.autocast_dtype = autocast_dtype
        self.recompute = recompute  # drop each block's activations and compute them again in the backward pass
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        cores = [config.core.for_layer(layer) for layer in range(config.n_layers)]
        attentions = (config.attention.build(config.d_model, layer, core) for layer, core in enumerate(cores))
        self.blocks = nn.ModuleList(Block(a, config.d_model, config.d_ff, config.norm_eps) for a in attentions)
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.embedding.weight = self.head.weight  # tied; so the embedding starts as Linear does, U(+-1/sqrt(d_model))

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        reduction: str = "sum",
        cache: KVCache | None = None,
        counts: Tensor | None = None,
        last: bool = False,
    ) -> Tensor:
        """Logits [B, T, V] for tokens [B, T]; with `targets` [B, T] their cross-entropy in nats, in fp32.

        The loss is a sum over tokens, since whoever calls knows how many tokens the global batch has, or with
        reduction="none" each token's.

        With a `cache` the tokens follow what each of its rows holds, and join it; without gradients. `counts` [B] says
        how many of the T tokens are a row's own, the rest being padding at its end. `last` asks for the logits [B, V]
        of each row's last token alone.
        """
        if cache is not None:
            return self._continue(tokens, cache, counts, last)
        with self._autocast(tokens.device.type):
            positions, documents = torch.arange(tokens.size(1), device=tokens.device)[None], None
            if self.config.document_end is not None:
                positions, documents = split_documents(tokens, self.config.document_end)
            mask = AttentionMask(causal=True, documents=documents)
            x = self.embed(tokens)
            for block in self.blocks:
                if self.recompute and self.training:
                    x = checkpoint(block, x, positions, mask, use_reentrant=False)
                else:
                    x = block(x, positions, mask)
            if targets is None:
                return self.head(self.final_norm(x))
            return self._loss(x, targets, reduction)

    def _loss(self, x: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """The cross-entropy of `targets` [B, T] after the last block's x [B, T, M].

        Logits take more memory than anything else that is not kept for the backward pass: where that is recomputed, or
        there is none, they are formed for LOSS_CHUNK tokens at a time.
        """

        def losses(x: Tensor, targets: Tensor) -> Tensor:
            logits = self.head(self.final_norm(x)).float()
            return F.cross_entropy(logits, targets, reduction=reduction)

        x, flat, recompute = x.flatten(0, 1), targets.flatten(), self.recompute and self.training
        size = LOSS_CHUNK if recompute or not torch.is_grad_enabled() else len(flat)
        chunks = list(zip(x.split(size), flat.split(size), strict=True))
        if recompute and len(chunks) > 1:
            parts = [checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks]
        else:
            parts = [losses(*chunk) for chunk in chunks]
        return torch.cat(parts).view_as(targets) if reduction == "none" else sum(parts)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream [B, T, M] to start with: fp32 under autocast, whatever the weights are stored in."""
        x = self.embedding(tokens)
        return x if self.autocast_dtype is None else x.float()

    def store_weights_as_computed(self) -> None:
        """For inference: keep the matrices in the precision that autocast would cast them to at every step."""
        if self.autocast_dtype is not None:
            for module in self.modules():
                if isinstance(module, nn.Linear):
                    module.weight.data = module.weight.data.to(self.autocast_dtype)

    def _autocast(self, device_type: str):
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.autocast_dtype)

    @torch.no_grad()
    def _continue(self, tokens: Tensor, cache: KVCache, counts: Tensor | None, last: bool) -> Tensor:
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
            return self.head(self.final_norm(x))

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options) -> list[list[int]]:
        """What follows each of `prompts`, at most `max_new_tokens`, without the stop token that ends it.

        Options, and how: `model.generation.stream`, which yields the same token by token.
        """
        steps = zip(*stream(self, prompts, max_new_tokens, **options), strict=True)
        return [[token for token in row if token is not None] for row in steps] or [[] for _ in prompts]

    def new_cache(self, batch: int, capacity: int = 0, dtype: torch.dtype | None = None) -> KVCache:
        """A cache for `batch` rows with room for `capacity` tokens each, and more where needed.

        `dtype`: that of the forward pass unless given; torch.int8 quantises each part of a token by a scale of its own.
        """
        weight = self.embedding.weight
        return KVCache(
            self.config.attention.cache_shapes(), self.config.n_layers, batch, capacity,
            dtype or self.autocast_dtype or weight.dtype, weight.device, self.config.document_end is not None,
            [block.attention.core for block in self.blocks],
        )  # fmt: skip
