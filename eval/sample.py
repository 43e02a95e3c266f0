"""Text from a checkpoint: `python -m eval.sample run=runs/NAME prompt="The module"`."""

import torch
from rich.console import Console

from configs.app import app
from configs.load import load_flat
from configs.schema import SampleConfig
from data.tokenizers import Tokenizer
from model.transformer import Transformer


def sample_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    count: int,
    context: int,
    device: torch.device,
    seed: int,
    prompt: str = "",
    max_new_tokens: int = 160,
    temperature: float = 0.8,
    top_k: int | None = 50,
) -> list[str]:
    """`count` continuations of `prompt`, each starting a new document; the same for the same seed on every rank."""
    if count == 0:
        return []
    start = [tokenizer.end_of_text, *(tokenizer.encode(prompt) if prompt else [])]
    tokens = torch.tensor([start] * count, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.compiler.set_stance("force_eager"):  # a compiled model would be compiled again for every length
        out = model.generate(tokens, max_new_tokens, context, temperature, top_k, generator)
    return [tokenizer.decode(until(row[1:], tokenizer.end_of_text)) for row in out.tolist()]


def until(tokens: list[int], stop: int) -> list[int]:
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def main(config: SampleConfig) -> int:
    from eval.loading import load_run

    run = load_run(config.run, config.device, config.dtype)
    context = run.config.trainer.seq_len
    texts = sample_texts(
        run.model, run.tokenizer, config.count, context, run.runtime.device, config.seed,
        config.prompt, config.max_new_tokens, config.temperature, config.top_k,
    )  # fmt: skip
    console = Console(highlight=False, soft_wrap=True)
    for number, text in enumerate(texts, 1):
        console.rule(f"{config.run}, step {run.step}, sample {number}")
        console.print(text, markup=False)
    return 0


if __name__ == "__main__":
    app(main, "sample", load=lambda tree: load_flat(tree, SampleConfig))
