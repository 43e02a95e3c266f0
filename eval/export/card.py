"""The model card: what the network is, what it was trained on and how, what evaluations found, and how to load it."""

import json
import shlex
from collections.abc import Iterator

from configs.app import choices, configured
from configs.block import to_dict
from configs.errors import ConfigError
from configs.load import flatten, shown
from eval.export.network import Exported
from eval.loading import LoadedRun
from eval.units import in_unit, labelled
from model import counting
from model.attention.base import AttentionConfig
from training.config import Config
from training.jsonl import read_lines
from training.optim import describe

GROUPS = ("model", "size", "core", "data", "tokenizer", "optim", "schedule", "deepspeed")
OWN = ("run.name", "run.dir", "device")  # of a run's configuration: what says where it is, and not what

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [tensor-product-attention, {mechanism}]
---

# {name}

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
tokenizer = AutoTokenizer.from_pretrained("FOLDER"{trust})
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

{code}
A control token in a text, such as `{end}`, is ordinary text, as it was in training. Its id {end_id} ends a document.

## The network

{network}

## Training

{training}

```bash
{command}
```

## Results

{results}

## Licence

To be chosen by whoever publishes this model: set `license:` at the top of this file.
"""


def model_card(run: LoadedRun, made: Exported, dtype: str, end: str) -> str:
    """Return the text of README.md; `end` is the token that ends a document."""
    config, network = run.config, run.model.config
    model, trainer, counts = config.model, config.trainer, counting.summary(network, run.context)
    facts = {
        "mechanism": ", ".join([f"`{model.name}`", *(f"`{key}={shown(value)}`" for key, value in own_keys(model))]),
        "pattern": config.core.described(run.context),
        "size": f"{counts['params']:,} parameters, {network.n_layers} layers of width {network.d_model}, "
        f"feed-forward {network.d_ff}, {model.n_heads} heads of {model.head_dim}",
        "vocabulary": f"{config.tokenizer.name}, {run.tokenizer.vocab_size:,} tokens, padded to {network.vocab_size:,}",
        "KV cache": f"{counts['kv_bytes_per_token']:,} bytes a token",
        "weights": dtype,
    }
    training = {
        "data": f"`{config.data.name}`, fingerprint `{run.data_fingerprint}`",
        "tokenizer": f"fingerprint `{run.tokenizer.fingerprint}`",
        "tokens": f"{run.tokens:,}, {run.step:,} of {trainer.horizon:,} steps of {trainer.global_batch_size} x "
        f"{trainer.seq_len} tokens",
        "optimizer": f"{config.optim.name}, weight decay {config.optim.weight_decay:g}",
        "learning rate": describe(config.optim.lr, config.schedule, trainer.horizon),
        "seed": str(config.run.seed),
    }
    own_code = "Its code is in this folder, copied from the run's own model, and loads with `trust_remote_code=True`.\n"
    plot = "\n\n![Loss](loss.png)" if (run.dir / "loss.png").is_file() else ""
    return CARD.format(
        mechanism=model.name, name=config.run.name, trust=", trust_remote_code=True" if made.own_code else "",
        what=f"A `{made.config['architectures'][0]}` pretrained with {model.name} attention.",
        code=own_code if made.own_code else "", end=end,
        end_id=run.tokenizer.end_of_text, network=table(facts), training=table(training),
        command=command_of(config), results="\n".join(results(run)) + plot,
    )  # fmt: skip


def own_keys(model: AttentionConfig) -> list[tuple[str, object]]:
    """Return the keys that only this mechanism has, and of the others those that are unusual."""
    common = AttentionConfig.model_fields
    elsewhere = ("name", "by_size", "n_heads", "head_dim")
    return [(k, v) for k, v in model if k not in elsewhere and (k not in common or v != common[k].default)]


def table(rows: dict[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def results(run: LoadedRun) -> Iterator[str]:
    """Yield a table of what evaluations have found, with standard errors, and the last validation loss."""
    yield from ("| evaluation | step | metric | value | ± |", "|---|---:|---|---:|---:|")
    for line in reversed(read_lines(run.dir / "metrics.jsonl")):
        if line.get("val/loss") is not None and line["step"] <= run.step:
            loss = in_unit("loss", line["val/loss"])
            yield f"| validation in training | {line['step']} | {labelled('loss')} | {loss} | |"
            break
    for path in sorted((run.dir / "results").glob("*.json")):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            for key, value in found["results"].items():
                spread = found.get("stderr", {}).get(key)
                error = "" if spread is None else in_unit(key, spread)
                task = f"{key.rpartition('/')[0]} " if "/" in key else ""
                yield f"| {path.stem} | {found['step']} | {task}{labelled(key)} | {in_unit(key, value)} | {error} |"
        except (ValueError, KeyError, TypeError, AttributeError):  # somebody else's file
            continue


def command_of(config: Config) -> str:
    """Return a command that trains the same run: the choices of its groups, and each key that these leave different."""
    tree = to_dict(config)
    tokenizer = config.tokenizer
    names = {group: tree[group]["name"] for group in GROUPS} | {
        "tokenizer": tokenizer.name if tokenizer.name in choices("tokenizer") else tokenizer.kind
    }
    chosen = [f"{group}={name}" for group, name in names.items() if name in choices(group)]
    try:
        usual = flatten(to_dict(configured(Config, chosen, world_size=1)))
    except ConfigError:  # a group's choice needs further keys
        usual = {}
    ours = {key: value for key, value in flatten(tree).items() if not (key in OWN or key.startswith("wandb."))}
    others = [f"{key}={shown(value)}" for key, value in ours.items() if key not in usual or usual[key] != value]
    words = [*chosen, *(word for word in others if usual)]
    return " ".join(["python train.py", *map(shlex.quote, words)])
