"""Small models of every mechanism, for the tests that hold for all of them."""

import os
from pathlib import Path

from configs.app import choices, configured
from model.transformer import Transformer, TransformerConfig
from training.config import Config

PACKAGED = choices("model")
# A mechanism kept outside this repository is tested with T6_EXTRA_CONFIGS=FOLDER, which holds model/NAME.yaml.
EXTRA = os.environ.get("T6_EXTRA_CONFIGS")
MODELS = [path.stem for path in sorted(Path(EXTRA, "model").glob("*.yaml"))] if EXTRA else PACKAGED
SEARCH = [f"hydra.searchpath=[file://{EXTRA}]"] if EXTRA else []
FACTORED = [model for model in PACKAGED if model.startswith("t6")]
# Small but generic: an odd d_ff, two layers, more heads than key-value heads.
SMALL = ["size=tiny", "size.n_layers=2", "size.d_model=48", "size.head_dim=16", "tokenizer.vocab_size=300"]
SMALL_BY_MODEL = {"mla": ["model.q_lora_rank=20", "model.kv_lora_rank=12", "model.qk_rope_head_dim=4"]}


def config_of(model: str, *overrides: str) -> Config:
    return configured(Config, [*SEARCH, f"model={model}", *overrides])


def small_config(model: str, *overrides: str) -> Config:
    return config_of(model, *SMALL, *SMALL_BY_MODEL.get(model, []), *overrides)


def small_network(model: str, *overrides: str, document_end: int | None = None) -> TransformerConfig:
    return small_config(model, f"data.document_mask={document_end is not None}", *overrides).network(document_end)


def wake_up(model: Transformer) -> Transformer:
    """Give the output projections, which start at zero, weights, so that attention has an effect."""
    for block in model.blocks:
        block.attention.out_proj.reset_parameters()
        block.mlp.down_proj.reset_parameters()
    return model
