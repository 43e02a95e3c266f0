"""Both tracks of a fold in one pass (`core.kernel=triton`), in Triton's interpreter, against the formulas and SDPA."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from configs.errors import ConfigError
from model.attention.base import Dense
from model.cache import pad_tokens
from model.cores.folding import Axis, mix, open_hop
from model.cores.kernels.gpu.common import INTERPRETED
from model.cores.kernels.two_tracks import hop, two_tracks
from model.cores.sequence_tensor import SequenceTensor
from model.transformer import Transformer
from tests.model.helpers import small_config, small_network, wake_up
from tests.model.references import folded_attention
from tests.model.test_kernels import nan_in_new_memory  # noqa: F401
from tests.model.test_sequence_tensor import SCALE, attend, compare, inputs, random_qkv, turn

DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = [
    pytest.mark.skipif(not (INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("nan_in_new_memory"),
]
# tokens, inner, size, (query, key, value, own heads), (key width, value width)
SHAPES = {
    "one line": (7, 1, 7, (2, 2, 2, 2), (4, 4)),
    "one token": (1, 1, 5, (1, 1, 1, 1), (8, 8)),
    "blocks inside": (96, 1, 48, (2, 1, 1, 1), (8, 8)),
    "ends in a block": (90, 1, 40, (2, 2, 2, 2), (8, 8)),
    "blocks apart": (113, 3, 18, (4, 2, 4, 4), (24, 16)),
    "steps of two": (97, 2, 23, (3, 1, 3, 3), (16, 16)),
}


def hop_by_sdpa(q, k, values, own, scale, inner, size, closing):
    n_tokens = q.size(1)
    outer = -(-n_tokens // (inner * size))
    padding = outer * inner * size - n_tokens
    q, k, values, own = (pad_tokens(x, padding) for x in (q, k, values, own))
    fold = Axis(q.size(0), outer, size, inner)
    opened = open_hop(fold, q, k, values, own, scale)
    return opened[:, :n_tokens], mix(fold, q, k, values, scale)[:, :n_tokens] if closing else None


def random_hop(shape, dtype=torch.float32, size=1.0):
    torch.manual_seed(0)
    n_tokens, *axis, heads, (width, v_width) = SHAPES[shape]
    widths = (width, width, v_width, v_width)
    made = [size * torch.randn(2, n_tokens, n, w, device=DEVICE) for n, w in zip(heads, widths, strict=True)]
    return [x.to(dtype).requires_grad_() for x in made], axis


def with_gradients(attend, tensors, axis, closing):
    """Both tracks and the gradient of all that went in; of closed values what whole lines have."""
    torch.manual_seed(1)
    n_tokens, whole = tensors[0].size(1), axis[0] * axis[1]
    opened, closed = attend(*tensors, SCALE, *axis, closing)
    weights = torch.randn(2, *opened.shape, device=DEVICE, dtype=torch.float32).to(opened.dtype)
    kept = n_tokens // whole * whole
    loss = (opened * weights[0]).sum() + (((closed * weights[1])[:, :kept]).sum() if closing else 0)
    return [opened, *([closed[:, :kept]] if closing else []), *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_hop_and_its_gradients_equal_those_of_sdpa(shape, closing):
    tensors, axis = random_hop(shape)
    ours = with_gradients(two_tracks, tensors, axis, closing)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    for a, b in zip(ours, with_gradients(hop_by_sdpa, exact, axis, closing), strict=True):
        torch.testing.assert_close(a.double(), b, atol=5e-6, rtol=5e-6)


@pytest.mark.parametrize("blocks", [(16, 16), (64, 32)])
def test_every_size_of_blocks_gives_the_same(blocks, monkeypatch):
    if not INTERPRETED:
        pytest.skip("a GPU tunes them itself")
    from triton import Config

    forward = importlib.import_module("model.cores.kernels.gpu.two_tracks")
    backward = importlib.import_module("model.cores.kernels.gpu.two_tracks_backward")
    tensors, axis = random_hop("ends in a block")
    usual = with_gradients(two_tracks, tensors, axis, True)
    for kernel in (forward.forward_kernel, backward.queries_kernel, backward.keys_kernel):
        m, n = blocks[::-1] if kernel is backward.keys_kernel else blocks
        monkeypatch.setattr(kernel, "configs", [Config({"BLOCK_M": m, "BLOCK_N": n})])
    for a, b in zip(with_gradients(two_tracks, tensors, axis, True), usual, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_large_scores_and_half_precision():
    """Scores to some hundreds, and fp16 compared with what SDPA makes of the same fp16."""
    tensors, axis = random_hop("blocks apart", size=6.0)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = with_gradients(hop_by_sdpa, exact, axis, True)
    for a, b in zip(with_gradients(two_tracks, tensors, axis, True), wanted, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm()
    tensors, axis = random_hop("blocks apart", torch.float16)
    exact = [x.detach().double().requires_grad_() for x in tensors]
    wanted = with_gradients(hop_by_sdpa, exact, axis, True)
    theirs = with_gradients(hop_by_sdpa, tensors, axis, True)
    for a, b, c in zip(with_gradients(two_tracks, tensors, axis, True), theirs, wanted, strict=True):
        assert a.dtype == torch.float16
        assert (a - c).norm() < 2 * (b - c).norm() + 1e-3 * c.norm()


@pytest.mark.parametrize(("fold", "seq_len"), [([3, 4], 10), ([2, 3, 2], 11)])
def test_the_core_equals_the_loops(fold, seq_len):
    dense = random_qkv(seq_len, dtype=torch.float32)
    grown = [*fold[:-1], max(fold[-1], seq_len)]
    slow = torch.stack([folded_attention(*row, grown, SCALE, turn) for row in zip(*inputs(dense), strict=True)])
    on_device = Dense(*(x.to(DEVICE) for x in inputs(dense)))
    ours = attend(SequenceTensor(fold=fold, kernel="triton"), on_device).cpu()
    compare(ours, slow, dense, atol=2e-5, rtol=2e-5)


def test_nothing_leaks_and_everything_past_is_reached():
    core, seq_len = SequenceTensor(fold=[2, 2, 2], kernel="triton"), 7
    dense = Dense(*(x.detach().to(DEVICE) for x in inputs(random_qkv(seq_len, rows=1, dtype=torch.float32))))
    before = attend(core, dense).cpu()
    for t in range(seq_len):
        for name in ("q", "k", "v"):
            changed = Dense(*(x.clone() for x in inputs(dense)))
            getattr(changed, name)[:, t] += 1
            differs = (attend(core, changed).cpu() != before).flatten(2).any(-1)[0]
            assert not differs[:t].any(), (name, t)
            assert name == "q" or differs[t + 1 :].all(), (name, t)


@pytest.mark.parametrize("groups", [1, 2])
def test_key_heads_are_shared_and_one_axis_is_full_attention(groups):
    for fold in ([3, 4], [11], [11, 1]):
        dense = random_qkv(11, dtype=torch.float32, groups=groups)
        on_device = Dense(*(x.to(DEVICE) for x in inputs(dense)))
        ours, theirs = (attend(SequenceTensor(fold=fold, kernel=kernel), on_device) for kernel in ("triton", "sdpa"))
        compare(ours, theirs, dense, atol=2e-6, rtol=2e-5)
        assert fold == [3, 4] or torch.equal(ours, theirs)


def test_it_is_an_operation_that_pytorch_can_trace():
    tensors, axis = random_hop("one line")
    torch.library.opcheck(hop, (*tensors, SCALE, axis, True))


def test_a_compiled_model_trains_as_with_sdpa():
    """Loss and gradients. The interpreter multiplies fp16, and not bf16."""
    tokens = torch.randint(0, 300, (2, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)

    def gradients(kernel: str, dtype=None) -> list[torch.Tensor]:
        torch.manual_seed(0)
        core = ["core=sequence_tensor", "core.fold=[3,4]", f"core.kernel={kernel}"]
        network = small_network("t6", "size.n_layers=1", *core)
        transformer = wake_up(Transformer(network, autocast_dtype=dtype)).to(DEVICE)
        step = torch.compile(transformer, backend="aot_eager", fullgraph=True) if kernel == "triton" else transformer
        loss = step(tokens, tokens)
        loss.backward()
        return [loss.detach(), *(p.grad for p in transformer.parameters())]

    exact = gradients("sdpa")
    for a, b in zip(gradients("triton"), exact, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    rough = [gradients(kernel, torch.float16 if INTERPRETED else torch.bfloat16) for kernel in ("triton", "sdpa")]
    for ours, theirs, wanted in zip(*rough, exact, strict=True):
        assert (ours - wanted).norm() < 2 * (theirs - wanted).norm() + 1e-3 * wanted.norm()


def test_where_it_runs_and_what_it_changes(monkeypatch):
    config = small_config("mha", "core=sequence_tensor", "core.kernel=triton")
    config.core.check(config.model, "cuda", torch.bfloat16)
    assert config.identity() == small_config("mha", "core=sequence_tensor").identity()
    with pytest.raises(ConfigError, match="core.kernel=cuda: must be auto, sdpa or triton"):
        small_config("mha", "core=sequence_tensor", "core.kernel=cuda")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="core.kernel=triton: needs a GPU; use core.kernel=sdpa"):
        config.core.check(config.model, "cpu", torch.float32)
    dense, core = random_qkv(12, dtype=torch.float32), SequenceTensor(fold=[3, 4], kernel="triton")
    bidirectional = attend(core, dense, causal=False)  # has one track, and so no use for the kernel
    assert torch.equal(bidirectional, attend(SequenceTensor(fold=[3, 4]), dense, causal=False))
