"""`python -m eval.export` on real runs: what transformers and lm-evaluation-harness read is the run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from configs.app import configured
from configs.errors import ConfigError
from data.tokenizers import new_tokenizer
from eval.export import __main__ as export
from eval.export import folder as export_folder
from eval.export.tokenizer import PROBES, fast_tokenizer
from eval.harness import HarnessModel
from eval.loading import load_run
from tests.conftest import SMALL_RUN
from training.config import Config

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def runs(trained, small_data, tmp_path_factory):
    """Run folders by name: MHA with a Hugging Face tokenizer, T6 with sentencepiece, which has evaluated itself."""
    folder = tmp_path_factory.mktemp("t6") / "run"
    overrides = [*SMALL_RUN, *small_data, "optim.lr=1e-2", "model.k_rank=1", f"run.dir={folder}"]
    assert train.main(configured(Config, overrides)) == 0
    (folder / "results").mkdir(exist_ok=True)
    found = {"step": 8, "results": {"cloze/acc": 0.25, "loss": 5.5}, "stderr": {"cloze/acc": 0.125}}
    (folder / "results/cloze.json").write_text(json.dumps(found))
    return {"mha": trained, "t6": folder}


@pytest.fixture(scope="module")
def exports(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    for name, run in runs.items():
        assert export.main(configured(export.ExportConfig, [f"run={run}", f"out={folder}/{name}"])) == 0
    return {name: folder / name for name in runs}


@pytest.mark.parametrize("name", ["mha", "t6"])
def test_transformers_loads_the_run(name, runs, exports):
    run = load_run(str(runs[name]), device="cpu")
    model = AutoModelForCausalLM.from_pretrained(exports[name], trust_remote_code=name == "t6")
    tokenizer = AutoTokenizer.from_pretrained(exports[name], trust_remote_code=name == "t6")
    for text in PROBES:
        assert tokenizer(text).input_ids == run.tokenizer.encode(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == run.tokenizer.decode(run.tokenizer.encode(text))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == model.config.eos_token_id == run.tokenizer.end_of_text
    assert tokenizer.is_fast and tokenizer.eos_token == END and len(tokenizer(END).input_ids) > 1
    tokens = torch.tensor([run.tokenizer.encode(PROBES[0])[:33]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, run.model.logits(tokens), atol=1e-5, rtol=0)
    batch = tokenizer(["The class", "If the"], return_tensors="pt", padding=True, padding_side="left")
    prompts = [run.tokenizer.encode(text) for text in ("The class", "If the")]
    new = model.generate(**batch, max_new_tokens=12, do_sample=False)[:, batch.input_ids.size(1) :].tolist()
    ours = run.model.generate(prompts, 12, stop_tokens=[run.tokenizer.end_of_text])
    assert [row[: len(own)] for row, own in zip(new, ours, strict=True)] == ours


@pytest.mark.parametrize("name", ["mha", "t6"])
def test_the_harness_finds_the_same(name, runs, exports):
    """lm-evaluation-harness's own model of transformers on the export, and our adapter on the run."""
    model = AutoModelForCausalLM.from_pretrained(exports[name], trust_remote_code=name == "t6")
    tokenizer = AutoTokenizer.from_pretrained(exports[name], trust_remote_code=name == "t6")
    hf = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu")
    ours = HarnessModel(load_run(str(runs[name]), device="cpu"))
    contexts = ["", "If", "The class ", "An assignment statement evaluates the expression list. " * 2]
    pairs = [(context, answer) for context in contexts for answer in (" A", " x = 1", "\n", " the following")]
    asked = [SimpleNamespace(args=pair, task_name="task", doc_id=number) for number, pair in enumerate(pairs)]
    theirs, found = hf.loglikelihood(asked, disable_tqdm=True), ours.loglikelihood(asked)
    assert np.allclose([p for p, _ in theirs], [p for p, _ in found], atol=1e-4)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in found]


