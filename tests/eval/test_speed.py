"""The speed benchmarks run, and print what others' scripts read."""

import json
from types import SimpleNamespace

import pytest
import torch

from configs.app import configured
from configs.errors import ConfigError
from eval.speed import training
from eval.speed.contestants import attention_inputs
from eval.speed.decoding import Bench, DecodingConfig, Setting, contestants, main
from model import counting
from model.transformer import Transformer
from tests.model.helpers import SMALL, wake_up

CONTRACT = {"model", "size", "core", "kernel", "device", "dtype", "batch", "length", "tokens_per_second", "ms", "bytes",
            "memory_bytes", "versions"}  # fmt: skip
TINY = ["size=tiny", "size.n_layers=2", "size.d_model=48", "size.head_dim=16", "device=cpu", "rounds=1"]


def decoding(*overrides: str) -> DecodingConfig:
    return configured(DecodingConfig, [*TINY, *overrides])


def printed(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_line_for_every_mechanism_and_point(capsys, tmp_path):
    models = ["mha", "gqa", "mla", "t6"]
    config = decoding(f"models={models}", "lengths=[5,9]", "scopes=[attention,model]", "batches=[2]", f"out={tmp_path}")
    assert main(config) == 0
    lines = printed(capsys)
    points = {(line["model"], line["cached"], line["scope"], line["length"]) for line in lines}
    assert len(lines) == len(points) == (3 + 2) * 2 * 2
    for line in lines:
        assert line.keys() >= CONTRACT | {"bandwidth_share", "floor_ms"}
        assert line["tokens_per_second"] == pytest.approx(2 / line["ms"] * 1e3)
        assert line["bandwidth_share"] == pytest.approx(line["floor_ms"] / line["ms"])
        assert line["bytes"] >= line["memory_bytes"] > 0
    assert {line["core"] for line in lines} == {"full"}
    assert {line["kernel"] for line in lines if line["cached"] == "factors"} == {"factors"}
    numbers = {line["cached"]: line["memory_bytes"] // (2 * 2 * 9 * 4) for line in lines[-2:]}  # of t6's whole model
    heads = lines[-1]["n_heads"]
    assert numbers == {"factors": 4 * (heads + 16), "k, v": 2 * heads * 16}
    saved = (tmp_path / "decoding.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in saved] == lines
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "decoding_tiny_attention.png",
        "decoding_tiny_model.png",
    }


def test_folds_are_timed_over_a_block_next_to_the_whole_length(capsys):
    assert main(decoding("models=[gqa,t6]", "lengths=[32]", "scopes=[model]", "folds=[[4,8],[2,4,4]]")) == 0
    found = printed(capsys)
    assert len(found) == 2 * 3 + 1
    lines = {
        (line["model"], str(line["fold"])): line for line in found if line["cached"] != "k, v" or line["model"] != "t6"
    }
    for model in ("gqa", "t6"):
        folded = lines[model, "[4, 8]"]
        assert folded["core"] == "sequence_tensor" and folded["tokens"] == 4
        assert lines[model, "[2, 4, 4]"]["tokens"] == 2
        assert folded["bytes"] < lines[model, "None"]["bytes"]  # it reads two axes, not the whole length
        assert folded["tokens_per_second"] == pytest.approx(1e3 / folded["ms"])
    with pytest.raises(ConfigError, match="only whole steps can be timed"):
        decoding("folds=[[4,8]]")
    with pytest.raises(ConfigError, match="must hold a block of 64 tokens"):
        decoding("folds=[[64,8]]", "lengths=[32]", "scopes=[model]")


def test_the_papers_setting(capsys):
    config = decoding("models=[mha,gqa,mla,t6]", "d_models=[2048]", "materialized=false")
    made = {rival.model: rival.network for rival in contestants(config)}
    assert {network.attention.n_heads for network in made.values()} == {32}
    assert {network.d_model for network in made.values()} == {2048}
    numbers = {model: counting.kv_numbers_per_token(network.attention) for model, network in made.items()}
    assert numbers == {"mha": 4096, "gqa": 512, "mla": 576, "t6": 192}


def test_what_does_not_fit_is_said_and_skipped(capsys, monkeypatch):
    monkeypatch.setattr("training.device.available_memory", lambda device: 6e6)
    assert main(decoding("models=[mha,mqa]", "lengths=[4096]")) == 0
    out = capsys.readouterr()
    assert [json.loads(line)["model"] for line in out.out.splitlines()] == []
    assert "mha (k, v cached), attention, batch 1, 4,096 tokens: skipped, it needs" in out.err


def test_as_many_are_timed_together_as_fit(monkeypatch):
    groups, needs = [], {"a": 3, "b": 2, "c": 4, "d": 1}
    bench = Bench(torch.device("cpu"), torch.float32, 1.0, 5, 1)
    monkeypatch.setattr(Bench, "needed", lambda self, rival, setting: needs[rival.model])
    monkeypatch.setattr(Bench, "run_in_turns", lambda self, rivals, _: groups.append([r.model for r in rivals]) or [])
    list(bench.lines([SimpleNamespace(model=name, is_folded=False) for name in needs], Setting("model", 1, 8)))
    assert groups == [["a", "b"], ["c", "d"]]


def test_the_materialized_side_is_the_same_model():
    """Same logits from the same weights, and attention that is asked for what a full pass would ask."""
    torch.manual_seed(0)
    rivals = contestants(decoding("models=[t6]", "overrides=['tokenizer.vocab_size=300']"))
    factored, explicit = (wake_up(Transformer(rival.network)) for rival in rivals)
    explicit.load_state_dict(factored.state_dict())
    tokens = torch.randint(0, 300, (2, 9))
    with torch.no_grad():
        expected = factored.logits(tokens)[:, -1]
        for model in (factored, explicit):
            cache = model.new_cache(2)
            model.decode(tokens[:, :-1], cache)
            assert torch.allclose(model.decode(tokens[:, -1:], cache), expected, atol=1e-4)
    assert rivals[1].network.attention.cache_shapes()["k"] == (rivals[0].network.attention.n_heads, 16)


@pytest.mark.parametrize("model", ["mha", "mla", "t6", "t6_shared_b"])
def test_the_attention_step_is_over_the_whole_cache(model):
    rival = contestants(decoding(f"models=[{model}]", "materialized=false"))[0]
    calls, cache_bytes = attention_inputs(rival.network, 2, 11, 3, torch.device("cpu"), torch.float32)
    assert len(calls) == 3
    assert cache_bytes == counting.kv_numbers_per_token(rival.network.attention) * 2 * 11 * 4
    for call in calls:
        out = rival.network.core.attend(*call)
        assert out.shape[:3] == (2, 1, rival.network.attention.n_heads) and out.isfinite().all()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("models=[mhaa]", "there is no configs/model/mhaa.yaml; did you mean mha"),
        ("models=[]", "name at least one"),
        ("scopes=[layer]", "must be attention or model"),
        ("lengths=[0]", "lengths.0=0: must be at least 1"),
        ("d_models=[100]", "multiples of 64"),
        ("folds=[[]]", "name at least one"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        main(decoding(override))


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="out=.*: cannot write"):
        main(decoding("models=[gqa]", "lengths=[5]", f"out={tmp_path}/file/new"))
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ["data.document_mask=true"],
        ["core.kernel=factors"],
        ["model=mha", "trainer.activation_checkpointing=true"],
    ],
)
def test_training_prints_one_line(capsys, options):
    overrides = [*SMALL, "trainer.seq_len=16", "steps=2", "device=cpu", *options]
    assert training.main(configured(training.SpeedConfig, overrides)) == 0
    (line,) = printed(capsys)
    assert line.keys() >= CONTRACT | {"mfu"}
    assert line["tokens_per_second"] == pytest.approx(4 * 16 / line["ms"] * 1e3)
    assert 0 < line["mfu"] < 1
    assert line["document_tokens"] == (500 if "data.document_mask=true" in options else None)


def test_training_refuses_what_the_core_cannot_do():
    config = configured(training.SpeedConfig, [*SMALL, "model=mha", "core.kernel=factors"])
    with pytest.raises(ConfigError, match="has no factors"):
        training.main(config)
