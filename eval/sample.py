"""Text from a checkpoint: `python -m eval.sample run=runs/NAME prompt="The module"`.

The text goes to standard output as it comes, what there is to say about it to standard error.
"""

import contextlib
import dataclasses
import sys
import time

import torch
from omegaconf import OmegaConf
from rich.console import Console
from rich.rule import Rule

from configs.app import app
from configs.errors import ConfigError
from configs.load import load_flat
from configs.schema import CACHE_DTYPES
from configs.schema_sample import SampleConfig
from data.tokenizers import Tokenizer
from model import counting
from model.cores.flash_tpa import FlashTPA
from model.generation import stream
from model.sampling import Sampling
from model.transformer import Transformer

FIXED = ("run", "device", "dtype", "interactive", "factors")  # once the model is there
HELP = "A line is a prompt. :KEY=VALUE ... changes settings, : shows them, Ctrl-C ends a text, Ctrl-D the program."


def sample_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    count: int,
    context: int,
    device: torch.device,
    seed: int,
    max_new_tokens: int = 160,
) -> list[str]:
    """`count` documents that the model begins, within the `context` it was trained on; the same on every rank."""
    length = min(max_new_tokens, context - 1)
    with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled again for every length
        # No stop tokens: ranks that share the weights (ZeRO) must take the same number of steps.
        options = {"sampling": Sampling(temperature=0.8, top_k=50), "vocab_size": tokenizer.vocab_size}
        rows = model.generate([[tokenizer.end_of_text]] * count, length, seed=seed, **options) if count else []
    return [tokenizer.decode(until(row, tokenizer.end_of_text)) for row in rows]


def until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


class GrowingText:
    """The text of tokens that come one by one; no part of it changes once it is there.

    The last piece waits until its characters are whole. Decoding goes on from the piece before it, since a tokenizer
    may drop the space that a text begins with.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: list[int]):
        self.tokenizer, self.tokens, self.text = tokenizer, list(tokens), ""
        self.anchor = self.shown = 0  # where decoding starts, and how many tokens are in `text`
        self.finish()

    def add(self, token: int) -> str:
        """What this token adds to the text."""
        self.tokens.append(token)
        return self._take(whole=True)

    def finish(self) -> str:
        """What was waiting."""
        return self._take(whole=False)

    def _take(self, whole: bool) -> str:
        known = self.tokenizer.decode(self.tokens[self.anchor : self.shown])
        both = self.tokenizer.decode(self.tokens[self.anchor :])
        if self.shown == len(self.tokens) or (whole and both.endswith("\ufffd")):
            return ""
        self.anchor, self.shown = self.shown, len(self.tokens)
        self.text += both[len(known) :]
        return both[len(known) :]


def answer(run, config: SampleConfig, notes: Console) -> bool:
    """Print `config.count` continuations of the prompt; false where Ctrl-C cut them off.

    One is printed as it comes, several when they are whole.
    """
    tokenizer = run.tokenizer
    prompt = tokenizer.encode(config.prompt) if config.prompt else []
    texts = [GrowingText(tokenizer, prompt) for _ in range(config.count)]
    steps = stream(
        run.model,
        [[tokenizer.end_of_text, *prompt]] * config.count,
        config.max_new_tokens,
        Sampling(**{field.name: getattr(config, field.name) for field in dataclasses.fields(Sampling)}),
        config.seed,
        stop_tokens=[tokenizer.end_of_text],
        use_cache=config.cache,
        cache_dtype=CACHE_DTYPES.get(config.cache_dtype),
        chunk=config.prefill_chunk,
        compiled=config.compile,
        vocab_size=tokenizer.vocab_size,
    )
    alone, times, made, whole = config.count == 1, [], [], True
    write(texts[0].text if alone else "")
    with contextlib.nullcontext() if alone else notes.status("the prompt") as status:
        try:
            for tokens in steps:
                times.append(time.perf_counter())
                made.append(sum(token is not None for token in tokens))
                pieces = [text.add(t) if t is not None else "" for text, t in zip(texts, tokens, strict=True)]
                write(pieces[0] if alone else "")
                if status:
                    status.update(f"{len(times)} of at most {config.max_new_tokens} tokens")
        except KeyboardInterrupt:
            whole = False
    for number, text in enumerate(texts):
        rest = text.finish()
        if not alone:
            Console(soft_wrap=True).print(Rule(f"seed {config.seed + number}"))
        write(f"{rest if alone else text.text}\n")
    notes.print(facts(run, config, len(prompt) + 1, made, times))
    return whole


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def facts(run, config: SampleConfig, prompt: int, made: list[int], times: list[float]) -> str:
    """How fast it went, and what the cache took; `made` are the new tokens and `times` the time of each step."""
    found = [f"{sum(made)} tokens after the prompt's {prompt}"]
    start = 1 if config.compile else 0  # the second step of all compiles
    if len(times) > start + 1:
        found.append(f"{sum(made[start + 1 :]) / (times[-1] - times[start]):,.0f} tokens a second")
    if config.cache:
        model = run.model
        dtype = CACHE_DTYPES.get(config.cache_dtype) or model.autocast_dtype or model.embedding.weight.dtype
        size = counting.kv_bytes_per_token(model.config, dtype)
        found.append(f"a {str(dtype).removeprefix('torch.')} cache of {size:,} bytes a token")
    trained = run.config.trainer.seq_len
    if prompt + len(times) > trained:
        found.append(f"longer than the {trained} tokens that the run was trained on, where text gets worse")
    return ", ".join(found)


def converse(run, config: SampleConfig, notes: Console) -> None:
    """Prompts from standard input until it ends; each takes the seeds after the last one's."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits lines and remembers them)
        notes.print(HELP)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except (EOFError, KeyboardInterrupt):
            return
        if line.startswith(":"):
            config = changed(config, line[1:].split(), notes)
        else:
            answer(run, dataclasses.replace(config, prompt=line), notes)
            config = dataclasses.replace(config, seed=config.seed + config.count)


def changed(config: SampleConfig, words: list[str], notes: Console) -> SampleConfig:
    """`config` with the settings KEY=VALUE of `words`, where they are right; says what is."""
    try:
        tree = OmegaConf.merge(OmegaConf.create(dataclasses.asdict(config)), OmegaConf.from_dotlist(words))
        wanted = load_flat(tree, SampleConfig)
        if fixed := [key for key in FIXED if getattr(wanted, key) != getattr(config, key)]:
            raise ConfigError(*(f"{key}: cannot change any more; start again with {key}=..." for key in fixed))
        config = wanted
    except ConfigError as error:
        notes.print("\n".join(error.errors), markup=False)
    shown = {key: value for key, value in dataclasses.asdict(config).items() if key not in (*FIXED, "prompt")}
    notes.print(" ".join(f"{key}={'null' if value is None else value}" for key, value in shown.items()), markup=False)
    return config


def main(config: SampleConfig) -> int:
    from eval.loading import load_run

    run = load_run(config.run, config.device, config.dtype, core=FlashTPA() if config.factors else None)
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
    app(main, "sample", load=lambda tree: load_flat(tree, SampleConfig), texts=("prompt",))
