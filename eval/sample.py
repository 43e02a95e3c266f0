"""Text from a checkpoint: `python -m eval.sample run=runs/NAME prompt="The module"`.

The text goes to standard output as it comes, and facts about it to standard error.
"""

import contextlib
import dataclasses
import itertools
import sys
import time
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator, model_validator
from rich.console import Console
from rich.rule import Rule

from configs.app import app
from configs.errors import ConfigError, Mistakes
from configs.kinds import LONGEST_TEXT, PathText
from configs.load import Command
from data.tokenizers import Tokenizer
from eval.config import KernelConfig
from eval.loading import LoadedRun, load_run
from model.cache import CACHE_DTYPES
from model.counting import kv_bytes_per_token
from model.generation import stream
from model.sampling import Sampling
from model.transformer import Transformer
from training.device import Device, Dtype, dtype_name

COLDEST = 1e-3  # below it, logits overflow


class SampleConfig(Command):
    """`python -m eval.sample`."""

    yaml: ClassVar[str] = "sample"

    run: PathText  # the run folder
    prompt: str = ""
    count: int = Field(1, ge=1, le=10_000)  # samples at once; sample i is the one that seed + i gives alone
    max_new_tokens: int = Field(160, ge=1, le=LONGEST_TEXT)  # a text also ends where the model ends its document
    temperature: float = Field(0.8, ge=0, le=1000)  # 0: always the most likely token
    top_k: int | None = Field(50, ge=1, le=2**31)  # keep the k most likely tokens
    top_p: float | None = Field(None, gt=0, le=1)  # keep the most likely tokens that together have this probability
    min_p: float | None = Field(None, ge=0, le=1)  # keep tokens with at least this share of the best one's probability
    repetition_penalty: float = Field(1.0, gt=0, le=1000)  # of tokens seen before; 1 changes nothing
    seed: int = Field(0, ge=0, lt=2**32)
    interactive: bool = False  # prompts line by line from the terminal
    core: KernelConfig = KernelConfig()
    cache: bool = True  # false: every step passes over the whole text again
    cache_dtype: Literal["auto", *CACHE_DTYPES] = "auto"  # auto: that of the forward pass
    prefill_chunk: int = Field(512, ge=1, le=LONGEST_TEXT)  # tokens of a prompt that pass through the model at once
    compile: bool = False  # the step of one token; with CUDA graphs on a GPU
    device: Device = "auto"
    dtype: Dtype = "auto"

    @field_validator("temperature")
    @classmethod
    def _not_too_cold(cls, temperature: float) -> float:
        if temperature != 0 and temperature < COLDEST:
            raise ValueError(f"must be 0 (always the most likely token) or at least {COLDEST:g}")
        return temperature

    @model_validator(mode="after")
    def _check_together(self):
        if self.compile and not self.cache:
            raise Mistakes("compile=true: needs cache=true; without a cache every step has another shape")
        return self


def sample_texts(model: Transformer, tokenizer: Tokenizer, count: int, context: int, seed: int) -> list[str]:
    """Return `count` documents that the model begins, within the `context` of its training; the same on every rank."""
    if not count:
        return []
    end, sampling = tokenizer.end_of_text, Sampling(temperature=0.8, top_k=50)
    with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled again for every length
        # Without stop tokens: ranks that share the weights (ZeRO) must take the same number of steps.
        options = {"sampling": sampling, "seed": seed, "vocab_size": tokenizer.vocab_size}
        rows = model.generate([[end]] * count, min(160, context - 1), **options)
    return [tokenizer.decode(list(itertools.takewhile(lambda token: token != end, row))) for row in rows]


