"""Exports as transformers loads them: the logits, texts, gradients and token ids of the run they come from."""

import shutil

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from configs.app import CONFIGS
from eval.export.network import exported
from model import dialects
from model.transformer import Transformer
from tests.eval.helpers import write_export
from tests.model.helpers import MODELS, small_network, wake_up

CORES = sorted(path.stem for path in CONFIGS.glob("core/*.yaml"))
SMALL_BY_CORE = {"sequence_tensor": ["core.fold=[3,4]"], "sliding_window": ["core.window=4"]}
OPTIONS = [
    ("mha", "model.rope_scaling=linear", "model.rope_factor=2"),
    ("gqa", "model.rope_scaling=ntk", "model.rope_factor=2"),
    ("mqa", "model.rope_scaling=yarn", "model.rope_factor=4", "trainer.seq_len=64"),
    ("gqa", "model.n_heads=6", "model.rope_base=500000", "size.norm_eps=1e-5"),  # 48 is a multiple of 6
    ("mha", "model.qk_norm=true"),
    ("gqa", "model.output_gate=true"),
    ("mha", "model.rope_fraction=0.5"),
    ("mha", "core=sliding_window", "core.window=4", "core.full_every=2"),
    ("t6", "core=sequence_tensor", "core.fold=[3,4]", "core.full_every=2", "model.qk_norm=true"),
    ("t6", "model.rope_scaling=yarn", "model.rope_factor=4", "trainer.seq_len=64", "model.output_gate=true"),
    ("t6", "core.kernel=factors"),
    ("mla", "model.qk_norm=true"),
    ("mla", "model.rope_scaling=yarn", "model.rope_factor=4", "trainer.seq_len=64", "model.n_heads=5"),
    ("mla", "model.rope_scaling=linear", "model.rope_factor=2"),
]
LENGTHS = (9, 4, 1, 7)  # of rows that share a batch
TOKENS = torch.randint(3, 300, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
PROMPTS = [row[:length].tolist() for row, length in zip(TOKENS, LENGTHS, strict=True)]


def random_model(model: str, *overrides: str, document_end: int | None = None) -> Transformer:
    torch.manual_seed(0)
    return wake_up(Transformer(small_network(model, *overrides, document_end=document_end))).eval()


def load_export(net: Transformer, folder, **options):
    """Return the model that transformers loads from an export of `net`."""
    has_code = write_export(net, folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=has_code).eval()


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return PROMPTS [B, T] padded with token 0 on one side, and their mask."""
    longest = max(LENGTHS)
    rows = [([0] * (longest - len(p)) + p, [0] * (longest - len(p)) + [1] * len(p)) for p in PROMPTS]
    if side == "right":
        rows = [(p + [0] * (longest - len(p)), [1] * len(p) + [0] * (longest - len(p))) for p in PROMPTS]
    tokens, mask = zip(*rows, strict=True)
    return torch.tensor(tokens), torch.tensor(mask)


@torch.no_grad()
def check_same(net: Transformer, theirs) -> None:
    """Check logits at odd lengths and under padding of either side, and greedy texts with a cache and without."""
    for length in (1, 7, 13):
        tokens = torch.randint(0, 300, (2, length), generator=torch.Generator().manual_seed(length))
        torch.testing.assert_close(theirs(tokens).logits, net.logits(tokens), atol=1e-5, rtol=0)
    for side in ("right", "left"):
        tokens, mask = padded(side)
        logits = theirs(tokens, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            own = logits[row][mask[row].bool()]
            torch.testing.assert_close(own, net.logits(torch.tensor([prompt]))[0], atol=1e-5, rtol=0)
    wanted = net.generate(PROMPTS, 12)
    tokens, mask = padded("left")
    for use_cache in (True, False):
        texts = theirs.generate(
            tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=0
        )
        assert texts[:, tokens.size(1) :].tolist() == wanted


@pytest.mark.parametrize("model", MODELS)
def test_every_mechanism(model, tmp_path):
    net = random_model(model)
    check_same(net, load_export(net, tmp_path / "export"))


@pytest.mark.parametrize("model", ["t6", "gqa"])
@pytest.mark.parametrize("core", CORES)
def test_every_core(model, core, tmp_path):
    net = random_model(model, f"core={core}", *SMALL_BY_CORE.get(core, []))
    check_same(net, load_export(net, tmp_path / "export"))


@pytest.mark.parametrize("overrides", OPTIONS, ids=" ".join)
def test_every_option(overrides, tmp_path):
    net = random_model(*overrides)
    check_same(net, load_export(net, tmp_path / "export"))


OWN = """
from model.attention.multi_head import MultiHeadAttention, MultiHeadConfig


class LoudConfig(MultiHeadConfig):
    loudness: float = 3.0

    def build(self, d_model, layer, core):
        return LoudAttention(self, d_model, core)


class LoudAttention(MultiHeadAttention):
    def after_core(self, attended, x):
        return super().after_core(attended, x) * self.config.loudness
"""


def test_a_mechanism_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "loud_attention.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    net = random_model("gqa", "model._target_=loud_attention.LoudConfig", "model.loudness=2")
    theirs = load_export(net, tmp_path / "export")
    assert (tmp_path / "export/loud_attention.py").is_file()
    check_same(net, theirs)


def test_documents_stay_apart(tmp_path):
    net = random_model("t6", document_end=7)
    theirs = load_export(net, tmp_path / "export")
    tokens = torch.tensor([[3, 4, 7, 5, 6, 7, 8, 9], [7, 7, 3, 4, 5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, net.logits(tokens), atol=1e-5, rtol=0)
        assert theirs.generate(tokens, max_new_tokens=8, do_sample=False, pad_token_id=0)[
            :, 8:
        ].tolist() == net.generate(tokens.tolist(), 8)


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["mha", "model.n_heads=3"], "Llama"),
        (["gqa", "model.n_heads=6"], "Llama"),
        (["mqa", "model.n_heads=5"], "Mistral"),  # 48 is no multiple of 5
        (["mha", "core=sliding_window", "core.window=4"], "Mistral"),
        (["mla"], "DeepseekV3"),
        (["t6"], "T6"),
        (["mha", "core=sequence_tensor", "core.fold=[3,4]"], "T6"),
        (["mla", "core=sliding_window", "core.window=4"], "T6"),
    ],
    ids=str,
)
def test_what_transformers_has_needs_no_code(overrides, kind):
    made = exported(random_model(*overrides))
    assert made.config["architectures"] == [f"{kind}ForCausalLM"] and bool(made.files) == made.own_code == (
        kind == "T6"
    )


@pytest.mark.parametrize("overrides", [["t6"], ["t6", "core=sequence_tensor", "core.fold=[3,4]"]])
def test_beams_move_the_cache(overrides, tmp_path):
    theirs = load_export(random_model(*overrides), tmp_path / "export")
    tokens, mask = padded("left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "num_beams": 3, "pad_token_id": 0, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(theirs.generate(tokens, **options), theirs.generate(tokens, use_cache=False, **options))


def test_a_text_goes_on_from_its_cache(tmp_path):
    net = random_model("t6")
    theirs = load_export(net, tmp_path / "export")
    tokens, mask = padded("left")
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    first = theirs.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **options)
    longer = torch.cat((first.sequences, TOKENS[:, :3]), dim=1)
    mask = F.pad(mask, (0, 8), value=1)
    cached = theirs.generate(longer, attention_mask=mask, past_key_values=first.past_key_values, **options)
    assert torch.equal(cached, theirs.generate(longer, attention_mask=mask, use_cache=False, **options))


def test_weights_in_shards_are_the_same(tmp_path):
    net = random_model("t6")
    theirs = load_export(net, tmp_path / "export", max_shard=20_000)
    assert len(list((tmp_path / "export").glob("model-*-of-*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(theirs(TOKENS).logits, net.logits(TOKENS))


@pytest.mark.parametrize("model", ["t6", "mha"])
def test_a_step_of_fine_tuning_is_ours(model, tmp_path):
    """With activation checkpointing, padding that counts for nothing, and loss and gradients over the tokens shown."""
    net = random_model(model)
    theirs = load_export(net, tmp_path / "export").train()
    theirs.activation_checkpointing_enable()
    tokens, mask = padded("left")
    labels = tokens.masked_fill(
        (mask == 0) | (mask.roll(1, dims=1) == 0), -100
    )  # what padding precedes is not predicted
    loss = theirs(tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    whole = [torch.tensor(prompt) for prompt in PROMPTS if len(prompt) > 1]
    ours = sum(F.cross_entropy(net.logits(row[None])[0, :-1], row[1:], reduction="sum") for row in whole)
    ours = ours / sum(row.numel() - 1 for row in whole)
    ours.backward()
    torch.testing.assert_close(loss, ours, atol=1e-6, rtol=1e-6)
    grads = {name: p.grad for name, p in net.named_parameters()}
    wanted = (
        {f"model.{k}": v for k, v in grads.items()} if model == "t6" else dialects.LLAMA.to_theirs(grads, net.config)
    )
    found = {name: p.grad for name, p in theirs.named_parameters() if "norm" not in name}
    assert found.keys() == {name for name in wanted if "norm" not in name}
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-6, rtol=1e-4)
    ours_step = torch.optim.AdamW(net.parameters(), lr=1e-2, eps=1e-3)
    theirs_step = torch.optim.AdamW([p for n, p in theirs.named_parameters() if "norm" not in n], lr=1e-2, eps=1e-3)
    ours_step.step()
    theirs_step.step()
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(TOKENS).logits, net.logits(TOKENS), atol=1e-4, rtol=0)


def test_a_compiled_export_gives_the_same(tmp_path):
    net = random_model("t6")
    theirs = load_export(net, tmp_path / "export")
    compiled = torch.compile(theirs, backend="aot_eager", fullgraph=True)
    tokens, mask = padded("left")
    with torch.no_grad():
        torch.testing.assert_close(compiled(TOKENS).logits, net.logits(TOKENS), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            compiled(tokens, attention_mask=mask).logits, theirs(tokens, attention_mask=mask).logits, atol=1e-5, rtol=0
        )


def test_what_a_t6_does_not_take_is_named(tmp_path):
    theirs = load_export(random_model("t6"), tmp_path / "export")
    with pytest.raises(TypeError, match="takes no position_ids"):
        theirs(TOKENS, position_ids=torch.zeros_like(TOKENS))
    with pytest.raises(TypeError, match="DynamicCache"):
        theirs(TOKENS, past_key_values=transformers.DynamicCache())
    with pytest.raises(ValueError, match="cache_implementation=static"):
        theirs.generate(TOKENS, cache_implementation="static", max_new_tokens=2, pad_token_id=0)


def test_saved_again_it_loads_again(tmp_path):
    net = random_model("t6")
    theirs = load_export(net, tmp_path / "export")
    theirs.save_pretrained(tmp_path / "again")
    for path in (tmp_path / "export").glob("*.py"):
        assert (tmp_path / "again" / path.name).is_file(), path.name
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    shutil.rmtree(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, net.logits(TOKENS))
