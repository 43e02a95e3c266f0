"""Length: RoPE scaling against transformers', the same tokens at every length, and passkeys that an oracle finds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from configs.errors import ConfigError
from eval import run as eval_run
from eval.config import question
from eval.loading import LoadedRun
from eval.passkey import prompt, retrieve
from eval.texts import read_text
from model.transformer import Transformer
from tests.eval.helpers import evaluation, outcome

HUGGING_FACE = {"linear": ("linear", 4.0), "ntk": ("dynamic", 1.0), "yarn": ("yarn", 4.0)}  # NTK at 4 x the length


@torch.no_grad()
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_scaled_rope_is_transformers(ours, theirs, kind):
    name, factor = HUGGING_FACE[kind]
    config = transformers.LlamaConfig(**(theirs.config.to_dict() | {
        "rope_parameters": {"rope_type": name, "factor": factor, "rope_theta": 10000.0},
        "attn_implementation": "eager",
    }))  # fmt: skip
    llama = transformers.LlamaForCausalLM(config).eval()
    llama.load_state_dict(theirs.state_dict())
    tokens = torch.randint(512, (2, 4 * ours.context), generator=torch.Generator().manual_seed(0))
    plain = ours.model.logits(tokens)
    ours.scale_rope(kind, 4.0)
    try:
        scaled = ours.model.logits(tokens)
    finally:
        ours.scale_rope("none", None)
    assert torch.allclose(scaled, llama(tokens).logits, atol=2e-4)
    assert not torch.allclose(scaled, plain, atol=1e-3) and torch.equal(ours.model.logits(tokens), plain)


@torch.no_grad()
def test_a_run_trained_with_scaled_rope_is_scaled_from_where_it_began(ours):
    """The same model, its scaling a part of its configuration or an evaluation's."""
    tokens = torch.randint(512, (2, 8 * ours.context), generator=torch.Generator().manual_seed(0))
    changes = {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": ours.context}
    attention = ours.config.model.replace(**changes)
    grown = Transformer(replace(ours.model.config, attention=attention.replace())).eval()
    grown.load_state_dict(ours.model.state_dict())
    run = replace(ours, config=ours.config.replace(model=attention), model=grown)
    try:
        for factor in (4.0, 8.0):
            ours.scale_rope("yarn", factor)
            run.scale_rope("yarn", factor / 4)
            assert torch.equal(grown.logits(tokens), ours.model.logits(tokens))
        run.scale_rope("none", None)
        ours.scale_rope("yarn", 4.0)
        assert torch.equal(grown.logits(tokens), ours.model.logits(tokens))
    finally:
        ours.scale_rope("none", None)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    (folder / "long.txt").write_text("".join(f"The value of item {n} is {n * n % 97}.\n" for n in range(60)))
    (folder / "short.txt").write_text("Too short to count.")
    return folder


@torch.no_grad()
def test_every_length_is_scored_on_the_same_tokens(ours, book):
    arguments = [f"suite.files=[{book}/*.txt]", "suite.lengths=[32,128,256]", "suite.scored=20", "suite.trials=0"]
    config = evaluation("run=x", "suite=long_context", *arguments, "suite.scalings=[none,yarn]", "suite.windows=4")
    found = config.suite.run(ours, config)
    document, _ = sorted(read_text(config.suite, ours).documents(), key=len, reverse=True)
    places = range(len(document) - 1, 255, -20)
    ends = [places[n] for n in np.linspace(0, len(places) - 1, 4).round().astype(int)]
    for length in (32, 128, 256):
        losses = []
        for end in ends:
            tokens = torch.tensor(document[end - length : end + 1])
            logits = ours.model.logits(tokens[None, :-1])[0]
            losses.append(F.cross_entropy(logits[-20:], tokens[-20:]))
        assert found.results[f"none/{length}/loss"] == pytest.approx(torch.stack(losses).mean().item(), abs=1e-5)
    assert found.results["yarn/32/loss"] == found.results["none/32/loss"]  # no longer than in training
    assert found.results["yarn/256/loss"] != found.results["none/256/loss"]
    assert found.results["none/256/tokens_per_second"] > 0 and found.results["none/256/memory_gb"] > 0


class Copier(nn.Module):
    """Continues as the text did after the last four tokens, if it sees that they were there before."""

    def __init__(self, vocab_size: int, sight: int):
        super().__init__()
        self.vocab_size, self.sight, self.head = vocab_size, sight, nn.Identity()

    def logits(self, tokens):
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for row, ids in enumerate(tokens.tolist()):
            for place in range(3, len(ids)):
                for earlier in range(place - 1, max(3, place - self.sight), -1):
                    if ids[earlier - 3 : earlier + 1] == ids[place - 3 : place + 1]:
                        logits[row, place, ids[earlier + 1]] = 1.0
                        break
        return self.head(logits)


def test_passkeys_are_found_by_who_can_see_them(ours):
    found = {}
    for sight in (10_000, 150):
        model = Copier(ours.model.config.vocab_size, sight)
        oracle = LoadedRun(ours.dir, ours.config, 0, 0, model, ours.tokenizer, ours.runtime)
        found[sight], nats = retrieve(oracle, 400, [0.0, 1.0], trials=2, batch_size=4)
        assert nats.shape == (2,)
    assert found[10_000].tolist() == [1.0, 1.0] and found[150].tolist() == [0.0, 1.0]
    assert retrieve(ours, 32, [0.5], 1, 1) is None


def test_prompts_have_their_length_and_depth(ours):
    for length in (300, 512):
        places = []
        for depth in (0.0, 0.3, 1.0):
            context, answer = prompt(ours.tokenizer, "31415", length, depth)
            assert len(context) + len(answer) == length + 1
            text = ours.tokenizer.decode(context + answer)
            assert text.endswith("The pass key is 31415") and text.count("31415") == 3
            places.append(text.index("31415") / len(text))
        assert places == sorted(places) and places[0] < 0.35 and places[-1] > 0.6


def test_the_command_leaves_a_table_and_plots(trained, book, capsys):
    lengths = [f"suite.files=[{book}/*.txt]", "suite.lengths=[64,256]", "suite.scalings=[none,yarn]"]
    config = evaluation(
        f"run={trained}", "suite=long_context", *lengths, "suite.trials=1", "suite.depths=[0,1]", "limit=2"
    )
    assert eval_run.main(config) == 0
    name = f"long_context{question(config)}"
    for suffix in (".png", "_passkey.png"):
        assert (trained / f"results/{name}{suffix}").read_bytes()[:4] == b"\x89PNG"
    table = (trained / f"results/{name}.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()[2:] if line.startswith("|")]
    assert [row[2:4] for row in rows] == [["none", "64"], ["yarn", "64"], ["none", "256"], ["yarn", "256"]]
    record = json.loads((trained / f"results/{name}.json").read_text())
    assert [row[4] for row in rows] == [f"{record['results'][f'{row[2]}/{row[3]}/loss']:.4f}" for row in rows]
    assert "none/256/passkey" in record["results"] and "none/64/passkey" not in record["results"]
    assert record["sweep"]["points"]["yarn"]["256"]["passkey_nats"][0] < 0
    assert table in capsys.readouterr().out


def test_lengths_that_no_document_has_are_refused(ours, book):
    with pytest.raises(ConfigError, match=r"suite.lengths=\[64, 100000\]: the longest document"):
        outcome(ours, "suite=long_context", f"suite.files=[{book}/*.txt]", "suite.lengths=[64,100000]")
    with pytest.raises(ConfigError, match="must be none, linear, ntk or yarn"):
        evaluation("run=x", "suite=long_context", "suite.scalings=[alibi]")
