"""The paper's experiments compose, build and have its hyper-parameters and head counts."""

import pytest
import torch

from configs.app import choices, configured
from model import counting
from model.transformer import Transformer
from tests.model.test_counting import PAPER_HEADS
from training.config import Config
from training.optim import learning_rate

SIZES = ("small", "medium", "large", "xl")
ABLATIONS = sorted(set(choices("experiment")) - {f"paper/{size}" for size in SIZES} - {"paper/common"})
PRESETS = {f"{model}_{size}": (f"paper/{size}", f"model={model}") for model in PAPER_HEADS for size in SIZES}
PRESETS |= {name.removeprefix("paper/"): (name,) for name in ABLATIONS if name.startswith("paper/")}
CLIP = {"small": 1 / 5, "medium": 1 / 3, "large": 1 / 4, "xl": 1 / 10}  # 1 / the authors' accumulation steps
CLIP |= {"mla_small": 1 / 3, "mha_xl": 1 / 6}
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
    assert (trainer.seq_len, trainer.global_batch_size, trainer.horizon) == (1024, 480, 100_001)
    assert trainer.horizon * trainer.tokens_per_step == pytest.approx(49.15e9, rel=1e-3)
    assert (optim.lr, optim.lr * config.schedule.min_lr_ratio) == pytest.approx(PEAK_LR[size])
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.decay_all) == (0.9, 0.95, 0.1, True)
    assert optim.grad_clip == pytest.approx(CLIP.get(name, CLIP[size]), rel=1e-5)
    assert 480 / (8 * trainer.micro_batch_size) == pytest.approx(1 / optim.grad_clip, rel=1e-5)
    assert config.size.norm_eps == pytest.approx(torch.finfo(torch.float32).eps)
    assert (config.schedule.name, config.schedule.warmup_steps) == ("cosine", 2000)
    rates = [learning_rate(step, 1.0, config.schedule, trainer.horizon) for step in (1, 2, 2001, 100_001)]
    assert rates == pytest.approx([0, 1 / 2000, 1, config.schedule.min_lr_ratio])
    assert config.tokenizer.name == "gpt2" and config.tokenizer.padded_vocab_size == 50304
    if model in PAPER_HEADS:
        assert config.model.n_heads == PAPER_HEADS[model][SIZES.index(size)]
    network = config.network()
    with torch.device("meta"):
        built = Transformer(network)
    assert sum(p.numel() for p in built.parameters()) == counting.num_params(network)
    assert config.model.num_params(config.size.d_model) == pytest.approx(4 * config.size.d_model**2, rel=0.035)


@pytest.mark.parametrize("size", SIZES)
def test_the_fair_presets_treat_all_mechanisms_alike(size):
    fair = [configured(Config, [f"experiment=fair/{size}", f"model={model}"], world_size=8) for model in PAPER_HEADS]
    assert {(c.optim.grad_clip, c.optim.decay_all, c.size.norm_eps) for c in fair} == {(1.0, False, 1e-6)}
    assert {(c.optim.lr, c.trainer.horizon, c.schedule.first_step) for c in fair} == {(PEAK_LR[size][0], 100_000, 1)}


def test_a_preset_can_be_overridden():
    config = preset("t6_small", "model.q_rank=4", "optim.lr=3e-4", "trainer.max_steps=7")
    assert (config.model.q_rank, config.optim.lr, config.trainer.horizon) == (4, 3e-4, 7)
