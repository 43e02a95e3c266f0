"""A benchmark that needs no download: which of four continuations is the text's own?

Each question is a passage of a validation document and the words that follow it; the wrong answers are what follows
passages of other documents. All four come from the same pool, so only the passage tells them apart. Scored as the
harness scores multiple choice: `acc` by log-likelihood, `acc_norm` by log-likelihood a character.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import datasets
import numpy as np
from lm_eval.api.task import ConfigurableTask

from configs.errors import ConfigError
from data.documents import place
from data.loader import EVAL_KEY, permute
from data.sources.builtin import builtin_corpus
from eval.loading import LoadedRun
from eval.texts import text_of
from training.ranks import from_main

TASKS = ("builtin_cloze", "cloze")  # on the built-in corpus, on the run's own data
VERSION = 1.0
CONTEXT_WORDS, ANSWER_WORDS = 32, 8
CHOICES = 4
QUESTIONS = 400
DOCUMENTS = 2000  # read of a large validation split
VAL_FRACTION = 0.05  # of the built-in corpus, as configs/data/builtin.yaml has it


class Passage(NamedTuple):
    document: int
    context: str
    answer: str  # the words that follow


def task(name: str, run: LoadedRun) -> ConfigurableTask:
    """Return the harness's task `name` with its questions."""
    return as_task(name, from_main(lambda: questions(texts_of(name, run))))


def as_task(name: str, asked: list[dict]) -> ConfigurableTask:
    """Return questions {context, choices, gold} as a multiple-choice task of the harness."""
    metrics = [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")]
    return ConfigurableTask(config={
        "task": name, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(asked)},
        "test_split": "test", "fewshot_split": "test", "num_fewshot": 0,
        "output_type": "multiple_choice", "metric_list": metrics, "metadata": {"version": VERSION},
        "doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "gold",
    })  # fmt: skip


def texts_of(name: str, run: LoadedRun) -> Iterable[str]:
    """Return validation documents: from the run's shards if they have what is asked for, else from the modules."""
    if name == "cloze" or run.config.data.source == "builtin":
        return shard_texts(run)
    return (one["text"] for one in builtin_corpus(progress=True) if place(one["name"].encode()) <= VAL_FRACTION)


def shard_texts(run: LoadedRun) -> Iterator[str]:
    """Yield documents of the run's validation split, at most DOCUMENTS of them, spread over it."""
    documents = text_of(run.validation()).documents()
    for number in sorted(permute(np.arange(min(DOCUMENTS, len(documents))), len(documents), EVAL_KEY)):
        ids = documents[number].tolist()
        yield run.tokenizer.decode(token for token in ids if token != run.tokenizer.end_of_text)


def questions(texts: Iterable[str]) -> list[dict]:
    """Return at most QUESTIONS {context, choices, gold}, always the same ones. ConfigError for too little text."""
    passages = [Passage(number, context, answer) for number, text in enumerate(texts) for context, answer in cuts(text)]
    chosen = permute(np.arange(min(QUESTIONS, len(passages))), len(passages), EVAL_KEY) if passages else []
    asked = []
    for number in sorted(chosen):
        passage = passages[number]
        wrong = distractors(passages, passage)
        if len(wrong) == CHOICES - 1:
            gold = digest(passage.context) % CHOICES
            choices = [*wrong[:gold], passage.answer, *wrong[gold:]]
            asked.append({"context": passage.context, "choices": choices, "gold": gold})
    if not asked:
        raise ConfigError(
            f"suite.tasks: the validation split is too small for questions: they need several documents of more than "
            f"{CONTEXT_WORDS + ANSWER_WORDS} words"
        )
    return asked


def cuts(text: str) -> Iterator[tuple[str, str]]:
    """Yield one after another the passages of a text that a single space separates from the words that follow them."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    for start in range(0, len(words) - CONTEXT_WORDS - ANSWER_WORDS + 1, CONTEXT_WORDS + ANSWER_WORDS):
        border, end = start + CONTEXT_WORDS, start + CONTEXT_WORDS + ANSWER_WORDS
        before, after = words[border - 1][1], words[border][0]
        if text[before:after] == " ":
            yield text[words[start][0] : before], text[after : words[end - 1][1]]


def distractors(passages: list[Passage], asked: Passage) -> list[str]:
    """Return CHOICES - 1 answers to passages of other documents, or fewer if there are no more."""
    wrong: list[str] = []
    key = digest(asked.context + asked.answer)
    for number in permute(np.arange(min(64, len(passages))), len(passages), key):
        other = passages[number]
        if other.document != asked.document and other.answer not in (asked.answer, *wrong):
            wrong.append(other.answer)
    return wrong[: CHOICES - 1]


def digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
