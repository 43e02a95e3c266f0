"""What must hold for every mechanism: a new YAML in configs/model/ is tested here without being written down."""

from math import prod

import pytest
import torch
import torch.nn.functional as F

from configs.app import choices
from data.loader import IGNORED
from model import counting, transformer
from model.mask import AttentionMask
from model.transformer import Transformer
from tests.model.helpers import MODELS, compiles_once, config_of, small_network, wake_up


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("size", choices("size"))
@pytest.mark.parametrize("model", MODELS)
def test_every_size_builds_with_the_counted_parameters_and_the_parameters_of_mha(model, size):
    ours, mha = (config_of(name, f"size={size}", "tokenizer=gpt2").network() for name in (model, "mha"))
    with torch.device("meta"):
        built = Transformer(ours)
    assert count(built) == counting.num_params(ours)
    assert count(built.blocks[0].attention) == ours.attention.num_params(ours.d_model)
    assert abs(counting.num_params(ours) / counting.num_params(mha) - 1) < 0.03


@pytest.mark.parametrize("model", MODELS)
def test_head_counts_are_matched_for_a_size_of_ones_own(model):
    network = small_network(model)
    budget, ours = 4 * network.d_model**2, network.attention.num_params(network.d_model)
    for change in (-1, 1):
        n_heads = network.attention.n_heads + change * network.attention.head_multiple
        if n_heads > 0:
            other = network.attention.replace(n_heads=n_heads)
            assert abs(other.num_params(network.d_model) - budget) >= abs(ours - budget)


@pytest.mark.parametrize("model", MODELS)
def test_a_later_token_changes_no_earlier_logit(model):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model)))
    tokens = torch.randint(0, 300, (2, 13))
    before = net.logits(tokens)
    for t in (1, 7, 12):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 300
        after = net.logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("model", MODELS)
def test_attention_depends_on_relative_positions_alone(model):
    torch.manual_seed(1)
    attention = wake_up(Transformer(small_network(model))).double().blocks[0].attention
    x = torch.randn(2, 9, 48, dtype=torch.float64)
    positions = torch.arange(9)[None]
    here, there = attention(x, positions, AttentionMask()), attention(x, positions + 5, AttentionMask())
    assert torch.allclose(here, there, atol=1e-6)
    assert not torch.allclose(here, attention(x, positions * 2, AttentionMask()), atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_one_batch_is_learnt_by_heart(model):
    torch.manual_seed(0)
    net = Transformer(small_network(model))
    tokens = torch.randint(0, 300, (2, 33))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(150):
        loss = net(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient(model):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model)))
    tokens = torch.randint(0, 300, (1, 8))
    net(tokens, tokens).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("model", MODELS)
def test_recomputing_activations_changes_nothing(model):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model)))
    tokens = torch.randint(0, 300, (2, 11))
    grads = []
    for recompute in (False, True):
        net.recompute = recompute
        net.zero_grad()
        net(tokens, tokens).backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_logits_are_formed_by_chunks_where_nothing_is_kept_of_them(monkeypatch):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network("t6")))
    tokens, targets = torch.randint(0, 300, (2, 2, 11))
    targets[1, 4:9] = IGNORED
    sizes = []
    net.head.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0][..., 0].numel()))

    def found(recompute):
        net.recompute = recompute
        net.zero_grad()
        net(tokens, targets).backward()
        with torch.no_grad():
            losses = [net(tokens, targets, reduction=reduction) for reduction in ("sum", "none")]
            logits = net.logits(tokens).transpose(1, 2)
        for loss, reduction in zip(losses, ("sum", "none"), strict=True):
            torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction=reduction))
        return [*losses, *(p.grad.clone() for p in net.parameters())]

    whole, same = found(recompute=False), found(recompute=True)
    assert all(map(torch.equal, whole, same)) and set(sizes) == {22}
    monkeypatch.setattr(transformer, "LOSS_CHUNK", 6)
    for recompute, forward_and_backward in ((True, [6, 6, 6, 4, 4, 6, 6, 6]), (False, [22])):
        sizes.clear()
        for ours, wanted in zip(found(recompute), whole, strict=True):
            torch.testing.assert_close(ours, wanted)
        assert sizes == [*forward_and_backward, *[6, 6, 6, 4] * 2, 22]


@pytest.mark.parametrize("model", MODELS)
def test_bf16_autocast_keeps_fp32_weights_and_comes_close(model):
    torch.manual_seed(0)
    net = wake_up(Transformer(small_network(model)))
    tokens = torch.randint(0, 300, (2, 16))
    exact = net(tokens, tokens) / tokens.numel()
    net.autocast_dtype = torch.bfloat16
    rough = net(tokens, tokens) / tokens.numel()
    rough.backward()
    assert rough.dtype == torch.float32 and net.embedding.weight.grad.dtype == torch.float32
    assert abs(exact - rough) < 0.02 * exact


@pytest.mark.parametrize("model", MODELS)
def test_a_training_step_compiles_once(model):
    assert compiles_once(Transformer(small_network(model, "size.n_layers=1")))


@pytest.mark.parametrize("model", MODELS)
def test_cache_shapes_are_what_the_factors_have(model):
    config = small_network(model).attention
    assert counting.kv_numbers_per_token(config) == sum(prod(s) for s in config.cache_shapes().values()) > 0
