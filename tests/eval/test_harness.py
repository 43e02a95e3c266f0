"""lm-evaluation-harness on our models: the same numbers as its own `hf` model on the same weights."""

import os
from types import SimpleNamespace

import lm_eval
import numpy as np
import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from configs.errors import ConfigError
from eval import cloze
from eval.harness import HarnessModel
from eval.scoring import share_rows
from eval.tasks import load_tasks
from tests.eval.helpers import outcome

TEXTS = [
    "The following expressions are evaluated from left to right.",
    "An assignment statement evaluates the expression list and assigns the single resulting object to each target.",
    "",
    "If",
]


def requests(*pairs):
    return [SimpleNamespace(args=pair, task_name="task", doc_id=number) for number, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def hf(theirs, their_tokenizer, ours):
    return HFLM(pretrained=theirs, tokenizer=their_tokenizer, max_length=ours.context, batch_size=3, device="cpu")


@pytest.fixture(scope="module")
def pairs():
    """Contexts of every length up to several windows, with short and long continuations, and shared contexts."""
    long = " ".join(TEXTS[:2]) + " "
    contexts = ["", "If", "The class ", long, long * 3]
    return [
        (context, answer) for context in contexts for answer in (" A", " B", " x = 1", " " + TEXTS[1], " if a", "\n")
    ]


def test_log_likelihoods_and_greedy_flags_are_those_of_the_harnesss_hf_model(ours, hf, pairs):
    expected = hf.loglikelihood(requests(*pairs), disable_tqdm=True)
    found = HarnessModel(ours, batch_size=2).loglikelihood(requests(*pairs))
    assert np.allclose([p for p, _ in found], [p for p, _ in expected], atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_rolling_log_likelihoods_are_those_of_the_harnesss_hf_model(ours, hf):
    texts = requests(*((text,) for text in [*TEXTS, " ".join(TEXTS) * 4]))
    expected = hf.loglikelihood_rolling(texts, disable_tqdm=True)
    assert np.allclose(HarnessModel(ours).loglikelihood_rolling(texts), expected, atol=1e-3)


def test_generated_texts_are_those_of_the_harnesss_hf_model(ours, hf):
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False, "top_k": 0}  # 0 is off
    asked = requests(*((text, dict(settings)) for text in ("The class", "If the", "x = ", TEXTS[1] * 3)))
    expected = [hf.generate_until([one], disable_tqdm=True)[0] for one in asked]
    assert HarnessModel(ours, batch_size=2).generate_until(asked) == expected


def test_a_generation_that_leaves_no_room_for_its_question_is_refused(ours):
    settings = {"until": ["\n"], "do_sample": False}
    asked = requests(("The class", settings | {"max_gen_toks": ours.context}))
    with pytest.raises(
        ConfigError, match=f"suite.max_length={ours.context}: task generates up to {ours.context} tokens"
    ):
        HarnessModel(ours).generate_until(asked)
    longer = HarnessModel(ours, max_length=ours.context + 20)
    both = requests(*((text, settings | {"max_gen_toks": ours.context}) for text in ("The class", "If the")))
    first, second = longer.generate_until(both)
    assert first != second


def test_requests_that_lose_their_beginning_are_counted(ours):
    model = HarnessModel(ours)
    model.loglikelihood(requests(("If", " so"), (TEXTS[1] * 40, " so"), (TEXTS[1] * 40, " not")))
    assert model.shortened == 2
    model.generate_until(requests((TEXTS[1] * 40, {"until": ["\n"], "max_gen_toks": 4, "do_sample": False})))
    assert model.shortened == 3


def test_an_empty_answer_is_refused(ours):
    with pytest.raises(ConfigError, match="suite.tasks: task: question 1 has an empty answer"):
        HarnessModel(ours).loglikelihood(requests(("If", " so"), ("If", "")))


def test_a_context_of_spaces_is_an_empty_one(ours):
    spaces, empty = HarnessModel(ours).loglikelihood(requests((" ", "stone"), ("", " stone")))
    assert spaces == pytest.approx(empty)


def test_answers_do_not_depend_on_the_batch(ours, pairs):
    whole = HarnessModel(ours, batch_size=64).loglikelihood(requests(*pairs))
    alone = [HarnessModel(ours, batch_size=1).loglikelihood(requests(pair))[0] for pair in pairs]
    assert np.allclose([p for p, _ in whole], [p for p, _ in alone], atol=1e-5)
    assert [greedy for _, greedy in whole] == [greedy for _, greedy in alone]


def test_requests_that_begin_alike_share_a_row():
    context = [5, 6, 7]
    rows = share_rows([(context, [8]), (context, [9]), (context, [8, 3, 4]), ([5, 6], [1]), ([1] * 9, [2])], 6)
    assert [row.tokens for row in rows] == [[1] * 6, [5, 6, 7, 8, 3]]
    assert sorted(number for row in rows for number, *_ in row.requests) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="1 to 6 tokens"):
        share_rows([(context, [1] * 7)], 6)


def test_cloze_scores_are_those_of_the_harnesss_hf_model(ours, hf):
    asked = cloze.questions(cloze.shard_texts(ours))[:60]
    scores = [
        lm_eval.simple_evaluate(
            model, tasks=[cloze.as_task("cloze", asked)], task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0, log_samples=True,
        )
        for model in (hf, HarnessModel(ours))
    ]  # fmt: skip
    expected, found = (score["results"]["cloze"] for score in scores)
    assert found == expected and found["acc,none"] > 0
    for one, other in zip(*(score["samples"]["cloze"] for score in scores), strict=True):
        assert np.allclose([r[0] for r in one["filtered_resps"]], [r[0] for r in other["filtered_resps"]], atol=1e-3)


@pytest.mark.skipif("T6_BENCHMARKS" not in os.environ, reason="T6_BENCHMARKS names no folder of benchmarks")
@pytest.mark.parametrize("task", ["hellaswag", "arc_easy"])
def test_benchmark_scores_are_those_of_the_harnesss_hf_model(ours, theirs, their_tokenizer, task):
    hf = HFLM(pretrained=theirs, tokenizer=their_tokenizer, max_length=256, batch_size=8, device="cpu")
    folder = os.environ["T6_BENCHMARKS"]
    tasks = ["suite=harness", f"suite.tasks=[{task}]", f"suite.data_dir={folder}"]
    found = outcome(ours, *tasks, "suite.max_length=256", "limit=200").results
    expected = lm_eval.simple_evaluate(
        hf, tasks=load_tasks([task], folder), task_manager=TaskManager(include_defaults=False), limit=200,
        bootstrap_iters=0,
    )["results"][task]  # fmt: skip
    assert found == {f"{task}/{metric}": expected[f"{metric},none"] for metric in ("acc", "acc_norm")}
