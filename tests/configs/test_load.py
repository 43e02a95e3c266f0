"""Every YAML composes; every mistake is named, all of them together."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf
from pydantic import Field

from configs.app import CONFIGS, GROUPS, as_yaml, configured, verbatim
from configs.block import to_dict
from configs.errors import ConfigError, did_you_mean
from configs.load import load
from eval.config import EvalConfig
from eval.sample import SampleConfig
from eval.speed.attention import AttentionSpeedConfig
from training.checkpoint import differing
from training.config import Config
from training.run_folder import read_config


def config(*overrides):
    return configured(Config, list(overrides))


def mistakes(*overrides) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config(*overrides)
    return caught.value.errors


GROUP_FILES = [path for group in sorted(GROUPS - {"suite"}) for path in sorted(Path(CONFIGS, group).rglob("*.yaml"))]


@pytest.mark.parametrize("path", GROUP_FILES, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_yaml_composes_and_survives_a_round_trip(path):
    group, name = str(path.relative_to(CONFIGS).with_suffix("")).split("/", 1)
    made = config(f"{group}={name}")
    for stored in (to_dict(made), OmegaConf.create(to_dict(made))):
        again = load(stored, Config)
        assert again == made and again.run.name == made.run.name


@pytest.mark.parametrize("schema", [EvalConfig, SampleConfig])
def test_the_other_commands_compose(schema):
    assert configured(schema, ["run=runs/x"]).run == "runs/x"
    with pytest.raises(ConfigError, match="run is not set"):
        configured(schema, [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_stepz=5", "trainer.max_stepz: unknown key; did you mean trainer.max_steps?"),
        ("modl=t6", "modl: unknown key; did you mean model?"),
        ("+model.rank=3", "model.rank: unknown key; did you mean model."),
        ("trainer.seq_len=abc", "trainer.seq_len=abc: must be an integer"),
        ("trainer.seq_len=1.5", "trainer.seq_len=1.5: must be an integer"),
        ("trainer.seq_len=null", "trainer.seq_len is not set: give it as trainer.seq_len=..."),
        ("trainer.compile=perhaps", "trainer.compile=perhaps: must be true or false"),
        ("optim.lr=fast", "optim.lr=fast: must be a number"),
        ("optim.lr=-0.1", "optim.lr=-0.1: must be a positive number"),
        ("optim.lr=nan", "optim.lr=nan: must be a finite number"),
        ("optim.lr=inf", "optim.lr=inf: must be a finite number"),
        ("model.q_rank=0", "model.q_rank=0: must be at least 1"),
        ("model.head_dim=33", "model.head_dim=33: RoPE turns pairs of features, so it must be even"),
        ("model.init=zeros", "model.init=zeros: must be "),
        ("tokenizer.vocab_size=3000000000", "tokenizer.vocab_size=3000000000: must be at most 2147483648"),
        ("trainer.dtype=fp16", "trainer.dtype=fp16: must be auto, fp32 or bf16"),
        ("device=tpu", "device=tpu: must be auto, cpu or cuda"),
        ("run.name=a/b", "run.name=a/b: must be a plain folder name of at most 200 bytes, "),
        ("trainer.max_steps=null", "trainer.max_steps=null and trainer.max_tokens=null: set one, it ends the run"),
        ("++deepspeed.config.train_batch_size=8", "deepspeed.config.train_batch_size: set trainer.global_batch_size"),
        ("++deepspeed.config.fp16.enabled=true", "deepspeed.config.fp16: set trainer.dtype instead"),
        ("++deepspeed.config.bfloat16.enabled=true", "deepspeed.config.bfloat16: set deepspeed.config.bf16"),
        ("++deepspeed.config.amp.enabled=true", "deepspeed.config.amp: set trainer.dtype instead"),
        ("++deepspeed.config.zero_optimisation.stage=2", "deepspeed.config.zero_optimisation: unknown key; did you"),
        ("experiment=nope", "experiment=nope: there is no configs/experiment/nope.yaml; known: extend/"),
        ("suite=perplexity", "suite: unknown key; did you mean size?"),
        ("=5", "=5: has no key; overrides are KEY=VALUE"),
        ("deepspeed.config.zero_optimization.stage=7", "deepspeed.config.zero_optimization.stage=7: must be 0, 1"),
        ("size.d_ff=0", "size.d_ff=0: must be at least 1"),
        ("data.dir=${nowhere}", "data.dir: Interpolation key 'nowhere' not found"),
        ("model._target_=model.nothing.Here", "model._target_=model.nothing.Here: cannot be imported"),
        ("model._target_=model.cores.full.Full", "model._target_=model.cores.full.Full: must be a class derived from "),
        ("core=sdpa", "core=sdpa: has a new name; use core=full"),
        ("core=flash_tpa", "core=flash_tpa: has a new name; use core=full core.kernel=factors"),
        ("core.kernel=triton", "core.kernel=triton: must be auto, sdpa or factors"),
        ("optim.name=adamx", "optim.name=adamx: no such optimizer; did you mean adam"),
        ("wandb.tags=baseline", "wandb.tags=baseline: must be a list, as in [A,B]"),
    ],
)  # fmt: skip
def test_a_mistake_names_the_key_the_value_and_the_remedy(override, message):
    assert any(error.startswith(message) for error in mistakes(override)), mistakes(override)


def test_mechanisms_check_their_own_keys():
    assert mistakes("model=gqa", "model.n_heads=7") == ["model.n_heads=7: must be a multiple of model.n_kv_heads=2"]
    assert mistakes("model=mla", "model.qk_rope_head_dim=5") == [
        "model.qk_rope_head_dim=5: RoPE turns pairs of features, so it must be even"
    ]
    assert mistakes("model=mqa", "model.n_kv_heads=0") == ["model.n_kv_heads=0: must be at least 1"]


def test_batch_sizes_must_multiply_out(monkeypatch):
    assert mistakes("trainer.global_batch_size=12", "trainer.micro_batch_size=5") == [
        "trainer.global_batch_size=12: is not a multiple of trainer.micro_batch_size=5 x 1 process; "
        "trainer.micro_batch_size=4 fits"
    ]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert (
        "trainer.global_batch_size must be a multiple of the 8 processes" in mistakes("trainer.global_batch_size=12")[0]
    )
    made = config("trainer.global_batch_size=64", "trainer.micro_batch_size=4")
    assert made.trainer.accumulation_steps(8) == 2


def test_all_mistakes_come_at_once():
    found = mistakes(
        "optim.lr=-1", "trainer.max_stepz=1", "model.q_rank=abc", "model.head_dim=31", "wandb.mode=x", "foo=1",
        "data=mixture", "data.mixture=[3]",
    )  # fmt: skip
    assert len(found) == 7


def test_fields_that_no_yaml_lists_can_be_set():
    assert config("optim.eps=1e-6", "data.val_fraction=0.1", "model.rope_base=5e5").model.rope_base == 5e5


def test_the_identity_is_what_changes_the_result_and_names_the_run():
    base = config()
    for same in (
        "trainer.micro_batch_size=1",
        "deepspeed=zero2",
        "trainer.log_every=3",
        "wandb.project=x",
        "data.dir=x",
    ):
        assert config(same).identity() == base.identity(), same
    others = ("model=mha", "size.n_layers=5", "optim.lr=1e-4", "run.seed=1", "trainer.seq_len=128",
              "trainer.global_batch_size=16", "trainer.max_steps=7", "schedule=wsd")  # fmt: skip
    for other in others:
        assert config(other).run.name != base.run.name, other
    assert "schedule.first_step" not in base.identity()  # older runs have no such key, and resume
    assert config("schedule.first_step=0").identity()["schedule.first_step"] == 0
    assert base.run.dir == f"runs/{base.run.name}" and base.run.name.startswith("t6_tiny_")


def test_an_older_run_folder_is_that_run(tmp_path):
    made = config("model=t6", "core.kernel=factors", f"run.dir={tmp_path}")
    old = {"_target_": "model.cores.flash_tpa.FlashTPA", "name": "flash_tpa", "training": "sdpa", "scores": "own"}
    tree = to_dict(made)
    tree["core"] = {key: value for key, value in tree["core"].items() if key != "kernel"} | old
    tree["trainer"]["background_saving"] = True
    (tmp_path / "config.yaml").write_text(as_yaml(tree))
    assert read_config(tmp_path).core == made.core and read_config(tmp_path).identity() == made.identity()
    stored = made.identity() | {f"core.{key}": value for key, value in old.items()}
    assert differing(stored | {"core.kernel": "auto"}, made.identity()) == ""


def test_the_horizon_is_whatever_comes_first():
    per_step = config().trainer.tokens_per_step
    assert config("trainer.max_steps=10", f"trainer.max_tokens={per_step * 4 - 1}").trainer.horizon == 4
    assert config("trainer.max_steps=3", f"trainer.max_tokens={per_step * 4}").trainer.horizon == 3
    assert config("trainer.max_steps=null", f"trainer.max_tokens={per_step * 9}").trainer.horizon == 9


PROMPTS = ["Once upon a time, there was", "def f(x): return {x: [1]}", "it's 'so'", "null", " b\n", '"a" and "b"', "",
           "${x}", "\\${x}", "${", "\\'\\", "\\\\'${y}'\\\\"]  # fmt: skip


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_prompt_is_taken_as_it_stands(prompt):
    assert configured(SampleConfig, ["run=x", verbatim(f"prompt={prompt}")]).prompt == prompt


def test_a_prompt_that_is_quoted_for_hydra_keeps_that_meaning():
    assert verbatim("prompt='a, b'") == "prompt='a, b'" and verbatim("run=a,b") == "run='a,b'"


class Extended(Config):
    rounds: int = Field(3, ge=1)


def test_commands_with_keys_of_their_own():
    made = configured(Extended, ["rounds=5", "size=small"])
    assert made.rounds == 5 and made.size.name == "small" and configured(Extended, []).rounds == 3
    for given, message in (("many", "must be an integer"), ("0", "must be at least 1")):
        with pytest.raises(ConfigError) as caught:
            configured(Extended, [f"rounds={given}", "optim.lr=-1"])
        assert set(caught.value.errors) == {f"rounds={given}: {message}", "optim.lr=-1: must be a positive number"}
    with pytest.raises(ConfigError, match="rounds: unknown key"):
        configured(Config, ["rounds=5"])


def test_a_group_s_name_may_be_a_plain_key_of_a_command():
    assert configured(AttentionSpeedConfig, ["model=mla", "size=tiny"]).model == "mla"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("experiment=paper/t6_medum", "experiment=paper/t6_medum: there is no configs/experiment/paper/t6_medum.yaml; "
         "did you mean paper/medium?"),
        ("core=sequence_tensr", "core=sequence_tensr: there is no configs/core/sequence_tensr.yaml; did you mean "),
        ("suite=perplexity", "suite: unknown key; "),
        ("optim.lr=[1", "optim.lr=[1: cannot be read; put a text"),
        ("+trainer.qqq=1", "trainer.qqq: unknown key; known: activation_checkpointing, "),
    ],
)  # fmt: skip
def test_a_typo_of_any_kind_ends_before_anything_runs(override, message):
    found = mistakes(override)
    assert len(found) == 1 and found[0].startswith(message), found


@pytest.mark.parametrize("word", ["[EOS]", '"[EOS]"'])
def test_brackets_are_text_where_text_belongs(word):
    assert config("tokenizer=huggingface", f"tokenizer.end_of_text={word}").tokenizer.end_of_text == "[EOS]"


def test_a_message_names_so_many_known_keys_and_no_more():
    names = [f"task{number:04d}" for number in range(5000)]
    assert did_you_mean("zzz", names[:2]) == "known: task0000, task0001"
    assert did_you_mean("zzz", names).endswith("task0039 and 4960 more")
