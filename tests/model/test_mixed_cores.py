"""Cores by layer, and what a run's configuration keeps of a core."""

import pytest
import torch

from configs.block import to_dict
from configs.errors import ConfigError
from configs.load import load
from model import counting
from model.cores.full import Full
from model.cores.sequence_tensor import SequenceTensor
from model.transformer import Transformer
from tests.model.helpers import small_config, small_network, wake_up
from training.config import Config


def test_every_so_many_layers_attend_in_full():
    network = small_network("mha", "core=sequence_tensor", "core.full_every=4", "size.n_layers=9", "core.fold=[3,4]")
    net = Transformer(network)
    kinds = [type(block.attention.core) for block in net.blocks]
    assert kinds == [SequenceTensor, SequenceTensor, SequenceTensor, Full] * 2 + [SequenceTensor]
    folded, full = (core.flops_per_token(network.attention, 96) for core in (network.core, Full()))
    alone = small_network("mha", "core=sequence_tensor", "size.n_layers=9", "core.fold=[3,4]")
    more = counting.training_flops_per_token(network, 96) - counting.training_flops_per_token(alone, 96)
    assert more == pytest.approx(3 * 2 * (full - folded))


def test_full_every_layer_is_full_attention():
    torch.manual_seed(0)
    tokens = torch.randint(0, 300, (2, 13))
    mixed = wake_up(Transformer(small_network("t6", "core=sequence_tensor", "core.fold=[3,4]", "core.full_every=1")))
    plain = Transformer(small_network("t6"))
    plain.load_state_dict(mixed.state_dict())
    assert torch.equal(mixed.logits(tokens), plain.logits(tokens))


def test_the_fold_is_resolved_once_from_the_training_length_and_kept():
    config = small_config("mha", "core=sequence_tensor", "trainer.seq_len=512")
    assert config.core.fold == [16, 32]
    tree = to_dict(config)
    tree["trainer"]["seq_len"] = 4096  # another length, as in evaluation: the inner axis stays, the last one grows
    again = load(tree, Config, world_size=1)
    assert again.core.fold == [16, 32] and again.core.sizes(4096) == [16, 256]
    assert config.identity()["core.fold"] == [16, 32]


@pytest.mark.parametrize("fold", ["0", "[]", "[4,0]", "[4,true]", "[4,2.5]", "near", "null"])
def test_folds_that_are_none(fold):
    with pytest.raises(ConfigError, match="core.fold"):
        small_config("mha", "core=sequence_tensor", f"core.fold={fold}")


def test_what_does_not_fit_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="core=sequence_tensor cannot mask documents, since a query reaches a past"):
        small_config("mha", "core=sequence_tensor", "data.document_mask=true")
    for key, value in (("rope", "none"), ("full_every", "0")):
        with pytest.raises(ConfigError, match=f"core.{key}="):
            small_config("mha", "core=sequence_tensor", f"core.{key}={value}")
    with pytest.raises(ConfigError, match="core.window=0: must be at least 1"):
        small_config("mha", "core=sliding_window", "core.window=0")
