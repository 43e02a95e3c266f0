"""`trainer.init_from` with Hugging Face folders: what fits starts the same function, what does not is named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from configs.errors import ConfigError
from data.tokenizers import HuggingFaceTokenizer
from model.transformer import Transformer
from tests.eval.helpers import write_export
from tests.model.helpers import MODELS, small_network, wake_up
from training import hugging_face

TOKENS = torch.randint(0, 300, (2, 11), generator=torch.Generator().manual_seed(0))
LLAMAS = {"mha": ["model.n_heads=3"], "gqa": ["model.n_heads=4"], "mqa": ["model.n_heads=3"]}


def random_model(model: str, *overrides: str, seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return wake_up(Transformer(small_network(model, *overrides))).eval()


def started(source, model: str, *overrides: str) -> Transformer:
    net = random_model(model, *overrides, seed=1)
    hugging_face.load(source, net)
    return net


@torch.no_grad()
def same(a: Transformer, b: Transformer) -> bool:
    torch.testing.assert_close(a.logits(TOKENS), b.logits(TOKENS), atol=1e-5, rtol=0)
    return a.embedding.weight is a.head.weight


@pytest.mark.parametrize("model", MODELS)
def test_every_export_comes_back(model, tmp_path):
    net = random_model(model)
    write_export(net, tmp_path / "export", max_shard=50_000)
    assert same(started(tmp_path / "export", model), net)


@pytest.mark.parametrize("model", ["t6", "gqa", "mla"])
def test_what_transformers_has_saved_again_comes_back(model, tmp_path):
    net = random_model(model, *LLAMAS.get(model, []))
    has_code = write_export(net, tmp_path / "export")
    AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=has_code).save_pretrained(
        tmp_path / "b"
    )
    assert same(started(tmp_path / "b", model, *LLAMAS.get(model, [])), net)


def test_another_pattern_may_start_from_it(tmp_path):
    net = random_model("t6")
    write_export(net, tmp_path / "t6")
    started(tmp_path / "t6", "t6", "core=sequence_tensor", "core.fold=[3,4]", "model.rope_base=5000")
    write_export(random_model("mha"), tmp_path / "mha")
    started(tmp_path / "mha", "mha", "core=sequence_tensor", "core.fold=[3,4]")


def change(folder, tensors=(), drop=(), **keys) -> None:
    """Change keys of config.json, and tensors of model.safetensors."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    state = load_file(folder / "model.safetensors") | dict(tensors)
    save_file({name: x for name, x in state.items() if name not in drop}, folder / "model.safetensors")


@pytest.fixture
def llama(tmp_path):
    write_export(random_model("gqa", *LLAMAS["gqa"]), tmp_path / "llama")
    return tmp_path / "llama"


def test_yarn_in_anothers_spelling_fits(tmp_path):
    yarn = ["model.rope_scaling=yarn", "model.rope_factor=4", "trainer.seq_len=64"]
    write_export(random_model("mha", *LLAMAS["mha"], *yarn), tmp_path / "theirs")
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
    change(tmp_path / "theirs", rope_scaling=scaling)
    hugging_face.check(tmp_path / "theirs", small_network("mha", *LLAMAS["mha"], *yarn))
    change(tmp_path / "theirs", rope_scaling=scaling | {"attention_factor": 1.0})
    with pytest.raises(ConfigError, match='"attention_factor": 1.0'):
        hugging_face.check(tmp_path / "theirs", small_network("mha", *LLAMAS["mha"], *yarn))
    change(tmp_path / "theirs", rope_scaling=scaling | {"truncate": False})
    with pytest.raises(ConfigError, match='"truncate": false'):
        hugging_face.check(tmp_path / "theirs", small_network("mha", *LLAMAS["mha"], *yarn))


@pytest.mark.parametrize("model", ["gqa", "mla"])
def test_norms_go_into_the_matrices_after_them(model, tmp_path):
    heads = LLAMAS.get(model, [])
    write_export(random_model(model, *heads), tmp_path / "theirs")
    names = [f"model.layers.{i}.{n}_layernorm.weight" for i in (0, 1) for n in ("input", "post_attention")]
    change(tmp_path / "theirs", {name: torch.rand(48) + 0.5 for name in names})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        found = started(tmp_path / "theirs", model, *heads).logits(TOKENS)
        torch.testing.assert_close(found, theirs(TOKENS).logits, atol=1e-5, rtol=0)


