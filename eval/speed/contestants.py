"""What competes in the decoding benchmark: mechanisms with a filled cache, and the kernels that can attend for them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.app import compose
from configs.load import load
from configs.schema import SizeConfig
from model.attention.base import Attention, Dense, unturned
from model.attention.latent import Absorbed
from model.attention.tensor_product import Factored, TensorProductAttention, TensorProductConfig
from model.cache import KVCache
from model.cores.base import AttentionCore
from model.cores.flash_tpa import FlashTPA
from model.cores.folded_cache import Block
from model.cores.sdpa import SDPA
from model.cores.sequence_tensor import SequenceTensor
from model.transformer import Transformer, TransformerConfig

PAPER_SETTING = {  # Figures 5, 7 and 8: d_model / 64 heads each; MLA's size, not stated, is that which fits its curve
    "gqa": ["model.n_kv_heads=4"],
    "mla": ["model.kv_lora_rank=512", "model.qk_rope_head_dim=64"],
    "t6": ["model.q_rank=16", "model.k_rank=1", "model.v_rank=1"],
}


class MaterializedConfig(TensorProductConfig):
    """TPA that caches its keys and values, not their factors."""

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
    """A network, and under which name it competes."""

    model: str
    size: str
    core: str  # sdpa, flash_tpa, sdpa (k, v cached) for a TPA that caches what its factors make, or one of `cores`
    network: TransformerConfig

    @property
    def folds(self) -> bool:
        """Whether its core keeps a cache of its own: then only whole steps can be timed."""
        return isinstance(self.network.core, SequenceTensor)


def contestants(
    models: list[str], size: SizeConfig, d_models: list[int], overrides: list[str], materialized: bool,
    folds: list[list[int]] = (),
) -> Iterator[Contestant]:  # fmt: skip
    """Every model at this size, or instead at each of `d_models` in the paper's setting; and over each of `folds`."""
    values = {f"size.{key}": value for key, value in vars(size).items() if key != "name" and value is not None}
    own = [f"size={size.name}", *(f"{key}={value}" for key, value in values.items())]
    for name, chosen in [(f"paper_{d}", paper_setting(d)) for d in d_models] or [(size.name, lambda model: own)]:
        for model in models:
            tree = compose("train", [f"model={model}", "tokenizer=gpt2", *chosen(model), *overrides])
            network = TransformerConfig.from_config(load(tree))
            if not isinstance(network.attention, TensorProductConfig):
                yield Contestant(model, name, "sdpa", replace(network, core=SDPA()))
            else:
                yield Contestant(model, name, "flash_tpa", replace(network, core=FlashTPA()))
                if materialized:
                    explicit = MaterializedConfig(**vars(network.attention))
                    yield Contestant(
                        model, name, "sdpa (k, v cached)", replace(network, core=SDPA(), attention=explicit)
                    )
            for fold in folds:
                yield Contestant(model, name, f"folded {fold}", replace(network, core=SequenceTensor(fold=fold)))


def paper_setting(d_model: int) -> Callable[[str], list[str]]:
    def chosen(model: str) -> list[str]:
        own = PAPER_SETTING.get("t6" if model.startswith("t6") else model, [])
        return ["size=medium", f"size.d_model={d_model}", f"model.n_heads={d_model // 64}", *own]

    return chosen


# --- the attention step alone


class Reached(Exception):
    """Raised with what a core was called with."""


def stop_here(*call):
    raise Reached(*call)


def attention_inputs(
    network: TransformerConfig, batch: int, length: int, layers: int, device, dtype
) -> tuple[list, int]:
    """For each of `layers` layers what its core gets to attend from the last of `length` tokens: ((qkv, mask, scale),
    bytes of a layer's cache). Every layer has a cache of its own, as in a model."""
    attention = network.attention.build(network.d_model, 0, network.core).to(device, dtype).requires_grad_(False)
    shapes = network.attention.cache_shapes()
    cache = KVCache(shapes, layers, batch, length, dtype, device)
    for part in cache.parts():
        part.values.normal_()
    cache.set_lengths(length - 1)
    x = torch.randn(batch, 1, network.d_model, device=device, dtype=dtype)
    positions, mask = cache.begin(torch.zeros(batch, 1, dtype=torch.long, device=device))
    attention.core = stop_here
    made = []
    for layer in cache.layers:
        try:
            attention.attend_cached(x, positions, mask, layer)
        except Reached as reached:
            qkv, _, _, mask, scale = reached.args
            made.append((qkv, mask, scale))
    return made, cache.nbytes // layers


