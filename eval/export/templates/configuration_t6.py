"""The configuration of a T6 network for transformers."""

from transformers import PretrainedConfig


class T6Config(PretrainedConfig):
    """Next to the usual keys (`hidden_size`, `num_hidden_layers` ...), what makes queries, keys and values and attends.

    `mechanism` and `core` are blocks of a run's configuration, `_target_` included. `document_end_token_id`: the token
    that ends a document, if tokens attend to their own document only.
    """

    model_type = "t6"

    def __init__(self, mechanism=None, core=None, document_end_token_id=None, **kwargs):
        self.mechanism = mechanism or {}
        self.core = core or {}
        self.document_end_token_id = document_end_token_id
        super().__init__(**kwargs)