def test_a_deepseek_that_does_not_fit_is_named(tmp_path):
    write_export(random_model("mla"), tmp_path / "theirs")
    change(tmp_path / "theirs", first_k_dense_replace=1, kv_lora_rank=16)
    with pytest.raises(ConfigError) as caught:
        hugging_face.check(tmp_path / "theirs", small_network("mla"))
    for text in ("first_k_dense_replace: 1 there, 2 here", "kv_lora_rank: 16 there, 12 here (model.kv_lora_rank)"):
        assert text in str(caught.value)
    with pytest.raises(ConfigError, match="is of type deepseek_v3, which cannot start this run: model=mha"):
        hugging_face.check(tmp_path / "theirs", small_network("mha"))


@pytest.mark.parametrize(
    ("keys", "overrides", "messages"),
    [
        ({"num_attention_heads": 8}, [], ["num_attention_heads: 8 there, 4 here (model.n_heads)"]),
        ({"rope_theta": 5e5, "rms_norm_eps": 1e-5}, [], ["rope_theta: 500000.0 there, 10000.0 here", "rms_norm_eps"]),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            [],
            ['rope_scaling: {"rope_type": "linear", "factor": 2.0} there, null here'],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, [], ["llama3"]),
        ({"tie_word_embeddings": False}, [], ["tie_word_embeddings: false there, true here"]),
        ({"attention_bias": True}, [], ["attention_bias: true there, false here"]),
        ({"hidden_act": "gelu"}, [], ['hidden_act: "gelu" there, "silu" here']),
        ({"model_type": "mistral", "sliding_window": 7}, [], ["sliding_window: 7 there, null here (core.window)"]),
        ({"num_attention_heads": "4"}, [], ['num_attention_heads: "4" there, 4 here (model.n_heads)']),
        ({"num_attention_heads": 0, "head_dim": None}, [], ["config.json has a value of a wrong kind"]),
        ({"rope_scaling": "yarn"}, [], ["config.json has a value of a wrong kind"]),
        ({"model_type": ["llama"]}, [], ["model_type=None"]),
        ({"model_type": "gpt2"}, [], ["model_type=gpt2: must be llama, mistral, deepseek_v3 or t6"]),
        ({}, ["size.n_layers=3"], ["num_hidden_layers: 2 there, 3 here (size.n_layers)"]),
        ({}, ["model.qk_norm=true"], ["is of type llama, which cannot start this run: model.qk_norm=true"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_both_values(llama, keys, overrides, messages):
    change(llama, **keys)
    with pytest.raises(ConfigError) as caught:
        hugging_face.check(llama, small_network("gqa", *LLAMAS["gqa"], *overrides))
    assert len(caught.value.errors) == 1 and all(message in str(caught.value) for message in messages)


def test_a_t6_of_another_mechanism_is_named(tmp_path):
    write_export(random_model("t6"), tmp_path / "t6")
    change(tmp_path / "t6", mechanism=json.loads((tmp_path / "t6/config.json").read_text())["mechanism"] | {"new": 3})
    with pytest.raises(ConfigError, match=r"(?s)model.k_rank: 2 there, 1 here.*model.new: 3 there, null here"):
        hugging_face.check(tmp_path / "t6", small_network("t6", "model.k_rank=1"))
    with pytest.raises(ConfigError, match="model._target_"):
        hugging_face.check(tmp_path / "t6", small_network("mla"))


def test_tensors_that_do_not_fit_are_named(llama):
    network, name = small_network("gqa", *LLAMAS["gqa"]), "model.layers.1.mlp.up_proj.weight"
    change(llama, {"extra.weight": torch.ones(2), name: torch.ones(3, 48)}, drop=["model.embed_tokens.weight"])
    with pytest.raises(ConfigError) as caught:
        hugging_face.check(llama, network)
    lacks, surplus, differs = caught.value.errors
    assert lacks.endswith("lacks tensors: model.embed_tokens.weight")
    assert surplus.endswith("has tensors that this network has not: extra.weight")
    assert f"{name} is [3, 48] and not [128, 48]" in differs


def test_a_last_norm_with_weights_is_refused(llama):
    change(llama, {"model.norm.weight": torch.full((48,), 2.0)})
    with pytest.raises(ConfigError, match="model.norm.weight is not all ones"):
        started(llama, "gqa", *LLAMAS["gqa"])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json cannot be read as JSON"),
        ("config.json", "[1]", "model_type=None"),
        ("model.safetensors", None, "has no model.safetensors"),
        ("model.safetensors", "torn", "model.safetensors cannot be read, it may be cut off"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}', "b.safetensors is missing"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b"}}', "../b is no file of this folder"),
        ("model.safetensors.index.json", '{"weight_map": 3}', "index.json cannot be read"),
    ],
)
def test_broken_files_are_named(llama, file, content, message):
    if content == "torn":
        whole = (llama / file).read_bytes()
        (llama / file).write_bytes(whole[: len(whole) - 100])
    else:
        (llama / "model.safetensors").unlink()
        if content is not None:
            (llama / file).write_text(content)
    with pytest.raises(ConfigError, match=message):
        hugging_face.check(llama, small_network("gqa", *LLAMAS["gqa"]))


