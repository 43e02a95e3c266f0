"""Small models of every mechanism, for the tests that hold for all of them."""

import torch
from torch._dynamo.testing import CompileCounter

from configs.app import CONFIGS, configured, own_folders
from model.attention.base import AttentionConfig
from model.attention.multi_head import MultiHeadAttention
from model.attention.tensor_product import TensorProductAttention, TensorProductConfig
from model.transformer import Transformer, TransformerConfig
from training.config import Config

PACKAGED = sorted(path.stem for path in CONFIGS.glob("model/*.yaml"))
# Mechanisms kept outside this repository are tested alone, with T6_CONFIGS=FOLDER, which holds model/NAME.yaml.
MODELS = [path.stem for own in own_folders() for path in sorted(own.glob("model/*.yaml"))] or PACKAGED
FACTORED = [model for model in PACKAGED if model.startswith("t6")]
# Small but generic: an odd d_ff, two layers, more heads than key-value heads.
SMALL = ["size=tiny", "size.n_layers=2", "size.d_model=48", "size.head_dim=16", "tokenizer.vocab_size=300"]
SMALL_BY_MODEL = {"mla": ["model.q_lora_rank=20", "model.kv_lora_rank=12", "model.qk_rope_head_dim=4"]}


def config_of(model: str, *overrides: str) -> Config:
    return configured(Config, [f"model={model}", *overrides])


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


def compiles_once(net: Transformer) -> bool:
    """Return whether torch.compile traces training steps in one graph, and only once; checks their loss."""
    counter = CompileCounter()
    compiled = torch.compile(net, backend=counter, fullgraph=True, isolate_recompiles=True)
    for _ in range(2):
        tokens = torch.randint(0, 300, (2, 13))
        torch.testing.assert_close(compiled(tokens, tokens), net(tokens, tokens))
    return counter.frame_count == 1


@torch.no_grad()
def from_multi_head(attention: MultiHeadAttention) -> TensorProductAttention:
    """Return the TPA that equals an MHA, GQA or MQA module: fixed head factors, its weights as token factors.

    Section 3.3: A_q = H I with R_q = H. For keys and values R = G: MHA has A = H I (G = H), MQA a column of ones
    (G = 1), GQA G times the mask of each group's heads.
    """
    heads, groups = attention.config.n_heads, attention.config.kv_heads
    options = {key: value for key, value in attention.config if key in AttentionConfig.model_fields}
    config = TensorProductConfig(**options, q_rank=heads, k_rank=groups, v_rank=groups, contextual_a=False)
    d_model = attention.qkv_proj.in_features
    made = TensorProductAttention(config, d_model, attention.core).to(attention.qkv_proj.weight)
    made.factor_proj.weight.copy_(attention.qkv_proj.weight)  # q, k, v by head: the token factors of rank H, G, G
    made.out_proj.weight.copy_(attention.out_proj.weight)
    if made.gate_proj is not None:
        made.gate_proj.weight.copy_(attention.gate_proj.weight)
    groups_of_heads = torch.eye(groups).repeat_interleave(heads // groups, dim=0)  # [H, G]: whose keys a head reads
    fixed = {"a_q": heads * torch.eye(heads), "a_k": groups * groups_of_heads, "a_v": groups * groups_of_heads}
    for name, factor in fixed.items():
        getattr(made, name).copy_(factor).requires_grad_(False)
    return made
