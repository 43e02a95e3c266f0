"""Networks that transformers has too: the same function in its configuration and weights."""

from model.dialects.common import Dialect
from model.dialects.deepseek import DEEPSEEK
from model.dialects.llama import LLAMA
from model.transformer import TransformerConfig

DIALECTS = (LLAMA, DEEPSEEK)


def of_network(network: TransformerConfig) -> Dialect | None:
    """Return the dialect that has a network, None if none has."""
    return next((dialect for dialect in DIALECTS if dialect.why_not(network) is None), None)


def of_model_type(model_type: str | None) -> Dialect | None:
    """Return the dialect of a config.json, None if there is none."""
    return next((dialect for dialect in DIALECTS if model_type in dialect.model_types), None)
