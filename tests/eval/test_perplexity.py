"""Perplexity of any text, against a plain loop over transformers' LLaMA with the same weights."""

import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from configs.errors import ConfigError
from data.shards import TokenShards
from eval import run as eval_run
from tests.eval.helpers import evaluation, outcome


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """Two documents, one longer than the context and one shorter."""
    folder = tmp_path_factory.mktemp("book")
    (folder / "a.txt").write_text("The loop target is evaluated once for each item.\n" * 12)
    (folder / "b.txt").write_text("A short one: x = 1, naïve.")
    return folder


@torch.no_grad()
def plain_loop(llama, documents, seq_len, stride):
    """The sliding window of transformers' documentation on perplexity, one window at a time: every token's loss."""
    losses = []
    for ids in documents:
        previous = 0
        for begin in range(0, len(ids) - 1, stride):
            end = min(begin + seq_len, len(ids) - 1)
            tokens = torch.tensor(ids[begin : end + 1])
            window = F.cross_entropy(llama(tokens[None, :-1]).logits[0].float(), tokens[1:], reduction="none")
            losses.extend(window[max(previous - begin, 0) :].tolist())
            previous = end
            if end == len(ids) - 1:
                break
    return np.array(losses)


@pytest.mark.parametrize("stride", [None, 24, 64])
def test_perplexity_of_files_is_that_of_a_plain_loop_on_llama(ours, theirs, their_tokenizer, book, stride):
    found = outcome(ours, f"suite.files=[{book}/*.txt]", "batch_size=3", f"suite.stride={stride or 'null'}")
    texts = [path.read_text() for path in sorted(book.glob("*.txt"))]
    documents = [[ours.tokenizer.end_of_text, *their_tokenizer(text)["input_ids"]] for text in texts]
    losses = plain_loop(theirs, documents, ours.context, stride or ours.context)
    assert found.results["tokens"] == len(losses) == sum(len(ids) - 1 for ids in documents)
    assert found.results["loss"] == pytest.approx(losses.mean(), abs=1e-4)
    assert found.results["perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    size = sum(len(text.encode()) for text in texts)
    assert found.results["bits_per_byte"] == pytest.approx(losses.sum() / math.log(2) / size, abs=1e-4)
    curves = found.details["curves"]
    assert sum(curves["by_position"]["tokens"]) == sum(curves["by_document_length"]["tokens"]) == len(losses)
    lengths = curves["by_document_length"]
    short = len(documents[1]) - 1
    assert lengths["tokens"][0] == short and lengths["loss"][0] == pytest.approx(losses[-short:].mean(), abs=1e-4)
    if stride is None:
        firsts = [losses[start] for start in (*range(0, len(losses) - short, ours.context), len(losses) - short)]
        assert curves["by_position"]["loss"][0] == pytest.approx(np.mean(firsts), abs=1e-4)


def test_the_validation_split_counts_by_its_own_documents(ours):
    found = outcome(ours)
    shards = TokenShards(ours.config.data.dir, "val")
    lengths = found.details["curves"]["by_document_length"]
    starts = [*shards.documents()[0].tolist(), len(shards.arrays[0])]
    counted = found.results["tokens"]  # targets 1 to n
    shortest = sum(max(0, min(end, counted + 1) - max(start, 1)) for start, end in pairwise(starts)
                   if end - start <= lengths["up_to"][0])  # fmt: skip
    assert lengths["tokens"][0] == shortest


def test_rows_that_are_no_documents_are_joined(ours, tmp_path):
    lines = ["First line.\n", "\n", "Second line.\n"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    (tmp_path / "whole.txt").write_text("".join(lines))
    joined = outcome(ours, f"suite.files=[{tmp_path}/rows.jsonl]", "suite.join=''")
    whole = outcome(ours, f"suite.files=[{tmp_path}/whole.txt]")
    assert joined.results == whole.results


def test_a_text_that_is_none_is_refused_and_not_left_out(ours, tmp_path):
    """Without it the result would be that of another text."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "b.jsonl").write_text('{"text": "good"}\n{"text": "half \\ud800"}\n')
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\nnot JSON\n')
    for name, reason in (("a.txt", "document 1: invalid UTF-8"), ("b.jsonl", "document 2: invalid UTF-8"),
                         ("c.jsonl", "document 2: not JSON")):  # fmt: skip
        with pytest.raises(ConfigError, match=f"suite.files={tmp_path}/{name}: {reason}"):
            outcome(ours, f"suite.files=[{tmp_path}/{name}]")


def test_the_command_leaves_json_a_plot_and_a_line(trained, book):
    assert eval_run.main(evaluation(f"run={trained}", f"suite.files=[{book}/*.txt]", "suite.name=book", "limit=3")) == 0
    (path,) = trained.glob("results/book_*.json")
    record = json.loads(path.read_text())
    assert record["limit"] == 3 and record["suite"] == "book" and record["stderr"]["loss"] > 0
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/book/loss"] == record["results"]["loss"] and last["step"] == record["step"]


def test_bad_requests_name_the_key(ours, trained, small_data, tmp_path):
    for overrides, message in (
        (["suite.stride=65"], "suite.stride=65: must be at most the windows' length, 64"),
        ([f"suite.files=[{tmp_path}/*.txt]"], "suite.files: no file matches"),
        (["suite.data_dir=nowhere"], "suite.data_dir=nowhere: not prepared"),
        ([f"suite.data_dir={small_data[1].removeprefix('data.dir=')}"], "is not the tokenizer of"),
        (["suite.seq_len=10000000"], "has no 10000000 tokens in a row, at most"),
    ):
        with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
            outcome(ours, *overrides)
    with pytest.raises(ConfigError, match="suite.files and path: give one source of text"):
        evaluation("run=x", "suite.files=[a.txt]", "suite.path=wikitext")
    with pytest.raises(ConfigError, match="step=5: .* has no checkpoint of it; there are 4, 8, 12"):
        eval_run.main(evaluation(f"run={trained}", "step=5"))
