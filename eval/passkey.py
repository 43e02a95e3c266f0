"""Passkey retrieval (Mohtashami and Jaggi, arXiv 2305.16300): a number hidden in filler, asked for at the end."""

import random

import numpy as np

from data.tokenizers import Tokenizer
from eval.loading import LoadedRun
from eval.scoring import log_likelihoods

INTRODUCTION = "Somewhere in this long text there is a pass key. Find it and remember it.\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
QUESTION = "What is the pass key? The pass key is"
ANSWER = " {key}"


def prompt(tokenizer: Tokenizer, key: str, length: int, depth: float) -> tuple[list[int], list[int]] | None:
    """Return (context, answer), together `length` + 1 tokens, of which a model sees `length`; None without room for it.

    `depth` says where the needle is: 0 at the start of the filler, 1 at its end.
    """
    start = [tokenizer.end_of_text, *tokenizer.encode(INTRODUCTION)]
    needle, question = tokenizer.encode(NEEDLE.format(key=key)), tokenizer.encode(QUESTION)
    answer = tokenizer.encode(QUESTION + ANSWER.format(key=key))[len(question) :]
    room = length + 1 - len(start) - len(needle) - len(question) - len(answer)
    if room < 0:
        return None
    line = tokenizer.encode(FILLER)
    filler = (line * (room // len(line) + 1))[:room]
    unit = len(line) if 0 < depth < 1 else 1  # inside the filler the needle goes between two lines
    before = min(round(depth * room / unit) * unit, room)
    return [*start, *filler[:before], *needle, *filler[before:], *question], answer


def retrieve(
    run: LoadedRun, length: int, depths: list[float], trials: int, batch_size: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the share of keys that greedy decoding gives and the mean log-probability of a key's token in nats, both
    [depths]; None if `length` has no room for a prompt.

    The keys are the same for every model and length.
    """
    draw = random.Random(0)
    keys = [[str(draw.randrange(10_000, 100_000)) for _ in range(trials)] for _ in depths]
    asked = [prompt(run.tokenizer, key, length, depth) for depth, row in zip(depths, keys, strict=True) for key in row]
    if None in asked:
        return None
    scores = log_likelihoods(run.model, asked, length, batch_size, run.runtime.device)
    greedy = np.array([found for _, found in scores], dtype=float).reshape(len(depths), trials)
    nats = np.array([log_p / len(answer) for (log_p, _), (_, answer) in zip(scores, asked, strict=True)])
    return greedy.mean(1), nats.reshape(len(depths), trials).mean(1)