def test_code_of_the_folder_never_runs(tmp_path):
    write_export(random_model("t6"), tmp_path / "t6")
    for path in (tmp_path / "t6").glob("*.py"):
        path.write_text("raise SystemExit('this ran')")
    mechanism = json.loads((tmp_path / "t6/config.json").read_text())["mechanism"]
    assert same(started(tmp_path / "t6", "t6"), random_model("t6"))
    change(tmp_path / "t6", mechanism=mechanism | {"_target_": "antigravity.fly"})
    with pytest.raises(ConfigError, match=r"model._target_: \"antigravity.fly\" there"):
        started(tmp_path / "t6", "t6")


@pytest.mark.parametrize("model", LLAMAS)
@pytest.mark.parametrize("variant", [[], ["model.dense_q=true"]])
def test_a_tpa_starts_as_the_llama(model, variant, tmp_path):
    net = random_model(model, *LLAMAS[model])
    write_export(net, tmp_path / "llama")
    tpa = ["model.contextual_a=false", *LLAMAS[model], "model.q_rank=4", "model.k_rank=4", "model.v_rank=5", *variant]
    found = started(tmp_path / "llama", "t6", *tpa)
    assert same(found, net)
    found.loss(TOKENS, TOKENS).backward()
    assert all(p.grad.abs().sum() > 0 for p in found.parameters())


def test_a_tpa_that_cannot_be_the_llama_is_told_why(llama):
    network = small_network("t6", *LLAMAS["gqa"], "model.q_rank=2", "model.k_rank=1", "model.v_rank=2")
    with pytest.raises(ConfigError) as caught:
        hugging_face.check(llama, network)
    reasons = [line.partition(": ")[2] for line in caught.value.errors]
    assert reasons[0].startswith("model.contextual_a=true: a TPA equals a Llama only with model.contextual_a=false")
    assert [reason.partition(":")[0] for reason in reasons[1:]] == ["model.q_rank=2", "model.k_rank=1"]
    assert "at least 4 to equal its 4 heads with 2 for keys" in reasons[1]


def test_a_tpa_with_other_heads_is_named(llama):
    network = small_network("t6", "model.contextual_a=false", "model.n_heads=5", "model.k_rank=3", "model.v_rank=3")
    with pytest.raises(ConfigError, match="num_attention_heads: 4 there, 5 here"):
        hugging_face.check(llama, network)


def test_another_tokenizer_is_refused(llama):
    change(llama, pretraining={"tokenizer_fingerprint": "a" * 64})
    hugging_face.check_tokenizer(llama, "a" * 64, "<|endoftext|>")
    with pytest.raises(ConfigError, match="fingerprint aaaaaaaaaaaa, not bbbbbbbbbbbb"):
        hugging_face.check_tokenizer(llama, "b" * 64, "<|endoftext|>")
    change(llama, pretraining=None)
    hugging_face.check_tokenizer(llama, "b" * 64, "<|endoftext|>")  # nothing tells
    (llama / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="tokenizer=huggingface"):
        hugging_face.check_tokenizer(llama, "b" * 64, "<|endoftext|>")
    change(llama, pretraining={"tokenizer_fingerprint": "a" * 64})
    own = HuggingFaceTokenizer.fingerprint_of("{}", "<|endoftext|>")
    hugging_face.check_tokenizer(llama, own, "<|endoftext|>")  # the data was prepared with the folder's
