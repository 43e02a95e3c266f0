"""With `data.document_mask` a row of documents is what its documents are alone, for every mechanism."""

from typing import ClassVar

import pytest
import torch
from torch.nn.attention import varlen

from configs.errors import ConfigError
from model.attention.base import Dense
from model.cores.full import Full
from model.cores.kernels import sdpa
from model.mask import AttentionMask
from model.transformer import Transformer, split_documents
from tests.model.helpers import MODELS, small_config, small_network, wake_up

END = 7


class Blind(Full):
    """A core that does not say that it masks documents."""

    name: str = "blind"
    masks_documents: ClassVar[bool] = False
    why_no_documents: ClassVar[str] = ""


def masked(model, **options):
    torch.manual_seed(0)
    return wake_up(Transformer(small_network(model, document_end=END), **options))


def row_of(lengths, end_last=True):
    """Documents of random tokens [sum of lengths], each but perhaps the last ending with END."""
    tokens = torch.randint(END + 1, 300, (sum(lengths),))
    ends = torch.tensor(lengths).cumsum(0) - 1
    tokens[ends if end_last else ends[:-1]] = END
    return tokens


def test_positions_and_documents():
    tokens = torch.tensor([[5, 5, END, 5, END, END, 5], [END, 5, 5, 5, 5, 5, 5]])
    positions, documents = split_documents(tokens, END)
    assert positions.tolist() == [[0, 1, 2, 0, 1, 0, 0], [0, 0, 1, 2, 3, 4, 5]]
    assert documents.tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_the_mask_spelt_out():
    documents = torch.tensor([[0, 0, 1, 1]])
    assert AttentionMask(documents=documents).allowed(4, 4)[0, 0].int().tolist() == [
        [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]
    ]  # fmt: skip
    assert AttentionMask(documents=documents).allowed(1, 4)[0, 0].int().tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_row_equals_its_documents_alone(model, recompute):
    net = masked(model, recompute=recompute)
    lengths = [[5, 1, 9, 4], [13, 6]]
    rows = torch.stack([row_of(lengths[0]), row_of(lengths[1], end_last=False)])
    together = net.logits(rows)
    for row, logits, sizes in zip(rows, together, lengths, strict=True):
        for document, ours in zip(row.split(sizes), logits.split(sizes), strict=True):
            torch.testing.assert_close(ours, net.logits(document[None])[0], atol=1e-5, rtol=1e-4)
    targets = torch.randint(0, 300, rows.shape)
    net(rows, targets).backward()
    whole = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    for row, target, sizes in zip(rows, targets, lengths, strict=True):
        for document, wanted in zip(row.split(sizes), target.split(sizes), strict=True):
            net(document[None], wanted[None]).backward()
    for ours, theirs in zip(whole, net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad, atol=1e-4, rtol=1e-3)


def packed_inputs(device="cpu"):
    """Queries of 4 heads, keys and narrower values of 2, for two rows of documents."""
    torch.manual_seed(0)
    shapes = ((4, 12), (2, 12), (2, 6))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [3] * 8 + [4]])
    return [torch.randn(2, 9, *shape, device=device).requires_grad_() for shape in shapes], documents


def test_packed_documents_equal_the_mask_spelt_out():
    qkv, documents = packed_inputs()
    packed, spelt_out = AttentionMask(documents=documents), AttentionMask(documents=documents, window=9)
    assert packed.document_lengths == [3, 2, 4, 8, 1]
    assert packed.packs(9) and not spelt_out.packs(9) and not packed.packs(1)
    ours, wanted = (Full().attend([Dense(*qkv)], mask, 0.4) for mask in (packed, spelt_out))
    torch.testing.assert_close(ours, wanted)
    weight = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), qkv) for x in (ours, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_kernel_for_packed_documents_is_given_what_it_takes(monkeypatch):
    """Only its shapes, forward and backward: the kernel itself needs a GPU (`test_on_gpu.py`)."""

    kernel = varlen.varlen_attn

    def checked(q, k, v, *bounds_and_longest, **options):
        assert q.size(-1) == k.size(-1) == v.size(-1) == 16  # one width, a multiple of 8
        assert [x.tolist() for x in bounds_and_longest[:2]] == [[0, 3, 5, 9, 17, 18]] * 2
        assert all(x.dtype == torch.int32 for x in bounds_and_longest[:2]) and bounds_and_longest[2:] == (8, 8)
        return kernel(q, k, v, *bounds_and_longest, **options)

    monkeypatch.setattr(varlen, "varlen_attn", checked)
    qkv, documents = packed_inputs("meta")
    out = sdpa.attend_documents(Dense(*qkv), AttentionMask(documents=documents), 0.4, window=3)
    assert out.is_meta and out.shape == (2, 9, 4, 6)
    out.sum().backward()
    assert [x.grad.shape for x in qkv] == [x.shape for x in qkv]


def test_a_compiled_model_learns_the_same():
    net = masked("gqa")
    compiled = torch.compile(net, backend="aot_eager")
    for lengths in ([5, 1, 9, 4], [13, 6], [2, 17]):
        row = row_of(lengths)[None]
        torch.testing.assert_close(compiled(row, row), net(row, row))


@pytest.mark.parametrize("model", MODELS)
def test_without_the_mask_documents_see_each_other(model):
    net = masked(model)
    net.config.document_end = None
    row = row_of([5, 6])
    assert not torch.allclose(net.logits(row[None])[0, 5:], net.logits(row[None, 5:])[0], atol=1e-4)


def test_cores_that_cannot_are_refused():
    with pytest.raises(ConfigError, match="data.document_mask=true: core=blind cannot mask documents; use core=full"):
        small_config("mha", "data.document_mask=true", f"core._target_={__name__}.Blind", "core.name=blind")
    network = small_network("mha", document_end=END)
    for core in (Blind(), Full(kernel="factors")):
        network.core = core
        with pytest.raises(
            ValueError, match=f"core={core.name}: cannot mask documents; use core=full core.kernel=sdpa"
        ):
            Transformer(network)
