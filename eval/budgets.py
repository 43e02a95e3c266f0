"""The table of budgets: `python -m eval.budgets [models=[t6,mha]] [sizes=[small]] [memory=24GiB] [match=flops] ...`

One row for each mechanism and size, with GPT-2's vocabulary (padded to 50304) unless `tokenizer=` is given.
"""

from typing import ClassVar, Literal

from pydantic import Field
from rich import box
from rich.console import Console
from rich.table import Table

from configs.app import app, choices, configured
from configs.kinds import LONGEST_TEXT
from configs.load import Command
from data.config import TokenizerConfig
from model import counting
from model.cache import CACHE_DTYPES, bytes_per_token
from model.transformer import TransformerConfig
from training.config import Config
from training.device import Bytes, format_bytes

SIZES = ("tiny", "small", "medium", "large", "xl")  # in the order of the table


class BudgetsConfig(Command):
    """`python -m eval.budgets`."""

    yaml: ClassVar[str] = "budgets"

    tokenizer: TokenizerConfig
    models: list[str] = Field(default_factory=list)  # empty: all of configs/model
    sizes: list[str] = Field(default_factory=list)  # empty: tiny to xl
    seq_len: int = Field(1024, ge=2, le=LONGEST_TEXT)
    match: Literal["params", "flops", "kv_bytes"] = "params"
    memory: Bytes | None = None  # such as 24GiB, of weights and one context
    cache_dtype: Literal[*CACHE_DTYPES] = "bf16"  # int8: with its scales
    detail: bool = False  # add parameters by part and the activation estimate
    overrides: list[str] = Field(default_factory=list)  # for every configuration, such as ['model.head_dim=128']


def cells(config: BudgetsConfig, network: TransformerConfig, ratios: dict[str, float]) -> dict[str, str]:
    """Return one network's numbers by the titles of their columns; `ratios` are those to MHA."""
    dtype = CACHE_DTYPES[config.cache_dtype]
    kept = counting.kv_bytes_per_token(network, dtype)
    own = network.n_layers * bytes_per_token(network.attention.cache_shapes(), dtype)  # of the mechanism itself
    row = {
        "heads": str(network.attention.n_heads),
        "params (M)": f"{counting.num_params(network) / 1e6:.1f}",
        "attention / 4 d_model^2": f"{ratios['params']:.3f}",
        "training FLOPs a token": f"{counting.training_flops_per_token(network, config.seq_len):.2e}",
        "KV bytes a token": f"{kept:,}",
        "/ MHA's": f"{ratios['kv_bytes']:.3f}",
    }
    if any(override.startswith("core=") for override in config.overrides):
        row["without that core"] = f"{own:,}"
    if config.detail:
        row["activations (KiB a token)"] = f"{counting.activation_bytes_per_token(network) / 1024:,.0f}"
    if config.memory:
        longest = counting.longest_context(network, config.memory, dtype)
        row[f"longest context in {format_bytes(config.memory)}"] = f"{longest:,}"
    return row


def main(config: BudgetsConfig) -> int:
    vocabulary = f"vocabulary {config.tokenizer.padded_vocab_size} ({config.tokenizer.name})"
    title = f"{vocabulary}, {config.seq_len} tokens, matched by {config.match}, {config.cache_dtype} cache"
    table, details = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD), []
    common = [f"size.match={config.match}", f"trainer.seq_len={config.seq_len}", *config.overrides]
    has_tokenizer = any(override.startswith("tokenizer") for override in config.overrides)
    for size in config.sizes or SIZES:
        for model in config.models or choices("model"):
            run = configured(Config, [f"model={model}", f"size={size}", *common], world_size=1)
            tokenizer = run.tokenizer if has_tokenizer else config.tokenizer
            network = TransformerConfig.of(run.model, run.core, run.size, tokenizer.padded_vocab_size)
            ratios = counting.over_mha(network, config.seq_len)
            row = {"size": size, "model": model} | cells(config, network, ratios)
            for column in row if not table.columns else ():
                table.add_column(column, justify="left" if column in ("size", "model") else "right", no_wrap=True)
            table.add_row(*row.values())
            ratio, tolerance = ratios[config.match], run.size.match_tolerance
            if abs(ratio - 1) > tolerance:
                found = f"{config.match} are {ratio:.3f} x MHA's"
                details.append(f"{model} {size}: no match within {tolerance:.0%}: {found}")
            elif config.detail:
                parts = ", ".join(f"{part} {number:,}" for part, number in counting.params_by_part(network).items())
                details.append(f"{model} {size}: {parts}")
        table.add_section()
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 220)  # a line may leave the screen, but is never cut
    console.print(table)
    for line in details:
        console.print(line, markup=False)
    return 0


if __name__ == "__main__":
    app(main, BudgetsConfig)
