"""lm-evaluation-harness on our models: its model interface."""

import hashlib
import json
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from configs.errors import ConfigError
from eval.loading import LoadedRun
from eval.scoring import log_likelihoods
from model.generation import stream
from model.sampling import Sampling
from training.ranks import merge, rank, world_size

STOP_CHECK_EVERY = 16  # generated tokens between two searches for a stop sequence


class HarnessModel(TemplateLM):
    """A run's model as the harness sees it.

    A context is not preceded by end-of-text unless it is empty or `add_bos` is set: what the harness does for models
    whose tokenizer has no token to begin with, GPT-2's among them. Longer requests than `max_length` lose their
    beginning, token by token; a continuation that is itself longer is scored in consecutive windows.

    The harness knows nothing of several processes, so that all draw the same examples; the requests are shared out
    here.
    """

    def __init__(self, run: LoadedRun, batch_size: int = 16, max_length: int | None = None, add_bos: bool = False):
        super().__init__()
        self.run, self.model, self.tokenizer = run, run.model, run.tokenizer
        self.batch_size, self.max_length, self.add_bos = batch_size, max_length or run.context, add_bos
        self._device = run.runtime.device
        self.shortened = 0  # requests that have lost their beginning

    # --- text and tokens
    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.end_of_text

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        add_bos = self.add_bos if add_special_tokens is None else add_special_tokens
        start = [self.eot_token_id] if add_bos else []
        return start + self.tokenizer.encode(string)

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
        split = [
            (number, window)
            for number, (_, context, continuation) in enumerate(requests)
            for window in self.windows(context, continuation)
        ]
        whole = self.max_length + 1  # of which the model sees all but the last
        self.shortened += sum(len(context) > max(1, whole - len(answer)) for _, context, answer in requests)
        scores = log_likelihoods(
            self.model, [window for _, window in split], self.max_length, self.batch_size, self._device,
            lambda batches: self.progress(batches, "scoring"),
        )  # fmt: skip
        sums: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for (number, _), (log_p, greedy) in zip(split, scores, strict=True):
            sums[number] = (sums[number][0] + log_p, sums[number][1] and greedy)
        return sums

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        texts = [(None, [self.prefix_token_id], self.tokenizer.encode(request.args[0])) for request in requests]
        return [log_p for log_p, _ in self._loglikelihood_tokens(texts)]

    def windows(self, context: list[int], continuation: list[int]) -> list[tuple[list[int], list[int]]]:
        """Return a request as requests that the model can see at once."""
        if 0 < len(continuation) <= self.max_length:
            return [(context, continuation)]
        windows = get_rolling_token_windows(continuation, context[-1], self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def progress(self, batches: list, doing: str):
        return track(batches, description=doing, transient=True, disable=rank() != 0)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return what follows each request; those with the same settings are continued together, like lengths first."""
        groups: dict[str, list] = {}
        for number, request in enumerate(requests):
            text, settings = request.args
            settings = normalize_gen_kwargs(settings)
            ids = self.tok_encode(text) or [self.eot_token_id]
            room = self.max_length - settings["max_gen_toks"]
            if room < 1:
                raise ConfigError(
                    f"suite.max_length={self.max_length}: {request.task_name} generates up to "
                    f"{settings['max_gen_toks']} tokens, which leaves no room for its questions; set suite.max_length= "
                    "to more than that"
                )
            self.shortened += len(ids) > room
            ids = ids[-room:]
            key = json.dumps(settings, sort_keys=True, default=str)
            groups.setdefault(key, []).append((number, ids, settings))
        batches = []
        for members in groups.values():
            members.sort(key=lambda member: -len(member[1]))
            batches += [members[i : i + self.batch_size] for i in range(0, len(members), self.batch_size)]
        mine = batches if self.run.lockstep else batches[rank() :: world_size()]
        texts: dict[int, str] = {}
        for batch in self.progress(mine, "generating"):
            numbers, contexts, settings = zip(*batch, strict=True)
            texts |= zip(numbers, self.generate(list(contexts), settings[0]), strict=True)
        texts = merge(texts)
        return [texts[number] for number in range(len(requests))]

    def generate(self, contexts: list[list[int]], settings: dict) -> list[str]:
        """Return the texts that follow the contexts, cut where a stop sequence begins."""
        stops = [stop for stop in handle_stop_sequences(list(settings["until"]), eos=None) if stop]
        temperature = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0
        sampling = Sampling(temperature=temperature, top_k=settings.get("top_k") or None, top_p=settings.get("top_p"))
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
                texts = map(self.tokenizer.decode, rows)
                ended = (token is None or any(stop in text for stop in stops)
                         for token, text in zip(tokens, texts, strict=True))  # fmt: skip
                if all(ended):
                    break
        return [postprocess_generated_text(self.tokenizer.decode(row), stops, None) for row in rows]