def kernels(qkv, core: AttentionCore, device: torch.device) -> dict[str, Callable]:
    """By name, the ways to attend to such q, k and v that can be had here; each takes (qkv, mask, scale)."""

    def through(core: AttentionCore, *backends) -> Callable:
        def attend(qkv, mask, scale):
            if not backends:
                return core(qkv, unturned, None, mask, scale)
            with sdpa_kernel(list(backends)):
                return core(qkv, unturned, None, mask, scale)

        return attend

    found = {core.name: through(core)}
    if device.type == "cuda" and isinstance(qkv, Dense | Absorbed):
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"):
            found[f"sdpa.{backend.lower()}"] = through(core, getattr(SDPBackend, backend))
        found |= installed_kernels(qkv)
    return found


def installed_kernels(qkv) -> dict[str, Callable]:
    """FlashAttention's and FlashInfer's decoding kernels for explicit keys and values, FlashMLA's for a latent."""
    found = {}
    if isinstance(qkv, Dense):
        try:
            from flash_attn import flash_attn_with_kvcache

            found["flash_attn"] = lambda qkv, mask, scale: flash_attn_with_kvcache(
                qkv.q, qkv.k, qkv.v, softmax_scale=scale, causal=True
            )
        except ImportError:
            pass
        if qkv.q.size(0) == 1:  # its batched kernels want a paged cache
            try:
                from flashinfer import single_decode_with_kv_cache

                found["flashinfer"] = lambda qkv, mask, scale: single_decode_with_kv_cache(
                    qkv.q[0, 0], qkv.k[0], qkv.v[0], kv_layout="NHD", sm_scale=scale, use_tensor_cores=True
                )
            except ImportError:
                pass
    elif qkv.q.size(-1) == 576 and qkv.latent.size(1) % 64 == 0:  # DeepSeek's sizes are the only ones it has
        try:
            from flash_mla import flash_mla_with_kvcache, get_mla_metadata

            batch, length = qkv.latent.shape[:2]
            pages = torch.arange(batch * length // 64, dtype=torch.int32, device=qkv.q.device).view(batch, -1)
            lengths = torch.full((batch,), length, dtype=torch.int32, device=qkv.q.device)
            schedule = get_mla_metadata(lengths, qkv.q.size(2), 1)
            found["flash_mla"] = lambda qkv, mask, scale: flash_mla_with_kvcache(
                qkv.q, qkv.latent.view(-1, 64, 1, 576), pages, lengths, 512, *schedule, softmax_scale=scale, causal=True
            )
        except ImportError:
            pass
    return found


# --- a whole step


@dataclass
class ModelStep:
    """Decoding `tokens` tokens a row one after the other, the last of which attends to the whole length.

    `reset` makes the next one like it. `moved`: the bytes that a token must move.
    """

    run: Callable
    reset: Callable
    tokens: int
    cache_bytes: int
    moved: float


def model_step(network: TransformerConfig, batch: int, length: int, device, dtype) -> ModelStep:
    """A step of a whole model whose cache is full of random numbers."""
    with torch.device(device):
        model = Transformer(network).to(dtype).eval()
    cache = model.new_cache(batch, length, dtype)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)
    weights = sum(p.nbytes for p in model.parameters())  # the head is the embedding
    folded = isinstance(network.core, SequenceTensor)
    steps = network.core.fold[0] if folded else 1  # of a fold: from the end of a block to the end of the next
    if folded:  # the first block to complete makes the last of its parts
        model(tokens.expand(batch, math.prod(network.core.fold[:-1])), cache=cache)
    for part in cache.parts():
        part.values.normal_()

    def reset() -> None:  # rows of one length need no mask, so that SDPA has its fastest kernel
        cache.set_lengths(length - steps)
        if folded:
            for layer in cache.layers:
                layer.ends = [length - steps] * batch

    def run() -> None:
        for _ in range(steps):
            model(tokens, cache=cache, last=True)

    kept = sum(t.nbytes for part in cache.parts() if not isinstance(part, Block) for t in part.tensors())
    share = network.core.keys_read(length) / length if folded else 1.0
    return ModelStep(run, reset, steps, kept, weights + kept * share)
