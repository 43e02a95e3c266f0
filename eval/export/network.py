"""A network as transformers has it: a class of its own if one is the same function, else T6 with the run's code."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from configs.block import to_dict
from eval.export.sources import sources
from model import dialects
from model.transformer import Transformer


@dataclass
class Exported:
    """`config` is config.json without what the tokenizer and the run say; `files` are further texts by name."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    files: dict[str, str]
    own_code: bool = False


def exported(model: Transformer) -> Exported:
    """Return the configuration, the weights and the code of a model."""
    network, state = model.config, dict(weights_of(model))
    if dialect := dialects.of_network(network):
        return Exported(dialect.config(network), dialect.to_theirs(state, network), {})
    attention, core = network.attention.replace(by_size={}), network.core.replace(kernel="auto")
    config = {
        "architectures": ["T6ForCausalLM"],
        "model_type": "t6",
        "auto_map": {
            "AutoConfig": "configuration_t6.T6Config",
            "AutoModelForCausalLM": "modeling_t6.T6ForCausalLM",
        },
        "vocab_size": network.vocab_size,
        "hidden_size": network.d_model,
        "intermediate_size": network.d_ff,
        "num_hidden_layers": network.n_layers,
        "num_attention_heads": attention.n_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": network.norm_eps,
        "tie_word_embeddings": True,
        "mechanism": to_dict(attention),
        "core": to_dict(core),
        "document_end_token_id": network.document_end,
    }
    files = sources({type(attention), *map(type, network.cores)})
    return Exported(config, {f"model.{name}": tensor for name, tensor in state.items()}, files, True)


def weights_of(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by name, without the head, which is the embedding."""
    for name, tensor in model.state_dict().items():
        if name != "head.weight":
            yield name, tensor.detach().cpu()
