"""A T6 network for transformers: the run's own model behind `forward`, `generate` and a cache of theirs."""

from importlib import import_module

import torch
from torch import Tensor
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from eval.export.templates.configuration_t6 import T6Config
from model.cache import KVCache
from model.transformer import Transformer, TransformerConfig

NO_MEANING = {"return_dict", "num_items_in_batch", "output_attentions", "output_hidden_states", "cache_position"}


def block(tree: dict):
    """Return a block of the configuration as the class that it names, which is in a file next to this one."""
    module, _, name = tree["_target_"].rpartition(".")
    made = getattr(import_module(f".{module.replace('.', '_')}", __package__), name)
    return made.model_validate({key: value for key, value in tree.items() if key != "_target_"})


class T6Cache(Cache):
    """What decoding keeps: the model's own cache, made by the first tokens, which show how many rows there are."""

    def __init__(self):
        super().__init__(layers=[])
        self.kept: KVCache | None = None
        self.columns = 0  # tokens so far, padding included

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.kept.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.kept.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.kept.select(torch.arange(self.kept.batch).repeat_interleave(repeats))

    def reset(self) -> None:
        self.kept, self.columns = None, 0

    def crop(self, *_) -> None:
        raise NotImplementedError("a T6 cache cannot drop tokens; generate without an assistant model")


class T6ForCausalLM(PreTrainedModel, GenerationMixin):
    """`model` is the network; its head is tied to its embedding."""

    config_class = T6Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block",)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: T6Config):
        super().__init__(config)
        network = TransformerConfig(
            block(config.mechanism), block(config.core), config.num_hidden_layers, config.hidden_size,
            config.intermediate_size, config.vocab_size, config.rms_norm_eps, config.document_end_token_id,
        )  # fmt: skip
        self.model = Transformer(network)
        self.gradient_checkpointing = False
        self.post_init()

    def _init_weights(self, module) -> None:
        """Change nothing: the network draws its weights itself."""

    def get_input_embeddings(self):
        return self.model.embedding

    def set_input_embeddings(self, value) -> None:
        self.model.embedding = value

    def get_output_embeddings(self):
        return self.model.head

    def set_output_embeddings(self, value) -> None:
        self.model.head = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: T6Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Return logits [B, T, V] for input_ids [B, T], and the mean loss of `labels` [B, T] if there are any.

        What `attention_mask` [B, T] (or [B, past + T] with a cache) hides is left out: the other tokens of its row are
        at positions 0, 1, 2 ..., wherever the padding is. A cache is used if `use_cache` is true or one is given, and
        only without a gradient. Positions of one's own, embeddings as inputs and masks of pairs are not supported.
        """
        if unknown := sorted(key for key in kwargs.keys() - NO_MEANING if kwargs[key] is not None):
            raise TypeError(f"T6ForCausalLM takes no {', '.join(unknown)}")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask has {attention_mask.ndim} dimensions: it must be [batch, tokens]")
        seen = None if attention_mask is None else attention_mask[:, -input_ids.size(1) :].bool()
        if labels is None and (use_cache or past_key_values is not None):
            cache = T6Cache() if past_key_values is None else past_key_values
            logits = self.decode(input_ids, seen, cache)
            return CausalLMOutputWithPast(logits=last(logits, logits_to_keep), past_key_values=cache)
        self.model.recompute = self.gradient_checkpointing
        order = None if seen is None else seen.logical_not().argsort(dim=1, stable=True)  # padding goes last
        tokens = input_ids if order is None else input_ids.gather(1, order)
        hidden = self.model.hidden(tokens)
        if order is not None:
            hidden = hidden.take_along_dim(order.argsort(dim=1)[..., None], dim=1)
        logits = self.model.head(self.model.final_norm(last(hidden, logits_to_keep)))
        loss = None
        if labels is not None:
            normalizer = {"num_items_in_batch": kwargs.get("num_items_in_batch")}
            loss = self.loss_function(logits, labels, self.config.vocab_size, **normalizer)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    def decode(self, tokens: Tensor, seen: Tensor | None, cache: T6Cache) -> Tensor:
        """Return logits [B, T, V] for tokens [B, T] that follow what `cache` holds; `seen` is false for padding."""
        if not isinstance(cache, T6Cache):
            raise TypeError(f"past_key_values is a {type(cache).__name__}: a T6 model keeps factors in a T6Cache")
        if cache.kept is None:
            cache.kept = self.model.new_cache(tokens.size(0))
        cache.columns += tokens.size(1)
        if seen is None or seen.all():
            return self.model.decode(tokens, cache.kept, last=False)
        order = seen.logical_not().argsort(dim=1, stable=True)
        logits = self.model.decode(tokens.gather(1, order), cache.kept, counts=seen.sum(dim=1), last=False)
        return logits.take_along_dim(order.argsort(dim=1)[..., None], dim=1)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs: dict, *args, **kwargs) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(f"cache_implementation={generation_config.cache_implementation}: a T6 model has its own")
        if generation_config.use_cache and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = T6Cache()


def last(x: Tensor, keep: int | Tensor) -> Tensor:
    """Return the last `keep` positions of x [B, T, ...], all of them for 0, or those that a tensor names."""
    return x[:, -keep:] if isinstance(keep, int) else x[:, keep]
