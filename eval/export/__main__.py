"""A run as a Hugging Face folder: `python -m eval.export run=runs/NAME out=DIR [step=1000] [dtype=bf16]`.

It holds the weights as safetensors, the configuration, a fast tokenizer with the same ids, a model card, and of a
network that transformers does not have the code of its own. docs/export.md explains it.
"""

import json
from pathlib import Path
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from configs.app import app
from configs.kinds import MOST_STEPS, PathText
from configs.load import Command
from eval.export.card import model_card
from eval.export.folder import new_folder, write_weights
from eval.export.network import exported
from eval.export.tokenizer import fast_tokenizer
from eval.loading import LoadedRun, load_run
from training.device import format_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class ExportConfig(Command):
    """`python -m eval.export`."""

    yaml: ClassVar[str] = "export"

    run: PathText  # the run folder
    out: PathText  # the folder to make; it must not exist yet
    step: int | None = Field(None, ge=0, le=MOST_STEPS)  # of the checkpoint; null: the newest
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the weights; fp32 is what was trained

    @field_validator("out")
    @classmethod
    def _is_new(cls, out: str) -> str:
        if Path(out).exists():
            raise ValueError("exists already; choose another folder, or remove it")
        return out


def main(config: ExportConfig) -> int:
    run = load_run(config.run, device="cpu", step=config.step, kernel="auto")
    tokenizer = fast_tokenizer(run.tokenizer)
    made = exported(run.model)
    dtype = DTYPES[config.dtype]
    weights = {name: tensor.to(dtype) for name, tensor in made.weights.items()}
    tree = made.config | special_tokens(run) | {
        "max_position_embeddings": run.context,
        "dtype": str(dtype).removeprefix("torch."),
        "pretraining": facts(run),
    }  # fmt: skip
    texts = made.files | tokenizer | {
        "config.json": as_json(tree),
        "generation_config.json": as_json(generation_config(run)),
        "README.md": model_card(run, made, config.dtype, json.loads(tokenizer["tokenizer_config.json"])["eos_token"]),
    }  # fmt: skip
    plot = run.dir / "loss.png"
    with new_folder(config.out) as folder:
        write_weights(weights, folder)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        if plot.is_file():
            (folder / plot.name).write_bytes(plot.read_bytes())
    size = format_bytes(sum(tensor.nbytes for tensor in weights.values()))
    needs = ", with its own code, so load it with trust_remote_code=True" if made.own_code else ""
    print(f"{config.out}: {tree['architectures'][0]} of step {run.step}, {size} of {config.dtype} weights{needs}")
    return 0


def special_tokens(run: LoadedRun) -> dict[str, int]:
    """Return the ids of the one control token: it ends a document and so stands before the next."""
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), run.tokenizer.end_of_text)


def generation_config(run: LoadedRun) -> dict:
    """Return how to generate: padding of the vocabulary is never drawn."""
    padding = list(range(run.tokenizer.vocab_size, run.model.config.vocab_size))
    return special_tokens(run) | ({"suppress_tokens": padding} if padding else {})


def facts(run: LoadedRun) -> dict:
    """Return what the weights are and what their tokens mean, for those who read the folder later."""
    found = {
        "run": run.config.run.name,
        "step": run.step,
        "tokens": run.tokens,
        "data_fingerprint": run.data_fingerprint,
    }
    return found | {"tokenizer_fingerprint": run.tokenizer.fingerprint}


def as_json(tree: dict) -> str:
    return json.dumps(tree, indent=2) + "\n"


if __name__ == "__main__":
    app(main, ExportConfig)
