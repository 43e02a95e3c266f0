"""lm-evaluation-harness on our models: its model interface."""

import hashlib
from collections.abc import Sequence
from itertools import chain, islice
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from configs.errors import ConfigError
from eval.loading import LoadedRun
from eval.scoring import log_likelihoods
from model.generation import stream
from model.sampling import Sampling
from training.ranks import gather, rank, world_size

STOP_CHECK_EVERY = 16  # generated tokens between two searches for a stop sequence


class HarnessModel(TemplateLM):
    """A run's model as the harness sees it.

    A context is not preceded by end-of-text unless it is empty: what the harness does for models whose tokenizer has no
    token to begin with, GPT-2's among them. Longer requests than `max_length` lose their beginning, token by token; a
    continuation that is itself longer is scored in consecutive windows.

    The harness knows nothing of several processes, so that all draw the same examples; the requests are shared out
    here.
    """

    def __init__(self, run: LoadedRun, batch_size: int = 16, max_length: int | None = None):
        super().__init__()
        self.run, self.model, self.tokenizer = run, run.model, run.tokenizer
        self.batch_size, self.max_length = batch_size, max_length or run.context
        self.shortened = 0  # requests that have lost their beginning

    # --- text and tokens
    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        context_ids, continuation_ids = super()._encode_pair(context, continuation)
        if not continuation_ids:  # one token spans the border: it counts as the continuation
            whole = self.tok_encode(context + continuation)
            context_ids, continuation_ids = whole[:-1], whole[-1:]
        return context_ids or [self.prefix_token_id], continuation_ids  # a context of spaces went to the continuation

    # --- what the harness asks for
    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        for request in requests:
            if not request.args[1]:
                raise ConfigError(
                    f"suite.tasks: {request.task_name}: question {request.doc_id} has an empty answer, which has no "
                    f"likelihood to compare; correct or remove it: {request.args[0][-80:]!r}"
                )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs):
        whole = self.max_length + 1  # of which the model sees all but the last
        self.shortened += sum(len(context) > max(1, whole - len(answer)) for _, context, answer in requests)
        windows = [self.windows(context, continuation) for _, context, continuation in requests]
        scores = iter(log_likelihoods(
            self.model, list(chain.from_iterable(windows)), self.max_length, self.batch_size, self.run.runtime.device,
            lambda batches: self.progress(batches, "scoring"),
        ))  # fmt: skip
        parts = (list(islice(scores, len(own))) for own in windows)
        return [(sum(log_p for log_p, _ in own), all(greedy for _, greedy in own)) for own in parts]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        texts = [(None, [self.prefix_token_id], self.tokenizer.encode(request.args[0])) for request in requests]
        return [log_p for log_p, _ in self._loglikelihood_tokens(texts)]

    def windows(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return a request as requests that the model can see at once."""
        if 0 < len(continuation) <= self.max_length:
            return [(context, continuation)]
        windows = get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def progress(self, batches: Sequence, doing: str):
        return track(batches, description=doing, transient=True, disable=rank() != 0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what follows each request; those with the same settings are continued together, like lengths first."""
        asked = []
        for request in requests:
            settings = normalize_gen_kwargs(request.args[1])
            ids = self.tok_encode(request.args[0]) or [self.eot_token_id]
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ConfigError(
                    f"suite.max_length={self.max_length}: {request.task_name} generates up to "
                    f"{settings['max_gen_toks']} tokens, which leaves no room for its questions; set suite.max_length= "
                    "to more than that"
                )
            self.shortened += len(ids) > room
            asked.append((ids[-room:], settings))
        order = Collator(asked, lambda one: -len(one[0]), lambda one: one[1], group_by="gen_kwargs")
        batches = list(order.get_batched(n=self.batch_size))
        mine = range(len(batches)) if self.run.lockstep else range(rank(), len(batches), world_size())
        texts = {number: self.generate(batches[number]) for number in self.progress(mine, "generating")}
        texts = {number: found for part in gather(texts) for number, found in part.items()}
        return order.get_original([text for number in range(len(batches)) for text in texts[number]])

    def generate(self, batch: list[tuple[list[int], dict]]) -> list[str]:
        """Return the texts that follow contexts with the same settings, cut where a stop sequence begins."""
        contexts, settings = [context for context, _ in batch], batch[0][1]
        stops = [stop for stop in settings["until"] if stop]
        chosen = {key: settings.get(key) or None for key in ("top_k", "top_p")}  # a top_k of 0 is none
        sampling = Sampling(temperature=settings.get("temperature", 0.0), **chosen)
        digest = hashlib.sha256(repr(contexts).encode()).digest()  # the same draws for the same requests
        steps = stream(
            self.model, contexts, settings["max_gen_toks"], sampling, seed=int.from_bytes(digest[:4], "little"),
            stop_tokens=[self.eot_token_id], vocab_size=self.tokenizer.vocab_size,
        )  # fmt: skip
        rows: list[list[int]] = [[] for _ in contexts]
        for number, tokens in enumerate(steps, 1):
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
            if number % STOP_CHECK_EVERY == 0:
                going = (row for row, token in zip(rows, tokens, strict=True) if token is not None)
                if all(any(stop in self.tokenizer.decode(row) for stop in stops) for row in going):
                    break
        return [postprocess_generated_text(self.tokenizer.decode(row), stops, None) for row in rows]
