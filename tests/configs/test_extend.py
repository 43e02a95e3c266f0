"""The length-extension experiments compose, keep their fold, and name the run they start from."""

from pathlib import Path

import pytest

from configs.app import CONFIGS, configured
from configs.errors import ConfigError
from model.cores.sequence_tensor import SequenceTensor
from training.config import Config

NAMES = sorted(p.stem for p in Path(CONFIGS, "experiment/extend").glob("*.yaml") if not p.stem.startswith("common"))


@pytest.mark.parametrize("name", NAMES)
def test_an_extension_composes_for_any_mechanism(name):
    config = configured(Config, [f"experiment=extend/{name}", "model=mha", "trainer.init_from=runs/mine"], world_size=1)
    assert config.trainer.init_from == "runs/mine" and config.model.name == "mha"
    if isinstance(config.core, SequenceTensor):
        n_1, n_2, *rest = config.core.fold
        assert n_1 * n_2 == config.trainer.seq_len and config.core.sizes(config.trainer.seq_len) == [n_1, n_2, *rest]


def test_more_blocks_and_a_new_axis_are_one_function_up_to_the_training_length():
    blocks, axis = (configured(Config, [f"experiment=extend/{n}"]).core for n in ("fold", "fold_new_axis"))
    assert blocks.sizes(2048) == axis.sizes(2048)[:2]
    assert (blocks.sizes(8192), axis.sizes(8192)) == ([32, 256], [32, 64, 4])


def test_yarn_knows_the_length_that_training_began_at():
    model = configured(Config, ["experiment=extend/yarn", "model=gqa"]).model
    assert (model.rope_scaling, model.rope_factor, model.rope_original_length) == ("yarn", 4.0, 512)
    assert configured(Config, ["experiment=extend/full"]).model.scaling is None
    with pytest.raises(ConfigError, match="rope_scaling and model.rope_factor go together"):
        configured(Config, ["model.rope_factor=4"])
    with pytest.raises(ConfigError, match="must be none, linear, ntk or yarn"):
        configured(Config, ["model.rope_scaling=alibi", "model.rope_factor=4"])
    for factor, message in (("1000", "model.rope_original_length=0: must be at least 1"), ("inf", "rope_factor=inf")):
        with pytest.raises(ConfigError, match=message):
            configured(Config, ["trainer.seq_len=256", "model.rope_scaling=yarn", f"model.rope_factor={factor}"])
