"""A trained MHA run with a Hugging Face tokenizer, and the same weights as transformers' LlamaForCausalLM."""

import pydoc_data.topics

import pytest
import tokenizers
import torch
import transformers

import train
from configs.app import configured
from data.prepare import prepare
from eval.loading import load_run
from tests.conftest import SMALL_RUN
from training.config import Config

END = "<|endoftext|>"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator((text for _, text in sorted(pydoc_data.topics.topics.items())), trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.fixture(scope="session")
def trained(small_data, tokenizer_file, tmp_path_factory):
    """The run folder: MHA, 2 layers, 64 tokens of context, 12 steps."""
    folder = tmp_path_factory.mktemp("trained")
    overrides = [
        *SMALL_RUN, small_data[0], f"data.dir={folder}/shards", "tokenizer=huggingface", "tokenizer.vocab_size=512",
        f"tokenizer.path={tokenizer_file}", "model=mha", "optim.lr=1e-2", "trainer.max_steps=12", "trainer.samples=0",
        "trainer.eval_every=null", "trainer.keep_checkpoints=9", f"run.dir={folder}/run",
    ]  # fmt: skip
    config = configured(Config, overrides)
    prepare(config.data, config.tokenizer, progress=False)
    assert train.main(config) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def ours(trained):
    return load_run(str(trained), device="cpu")


@pytest.fixture(scope="session")
def theirs(ours):
    """transformers' LLaMA with the run's weights."""
    size, heads = ours.config.size, ours.config.model.n_heads
    config = transformers.LlamaConfig(
        vocab_size=ours.config.tokenizer.padded_vocab_size, hidden_size=size.d_model, intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers, num_attention_heads=heads, head_dim=size.head_dim, rms_norm_eps=size.norm_eps,
        tie_word_embeddings=True, max_position_embeddings=ours.context, attn_implementation="eager",
    )  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    state = {"model.embed_tokens.weight": ours.model.embedding.weight}
    for number, block in enumerate(ours.model.blocks):
        prefix = f"model.layers.{number}"
        for name, weight in zip("qkv", block.attention.qkv_proj.weight.chunk(3), strict=True):
            state[f"{prefix}.self_attn.{name}_proj.weight"] = weight
        gate, up = block.mlp.gate_up_proj.weight.chunk(2)
        state |= {
            f"{prefix}.self_attn.o_proj.weight": block.attention.out_proj.weight,
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": block.mlp.down_proj.weight,
        }
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and all("norm" in name or name == "lm_head.weight" for name in missing)
    with torch.no_grad():
        assert all((p == 1).all() for name, p in llama.named_parameters() if "norm" in name)
    return llama


@pytest.fixture(scope="session")
def their_tokenizer(tokenizer_file):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), eos_token=END, pad_token=END)
