"""The paper's experiments compose, build and have its hyper-parameters and head counts."""

import pytest
import torch

from configs.app import choices, configured
from model import counting
from model.transformer import Transformer
from tests.model.test_counting import PAPER_HEADS
from training.config import Config

SIZES = ("small", "medium", "large", "xl")
ABLATIONS = sorted(set(choices("experiment")) - {f"paper/{size}" for size in SIZES} - {"paper/common"})
PRESETS = {f"{model}_{size}": (f"paper/{size}", f"model={model}") for model in PAPER_HEADS for size in SIZES}
PRESETS |= {name.removeprefix("paper/"): (name,) for name in ABLATIONS if name.startswith("paper/")}
PEAK_LR = {"small": (6e-4, 3e-5), "medium": (6e-4, 3e-5), "large": (2e-4, 1e-5), "xl": (1e-4, 1e-5)}


def preset(name: str, *overrides: str):
    experiment, *model = PRESETS[name]
    return configured(Config, [f"experiment={experiment}", *model, *overrides], world_size=8)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_papers_settings_and_builds(name):
    config = preset(name)
    size = config.size.name
    model = name.removesuffix(f"_{size}")
    trainer, optim = config.trainer, config.optim
    assert (trainer.seq_len, trainer.global_batch_size, trainer.horizon) == (1024, 480, 100_000)
    assert trainer.horizon * trainer.tokens_per_step == pytest.approx(49.15e9, rel=1e-3)
    assert (optim.lr, optim.lr * config.schedule.min_lr_ratio) == pytest.approx(PEAK_LR[size])
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.grad_clip) == (0.9, 0.95, 0.1, 1.0)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 2000)
    assert config.tokenizer.name == "gpt2" and config.tokenizer.padded_vocab_size == 50304
    if model in PAPER_HEADS:
        assert config.model.n_heads == PAPER_HEADS[model][SIZES.index(size)]
    network = config.network()
    with torch.device("meta"):
        built = Transformer(network)
    assert sum(p.numel() for p in built.parameters()) == counting.num_params(network)
    assert config.model.num_params(config.size.d_model) == pytest.approx(4 * config.size.d_model**2, rel=0.035)


def test_a_preset_can_be_overridden():
    config = preset("t6_small", "model.q_rank=4", "optim.lr=3e-4", "trainer.max_steps=7")
    assert (config.model.q_rank, config.optim.lr, config.trainer.horizon) == (4, 3e-4, 7)
