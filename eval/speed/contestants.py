"""What competes in the decoding benchmark: mechanisms with a full cache, and the kernels that can attend for them."""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from eval.speed.measure import timer
from model.attention.base import Attention, AttentionCore, Dense
from model.attention.latent import Absorbed
from model.attention.tensor_product import Factored, TensorProductAttention, TensorProductConfig
from model.cache import KVCache
from model.cores.folding import UnfinishedBlock
from model.cores.full import Full
from model.cores.sequence_tensor import SequenceTensor
from model.mask import AttentionMask
from model.transformer import Transformer, TransformerConfig

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # of PyTorch's attention on a GPU
PAGE = 64  # tokens in a page of FlashMLA's cache
LATENT = 576  # numbers per token, the only size that FlashMLA has: DeepSeek's 512 + 64


class MaterializedConfig(TensorProductConfig):
    """TPA that caches its keys and values instead of their factors."""

    def cache_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"k": (self.n_heads, self.head_dim), "v": (self.n_heads, self.head_dim)}

    def build(self, d_model: int, layer: int, core: AttentionCore) -> "MaterializedAttention":
        return MaterializedAttention(self, d_model, core)


class MaterializedAttention(TensorProductAttention):
    keep, recall = Attention.keep, Attention.recall

    def rotate(self, qkv: Factored, positions: Tensor) -> Dense:
        return super().rotate(qkv, positions).materialize()


@dataclass
class Contestant:
    """A network and the name under which it competes."""

    model: str
    size: str  # or paper_<width>, in the paper's setting
    network: TransformerConfig

    @property
    def is_folded(self) -> bool:
        """Whether its cache attends by itself; then only whole steps can be timed."""
        return isinstance(self.network.core, SequenceTensor)

    @property
    def facts(self) -> dict:
        """What the JSON line of a point says about the contestant."""
        attention, core = self.network.attention, self.network.core
        return {
            "model": self.model,
            "size": self.size,
            "core": core.name,
            "fold": getattr(core, "fold", None),
            "cached": "factors" if core.kernel == "factors" else ", ".join(core.cache_shapes(attention)),
            "n_heads": attention.n_heads,
            "d_model": self.network.d_model,
        }

    def __str__(self) -> str:
        folded = f", folded {self.facts['fold']}" if self.is_folded else ""
        return f"{self.model} ({self.facts['cached']} cached{folded})"


# --- the attention step alone


class Reached(Exception):
    """Raised with what a core was called with."""


class Recorder(Full):
    """A core that attends to nothing, and raises what it was given."""

    def attend(self, views: list, mask: AttentionMask, scale: float) -> Tensor:
        raise Reached(views, mask, scale)


def attention_inputs(
    network: TransformerConfig, batch: int, length: int, layers: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[tuple], int]:
    """Return, for each of `layers` layers, the arguments of its core for the last of `length` tokens; and the bytes of
    a layer's cache. Every layer has a cache of its own, as in a model."""
    config, recorder = network.attention, Recorder()
    attention = config.build(network.d_model, 0, recorder).to(device, dtype).requires_grad_(False)
    own = [recorder.cache(config, batch, length, dtype, device) for _ in range(layers)]
    cache = KVCache(own, batch, length, device)
    for part in cache.parts():
        part.values.normal_()
    cache.set_lengths(length - 1)
    x = torch.randn(batch, 1, network.d_model, device=device, dtype=dtype)
    positions, mask = cache.begin(torch.zeros(batch, 1, dtype=torch.long, device=device))
    calls = []
    for layer in cache.layers:
        try:
            attention(x, positions, mask, layer)
        except Reached as reached:
            calls.append(reached.args)
    return calls, cache.nbytes // layers


def kernels(call: tuple, core: AttentionCore, device: torch.device) -> dict[str, Callable]:
    """Return by name the ways to attend with such arguments as `call` that are available here.

    On a GPU these are PyTorch's own, and those of FlashAttention and FlashMLA if they are installed.
    """
    found = {core.kernel: core.attend}
    (qkv,) = call[0]
    if device.type != "cuda" or not isinstance(qkv, Dense | Absorbed):
        return found
    found |= {f"sdpa.{name.lower()}": sdpa_kernel(getattr(SDPBackend, name))(core.attend) for name in BACKENDS}
    with suppress(ImportError):
        found |= flash_attention() if isinstance(qkv, Dense) else flash_mla(qkv)
    return found


def flash_attention() -> dict[str, Callable]:
    from flash_attn import flash_attn_with_kvcache

    def attend(views: list[Dense], mask: AttentionMask, scale: float) -> Tensor:
        return flash_attn_with_kvcache(views[0].q, views[0].k, views[0].v, softmax_scale=scale, causal=True)

    return {"flash_attn": attend}


def flash_mla(qkv: Absorbed) -> dict[str, Callable]:
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    batch, length, width = qkv.latent.shape
    if width != LATENT or length % PAGE:
        return {}
    pages = torch.arange(batch * length // PAGE, dtype=torch.int32, device=qkv.q.device).view(batch, -1)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=qkv.q.device)
    schedule = get_mla_metadata(lengths, qkv.q.size(2), 1)

    def attend(views: list[Absorbed], mask: AttentionMask, scale: float) -> tuple:
        latent = views[0].latent.view(-1, PAGE, 1, width)
        options = {"softmax_scale": scale, "causal": True}
        return flash_mla_with_kvcache(views[0].q, latent, pages, lengths, 512, *schedule, **options)

    return {"flash_mla": attend}


# --- a whole step


def model_step(
    network: TransformerConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> tuple[Callable[[], tuple[float, float]], int, int, float]:
    """Return what times a step of a whole model whose cache is full of random numbers, and numbers that belong to it:
    the tokens a row that it decodes, the last of which attends to the whole length; the bytes of the cache; and the
    bytes that a token must move."""
    with torch.device(device):
        model = Transformer(network).to(dtype).eval()
    cache = model.new_cache(batch, length, dtype)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    weights = sum(p.nbytes for p in model.parameters())  # the head is the embedding
    is_folded = isinstance(network.core, SequenceTensor)
    steps = network.core.fold[0] if is_folded else 1  # of a fold: from the end of a block to the end of the next
    if is_folded:  # the first block to complete makes the last of its parts
        model.decode(tokens.expand(batch, math.prod(network.core.fold[:-1])), cache)
    for part in cache.parts():
        part.values.normal_()

    def reset() -> None:  # rows of one length need no mask, so that SDPA has its fastest kernel
        cache.set_lengths(length - steps)
        if is_folded:
            for layer in cache.layers:
                layer.ends = [length - steps] * batch

    def run() -> None:
        for _ in range(steps):
            model.decode(tokens, cache)

    kept = sum(t.nbytes for part in cache.parts() if not isinstance(part, UnfinishedBlock) for t in part.tensors())
    share = network.core.keys_read(length) / length if is_folded else 1.0
    return timer(run, device, reset, captured=not is_folded), steps, kept, weights + kept * share
