"""What must hold for every core with every mechanism that fits it: a new YAML in configs/core/ is tested here too."""

from functools import cache

import pytest
import torch

from configs.app import choices
from configs.errors import ConfigError
from model import counting
from model.transformer import Transformer
from tests.model.helpers import MODELS, compiles_once, small_config, wake_up

# Full attention through explicit keys and values is in test_every_mechanism.
CORES = ["full core.kernel=factors", *(core for core in choices("core") if core != "full")]
END = 7  # the token that ends a document
# Sizes at which 13 tokens span several blocks and end inside of one.
SMALL_BY_CORE = {"sequence_tensor": ["core.fold=[3,4]"], "sliding_window": ["core.window=4"]}


@cache
def configured(model: str, core: str, *overrides: str):
    return small_config(model, *f"core={core}".split(), *SMALL_BY_CORE.get(core, []), *overrides)


def network(model: str, core: str, *overrides: str) -> Transformer:
    config = configured(model, core, *overrides)
    try:
        config.core.check(config.model, "cpu", torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    torch.manual_seed(0)
    return wake_up(Transformer(config.network()))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", MODELS)
def test_a_later_token_changes_no_earlier_logit(model, core):
    net = network(model, core)
    tokens = torch.randint(0, 300, (2, 13))
    before = net.logits(tokens)
    for t in (1, 7):
        changed = tokens.clone()
        changed[:, t] = (changed[:, t] + 1) % 300
        after = net.logits(changed)
        assert torch.equal(before[:, :t], after[:, :t])
        assert not torch.allclose(before[:, t:], after[:, t:])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_gets_a_gradient_and_recomputing_changes_none(model, core):
    net = network(model, core)
    tokens = torch.randint(0, 300, (2, 13))
    grads = []
    for recompute in (False, True):
        net.recompute = recompute
        net.zero_grad()
        net(tokens, tokens).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        grads.append([p.grad.clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", MODELS)
def test_bf16_autocast_comes_close(model, core):
    net = network(model, core)
    tokens = torch.randint(0, 300, (2, 13))
    exact = net(tokens, tokens) / tokens.numel()
    net.autocast_dtype = torch.bfloat16
    assert abs(net(tokens, tokens) / tokens.numel() - exact) < 0.02 * exact


@pytest.mark.parametrize("core", CORES)
def test_a_training_step_compiles_once(core):
    assert compiles_once(network("t6", core, "size.n_layers=1"))


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", MODELS)
def test_decoding_from_a_cache_equals_the_full_pass(model, core):
    mixed = ["core.full_every=2"] if core in SMALL_BY_CORE else []
    net, tokens = network(model, core, *mixed).eval(), torch.randint(0, 300, (2, 14))
    cache = net.new_cache(2)
    steps = [net.decode(piece, cache, last=False) for piece in tokens.split([5, 2, *[1] * 7], dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), net.logits(tokens), atol=1e-5, rtol=1e-4)
    counted = cache.batch * cache.capacity * counting.kv_bytes_per_token(net.config, torch.float32)
    assert counted <= cache.nbytes <= 1.1 * counted  # a fold keeps unfinished blocks, too


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", MODELS)
def test_documents_do_not_see_each_other_or_are_refused(model, core):
    if not configured(model, core).core.masks_documents:
        with pytest.raises(ConfigError, match="data.document_mask=true: core=.* cannot mask documents"):
            configured(model, core, "data.document_mask=true")
        return
    config = configured(model, core, "data.document_mask=true")
    torch.manual_seed(0)
    net, row = wake_up(Transformer(config.network(end_of_text=END))), torch.randint(END + 1, 300, (15,))
    row[5], row[11] = END, END
    alone = [net.logits(document[None])[0] for document in row.split([6, 6, 3])]
    torch.testing.assert_close(net.logits(row[None])[0], torch.cat(alone), atol=1e-5, rtol=1e-4)