def settled(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return the text of tokens without what the tokens after them may still complete to a character."""
    return tokenizer.decode(tokens).rstrip("\ufffd")


def answer(run: LoadedRun, config: SampleConfig, notes: Console) -> bool:
    """Print `config.count` continuations of the prompt; return false if Ctrl-C cut them off.

    One is printed as it comes, several when they are whole.
    """
    tokenizer, filters = run.tokenizer, [field.name for field in dataclasses.fields(Sampling)]
    prompt = tokenizer.encode(config.prompt) if config.prompt else []
    rows = [list(prompt) for _ in range(config.count)]
    sampling = Sampling(**{name: getattr(config, name) for name in filters})
    steps = stream(
        run.model, [[tokenizer.end_of_text, *prompt]] * config.count, config.max_new_tokens, sampling, config.seed,
        stop_tokens=[tokenizer.end_of_text], use_cache=config.cache, compiled=config.compile,
        cache_dtype=CACHE_DTYPES.get(config.cache_dtype), chunk=config.prefill_chunk, vocab_size=tokenizer.vocab_size,
    )  # fmt: skip
    times: list[float] = []  # of each step
    made: list[int] = []  # new tokens of each step
    is_single, is_whole, written = config.count == 1, True, ""

    def show(text: str) -> None:
        nonlocal written
        print(text[len(written) :], end="", flush=True)
        written = text

    if is_single:
        show(settled(tokenizer, prompt))
    try:
        for tokens in steps:
            times.append(time.perf_counter())
            made.append(sum(token is not None for token in tokens))
            for row, token in zip(rows, tokens, strict=True):
                if token is not None:
                    row.append(token)
            if is_single:
                show(settled(tokenizer, rows[0]))
    except KeyboardInterrupt:
        is_whole = False
    if is_single:
        show(tokenizer.decode(rows[0]) + "\n")
    else:
        for number, row in enumerate(rows):
            Console(soft_wrap=True).print(Rule(f"seed {config.seed + number}"))
            print(tokenizer.decode(row), flush=True)
    notes.print(facts(run, config, len(prompt) + 1, made, times))
    return is_whole


def facts(run: LoadedRun, config: SampleConfig, prompt: int, made: list[int], times: list[float]) -> str:
    """Return the speed and the size of the cache; `made` has the new tokens and `times` the time of each step."""
    found = [f"{sum(made)} tokens after the prompt's {prompt}"]
    start = 1 if config.compile else 0  # the second step of all compiles
    if len(times) > start + 1:
        found.append(f"{sum(made[start + 1 :]) / (times[-1] - times[start]):,.0f} tokens a second")
    if config.cache:
        model = run.model
        dtype = CACHE_DTYPES.get(config.cache_dtype) or model.autocast_dtype or model.embedding.weight.dtype
        found.append(f"a {dtype_name(dtype)} cache of {kv_bytes_per_token(model.config, dtype):,} bytes a token")
    if prompt + len(times) > run.context:
        found.append(f"longer than the {run.context} tokens that the run was trained on, where text gets worse")
    return ", ".join(found)


def converse(run: LoadedRun, config: SampleConfig, notes: Console) -> None:
    """Answer prompts from standard input until it ends; each takes the seeds after the last one's."""
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        notes.print("A line is a prompt. Ctrl-C ends a text, Ctrl-D the program.")
    sys.stdin.reconfigure(errors="replace")
    for seed in itertools.count(config.seed, config.count):
        try:
            prompt = input("> " if is_terminal else "")
        except (EOFError, KeyboardInterrupt):
            return
        if "\ufffd" in prompt:
            notes.print("This line is not UTF-8, so the model sees replacement characters.")
        answer(run, config.replace(prompt=prompt, seed=seed), notes)


def main(config: SampleConfig) -> int:
    run = load_run(config.run, config.device, config.dtype, kernel=config.core.kernel)
    try:
        run.config.core.check_decoding(CACHE_DTYPES.get(config.cache_dtype), config.cache and config.compile)
    except ValueError as error:
        raise ConfigError(f"cache_dtype={config.cache_dtype}, compile={config.compile}: {error}") from None
    run.model.store_weights_as_computed()
    notes = Console(stderr=True, highlight=False, soft_wrap=True, style="dim")
    notes.print(f"{config.run}, step {run.step}")
    if config.interactive:
        converse(run, config, notes)
        return 0
    return 0 if answer(run, config, notes) else 1


if __name__ == "__main__":
    app(main, SampleConfig, texts=("prompt",))
