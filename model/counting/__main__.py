"""The table of budgets: `python -m model.counting [models=[t6,mha]] [sizes=[small]] [memory=24GiB] [match=flops] ...`

One row a mechanism and size, with GPT-2's vocabulary (padded to 50304) unless `tokenizer=` is given; `detail=true` adds
parameters by part and the activation estimate; `"overrides=['model.head_dim=128']"` go to every configuration.
"""

import dataclasses

from rich import box
from rich.console import Console
from rich.table import Table

from configs.app import CONFIGS, app, compose
from configs.load import load, load_flat
from configs.schema import CACHE_DTYPES, ConfigError, CountingConfig, parse_bytes
from model import counting
from model.cache import bytes_per_token
from model.transformer import TransformerConfig

SIZES = ("tiny", "small", "medium", "large", "xl")


def rows(config: CountingConfig):
    """(size, model, the composed configuration's attention match, network) for every row of the table."""
    models = config.models or sorted(path.stem for path in (CONFIGS / "model").glob("*.yaml"))
    for size in config.sizes or SIZES:
        for model in models:
            chosen = [
                f"model={model}",
                f"size={size}",
                f"size.match={config.match}",
                f"trainer.seq_len={config.seq_len}",
            ]
            tree = compose("train", [*chosen, *config.overrides])
            if not any(override.startswith("tokenizer") for override in config.overrides):
                tree.tokenizer = dataclasses.asdict(config.tokenizer)
            yield size, model, TransformerConfig.from_config(load(tree))


def main(config: CountingConfig) -> int:
    dtype = CACHE_DTYPES[config.cache_dtype]
    memory = parse_bytes(config.memory) if config.memory else None
    vocabulary = f"vocabulary {config.tokenizer.padded_vocab_size} ({config.tokenizer.name})"
    title = f"{vocabulary}, {config.seq_len} tokens, matched by {config.match}, {config.cache_dtype} cache"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    columns = ["size", "model", "heads", "params (M)", "attention / 4 d_model^2"]
    columns += ["training FLOPs a token", "KV bytes a token", "/ MHA's"]
    folded = any(override.startswith("core=") for override in config.overrides)
    columns += ["without that core"] if folded else []
    columns += ["activations (KiB a token)"] if config.detail else []
    columns += [f"longest context in {config.memory}"] if memory else []
    for column in columns:
        table.add_column(column, justify="left" if column in ("size", "model") else "right", no_wrap=True)
    details, previous = [], None
    for size, model, network in rows(config):
        if previous not in (None, size):
            table.add_section()
        previous = size
        ratios = counting.over_mha(network.attention, network.core, network.d_model, config.seq_len)
        kept = counting.kv_bytes_per_token(network, dtype)
        alone = network.n_layers * bytes_per_token(network.attention.cache_shapes(), dtype)  # the mechanism's own
        cells = [
            size,
            model,
            str(network.attention.n_heads),
            f"{counting.num_params(network) / 1e6:.1f}",
            f"{ratios['params']:.3f}",
            f"{counting.training_flops_per_token(network, config.seq_len):.2e}",
            f"{kept:,}",
            f"{ratios['kv_bytes'] * kept / alone:.3f}",
        ]
        cells += [f"{alone:,}"] if folded else []
        cells += [f"{counting.activation_bytes_per_token(network) / 1024:,.0f}"] if config.detail else []
        cells += [f"{counting.longest_context(network, memory, dtype):,}"] if memory else []
        if abs(ratios[config.match] - 1) > config.tolerance:
            found = f"{config.match} are {ratios[config.match]:.3f} x MHA's"
            details.append(f"{model} {size}: no match within {config.tolerance:.0%}: {found}")
        elif config.detail:
            parts = ", ".join(f"{part} {number:,}" for part, number in counting.params_by_part(network).items())
            details.append(f"{model} {size}: {parts}")
        table.add_row(*cells)
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, 220)  # rather over the edge than cut
    console.print(table)
    for line in details:
        console.print(line, markup=False)
    return 0


def load_counting(tree) -> CountingConfig:
    config = load_flat(tree, CountingConfig)
    for key, group in (("models", "model"), ("sizes", "size")):
        known = {path.stem for path in (CONFIGS / group).glob("*.yaml")}
        unknown = sorted(set(getattr(config, key)) - known)
        if unknown:
            raise ConfigError(f"{key}={unknown}: no such {group}; there are {', '.join(sorted(known))}")
    return config


if __name__ == "__main__":
    app(main, "counting", load=load_counting)
