"""`python -m eval.sample` on a real run: text on standard output, facts about it on standard error."""

import io
import re
import shutil
from itertools import pairwise

import pytest

import train
from configs.app import configured
from configs.errors import ConfigError
from data.tokenizers import load_tokenizer, new_tokenizer
from eval import sample
from eval.sample import SampleConfig
from tests.conftest import SMALL_RUN
from training.config import Config

PROMPT = "prompt=The class statement"


@pytest.fixture(scope="module")
def finished(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    overrides = [*SMALL_RUN, *small_data, "optim.lr=1e-2", "trainer.eval_every=null", f"run.dir={folder}"]
    assert train.main(configured(Config, overrides)) == 0
    return folder


@pytest.fixture
def command(finished, capsys):
    def run(*overrides: str) -> tuple[str, str]:
        capsys.readouterr()
        assert sample.main(configured(SampleConfig, [f"run={finished}", *overrides])) == 0
        return capsys.readouterr()

    return run


def test_the_text_is_the_same_with_and_without_the_cache(command):
    text, facts = command(PROMPT, "temperature=0", "max_new_tokens=80")
    assert text.startswith("The class statement") and len(text) > 80
    assert "float32 cache of" in facts and "longer than the 64 tokens" in facts
    for options in (["cache=false"], ["prefill_chunk=2"], ["cache_dtype=fp32", "prefill_chunk=1"]):
        assert command(PROMPT, "temperature=0", "max_new_tokens=80", *options)[0] == text
    assert "cache of" not in command(PROMPT, "max_new_tokens=2", "cache=false")[1]


def test_a_t6_can_attend_from_its_factors(command, finished, small_data, tmp_path):
    text, _ = command(PROMPT, "temperature=0", "max_new_tokens=80")
    assert command(PROMPT, "temperature=0", "max_new_tokens=80", "core.kernel=factors")[0] == text
    other = [*SMALL_RUN, *small_data, "trainer.max_steps=1", f"run.dir={tmp_path}/other"]
    for override, why in (
        ("model=mha", "model=mha"),
        ("core=sliding_window", "core.kernel=factors: must be auto or sdpa"),
        ("data.document_mask=true", "documents"),
    ):
        folder = tmp_path / override.split("=")[1]
        assert train.main(configured(Config, [*other, override, f"run.dir={folder}"])) == 0
        with pytest.raises(ConfigError, match=why):
            sample.main(configured(SampleConfig, [f"run={folder}", "core.kernel=factors"]))


def test_samples_are_repeatable_and_numbered_by_their_seeds(command):
    settings = [PROMPT, "max_new_tokens=20", "temperature=1.2", "top_p=0.95", "min_p=0.01", "repetition_penalty=1.1"]
    together, _ = command(*settings, "count=3", "seed=5")
    assert together == command(*settings, "count=3", "seed=5")[0]
    parts = re.split(r"─+ seed (\d+) ─+\n", together)
    assert parts[1::2] == ["5", "6", "7"] and len(set(parts[2::2])) == 3
    for seed, text in zip(parts[1::2], parts[2::2], strict=True):
        assert command(*settings, f"seed={seed}")[0] == text


def test_an_int8_cache_is_smaller_and_says_so(command):
    sizes = [
        int(
            re.search(r"cache of ([\d,]+) bytes", command("max_new_tokens=3", f"cache_dtype={dtype}")[1])[1].replace(
                ",", ""
            )
        )
        for dtype in ("fp32", "int8")
    ]
    assert sizes[1] < 0.3 * sizes[0]


def test_a_broken_checkpoint_is_named_on_standard_error(command, finished, tmp_path):
    broken = tmp_path / "run"
    shutil.copytree(finished, broken)
    newest = sorted((broken / "checkpoints").glob("step_*"))[-1]
    (newest / "model.safetensors").write_bytes(b"")
    text, notes = command(f"run={broken}", "max_new_tokens=2")
    assert "taking the checkpoint before" in notes and "taking the checkpoint before" not in text


def test_a_conversation(command, monkeypatch):
    lines = io.BytesIO(b"The class\nAnother\n" + b"caf\xe9\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8"))
    settings = ["max_new_tokens=12", "temperature=1.2"]
    text, facts = command("interactive=true", *settings, "seed=3")
    assert facts.count("is not UTF-8") == 1
    monkeypatch.undo()
    assert (
        text
        == command("prompt=The class", *settings, "seed=3")[0]
        + command("prompt=Another", *settings, "seed=4")[0]
        + command("prompt=caf\ufffd", *settings, "seed=5")[0]
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_p=0", "top_p=0: must be a positive number"),
        ("min_p=-1", "min_p=-1: must be at least 0"),
        ("temperature=inf", "temperature=inf: must be a finite number"),
        ("temperature=1e-38", "temperature=1e-38: must be 0 (always the most likely token) or at least 0.001"),
        ("repetition_penalty=0", "repetition_penalty=0: must be a positive number"),
        ("cache_dtype=int4", "cache_dtype=int4: must be auto, fp32, bf16, fp16 or int8"),
        ("prefill_chunk=0", "prefill_chunk=0: must be at least 1"),
        ("cache=false,compile=true", "compile=true: needs cache=true"),
        ("top_q=1", "top_q: unknown key; did you mean top_"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(ConfigError) as caught:
        configured(SampleConfig, ["run=x", *override.split(",")])
    assert caught.value.errors[0].startswith(message)


@pytest.mark.parametrize("tokenizer", ["sentencepiece", "gpt2"])
def test_streamed_pieces_make_the_whole_text(small_data, tokenizer):
    config = configured(Config, [*SMALL_RUN, *small_data] if tokenizer != "gpt2" else ["tokenizer=gpt2"])
    found = (
        load_tokenizer(config.tokenizer, config.data.dir) if tokenizer != "gpt2" else new_tokenizer(config.tokenizer)
    )
    text = "Größe: ∑ of naïve 東京 and 🙂🙃, tabs\tand\n\n  spaces "
    ids = found.encode(text)
    pieces = [sample.settled(found, ids[:count]) for count in range(len(ids) + 1)]
    assert not any("\ufffd" in piece for piece in pieces) and pieces[-1] == found.decode(ids)
    assert all(later.startswith(earlier) for earlier, later in pairwise(pieces))
    assert sum(later == earlier for earlier, later in pairwise(pieces)) < len(ids) / 2