def test_the_card_says_what_the_run_was(runs, exports):
    card = (exports["t6"] / "README.md").read_text()
    run = load_run(str(runs["t6"]), device="cpu")
    for text in (
        "`k_rank=1`", run.data_fingerprint, run.tokenizer.fingerprint, "4,096, 8 of 8 steps", "trust_remote_code=True",
        "| cloze | 8 | cloze acc (%) | 25.00 | 12.50 |", "![Loss](loss.png)", "validation in training",
    ):  # fmt: skip
        assert text in card
    assert (exports["t6"] / "loss.png").read_bytes() == (runs["t6"] / "loss.png").read_bytes()
    assert "trust_remote_code" not in (exports["mha"] / "README.md").read_text()
    command = card.split("```bash\npython train.py ")[1].split("\n")[0]
    again = configured(Config, [word.strip("'") for word in command.split(" ")])
    assert again.identity() == run.config.identity()


def test_another_step_in_another_precision(runs, tmp_path):
    export.main(configured(export.ExportConfig, [f"run={runs['mha']}", f"out={tmp_path}/x", "step=4", "dtype=bf16"]))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert model.dtype == torch.bfloat16 and model.config.pretraining["step"] == 4
    ours = load_run(str(runs["mha"]), device="cpu", step=4).model.embedding.weight
    assert torch.equal(model.get_input_embeddings().weight, ours.bfloat16())


def test_a_folder_that_exists_is_refused_and_a_failure_leaves_none(runs, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=f"out={tmp_path}/there: exists already"):
        configured(export.ExportConfig, [f"run={runs['t6']}", f"out={tmp_path}/there"])

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_folder, "save_file", full)
    with pytest.raises(ConfigError, match=f"out={tmp_path}/new: cannot write"):
        export.main(configured(export.ExportConfig, [f"run={runs['t6']}", f"out={tmp_path}/new"]))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("broken", ["run", "step"])
def test_mistakes_are_named(broken, runs, tmp_path):
    changed = {"run": f"run={tmp_path}", "step": "step=77"}[broken]
    config = configured(export.ExportConfig, [f"run={runs['t6']}", f"out={tmp_path}/x", changed])
    with pytest.raises(ConfigError, match=changed):
        export.main(config)
    assert not (tmp_path / "x").exists()


def test_gpt2s_tokenizer_is_the_same(tmp_path):
    tokenizer = new_tokenizer(configured(Config, ["tokenizer=gpt2"]).tokenizer)
    for name, text in fast_tokenizer(tokenizer).items():
        (tmp_path / name).write_text(text)
    fast = AutoTokenizer.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    pieces = [
        " ",
        "  ",
        "\n",
        "\t",
        "def",
        "'ll",
        "é",
        "東京",
        "🙂",
        "\x00",
        "12",
        END,
        "\r\n",
        "_",
        "\u00a0",
        "\u2581",
    ]
    texts = [*PROBES, *("".join(rng.choice(pieces, 20)) for _ in range(200))]
    assert fast(texts).input_ids == [tokenizer.encode(text) for text in texts]
    assert fast.decode(fast(texts[0]).input_ids) == texts[0] and fast.eos_token_id == tokenizer.end_of_text
    shutil.rmtree(tmp_path)


def test_a_run_starts_from_an_export_as_from_the_run(runs, exports, small_data, tmp_path):
    losses = []
    for source in (runs["t6"], exports["t6"]):
        folder = tmp_path / f"{source.name}_next"
        overrides = [*SMALL_RUN, *small_data, "model.k_rank=1", "trainer.max_steps=2", f"trainer.init_from={source}"]
        assert train.main(configured(Config, [*overrides, f"run.dir={folder}"])) == 0
        losses.append([json.loads(line)["train/loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()])
    assert losses[0] == losses[1]
    wrong = [*SMALL_RUN, *small_data, "model.k_rank=2", f"trainer.init_from={exports['t6']}", f"run.dir={tmp_path}/x"]
    with pytest.raises(ConfigError, match="model.k_rank: 1 there, 2 here"):
        train.main(configured(Config, wrong))
    other = [*SMALL_RUN, *small_data, "model=mha", f"trainer.init_from={exports['mha']}", f"run.dir={tmp_path}/x"]
    with pytest.raises(ConfigError, match="was trained with another tokenizer than the data"):
        train.main(configured(Config, other))
    assert not (tmp_path / "x").exists()
