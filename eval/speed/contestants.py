"""What competes in the decoding benchmark: mechanisms with a full cache, and the kernels that can attend for them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from configs.app import configured
from eval.speed.kernels import installed_kernels
from model.attention.base import Attention, AttentionCore, Dense
from model.attention.latent import Absorbed
from model.attention.tensor_product import Factored, TensorProductAttention, TensorProductConfig
from model.cache import KVCache
from model.cores.folding import UnfinishedBlock
from model.cores.full import Full
from model.cores.sequence_tensor import SequenceTensor
from model.mask import AttentionMask
from model.transformer import SizeConfig, Transformer, TransformerConfig
from training.config import Config

PAPER_SETTING = {  # Figures 5, 7 and 8: d_model / 64 heads each; MLA's size, not stated, is that which fits its curve
    "gqa": ["model.n_kv_heads=4"],
    "mla": ["model.kv_lora_rank=512", "model.qk_rope_head_dim=64"],
    "t6": ["model.q_rank=16", "model.k_rank=1", "model.v_rank=1"],
}
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")  # of PyTorch's attention on a GPU


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


def contestants(
    models: list[str], size: SizeConfig, d_models: list[int], overrides: list[str], materialized: bool,
    folds: list[list[int]] = (),
) -> Iterator[Contestant]:  # fmt: skip
    """Yield every model at `size`, or at each of `d_models` in the paper's setting; and over each of `folds`."""
    own = [f"size.{key}={value}" for key, value in size.model_dump(exclude={"name"}).items() if value is not None]
    for d_model in d_models or [None]:
        name = size.name if d_model is None else f"paper_{d_model}"
        for model in models:
            chosen = [f"size={size.name}", *own] if d_model is None else paper_setting(model, d_model)
            run = configured(Config, [f"model={model}", "tokenizer=gpt2", *chosen, *overrides], world_size=1)
            network, sdpa = run.network(), Full(kernel="sdpa")
            if isinstance(network.attention, TensorProductConfig):
                yield Contestant(model, name, replace(network, core=Full(kernel="factors")))
                if materialized:
                    explicit = MaterializedConfig(**dict(network.attention))
                    yield Contestant(model, name, replace(network, core=sdpa, attention=explicit))
            else:
                yield Contestant(model, name, replace(network, core=sdpa))
            for fold in folds:
                yield Contestant(model, name, replace(network, core=SequenceTensor(fold=fold, kernel="sdpa")))


def paper_setting(model: str, d_model: int) -> list[str]:
    own = PAPER_SETTING.get("t6" if model.startswith("t6") else model, [])
    return ["size=medium", f"size.d_model={d_model}", f"model.n_heads={d_model // 64}", *own]


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
    """Return by name the ways to attend with such arguments as `call` that are available here."""

    def through(*backends) -> Callable:
        def attend(*call) -> Tensor:
            with sdpa_kernel(list(backends)):
                return core.attend(*call)

        return attend

    found = {core.kernel: core.attend}
    (qkv,) = call[0]
    if device.type == "cuda" and isinstance(qkv, Dense | Absorbed):
        found |= {f"sdpa.{name.lower()}": through(getattr(SDPBackend, name)) for name in BACKENDS}
        found |= installed_kernels(qkv)
    return found


# --- a whole step


@dataclass
class ModelStep:
    """Decoding `tokens` tokens a row one after the other, the last of which attends to the whole length.

    `reset` prepares the next one. `moved`: the bytes that a token must move.
    """

    run: Callable[[], None]
    reset: Callable[[], None]
    tokens: int
    cache_bytes: int
    moved: float


def model_step(
    network: TransformerConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
) -> ModelStep:
    """Return a step of a whole model whose cache is full of random numbers."""
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
    return ModelStep(run, reset, steps, kept, weights + kept * share)
