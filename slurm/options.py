"""The options of `slurm.submit`: its own, those for sbatch, and what the site's settings say."""

import argparse
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from configs.app import choices
from configs.block import Block
from configs.errors import ConfigError
from configs.kinds import OptionalPath
from configs.load import load
from training.device import PEAK_BF16_FLOPS, Bytes

SITE = {"ntasks_per_node": "T6_GPUS_PER_NODE", "gpu": "T6_GPU", "gpu_memory": "T6_GPU_MEMORY", "mfu": "T6_MFU"}


def split_suites(names: str) -> list[str]:
    suites = [] if names in ("none", "") else names.split(",")
    if not set(suites) <= set(choices("suite")):
        raise ValueError(f"must be none or some of {', '.join(choices('suite'))}")
    return suites


class Options(Block):
    """What the command line says; else the site's settings (`SITE`); else the default."""

    nodes: int = Field(1, ge=1, le=10**5)
    ntasks_per_node: int = Field(8, ge=1, le=1024, description="one task for each GPU (default: T6_GPUS_PER_NODE or 8)")
    config_dir: OptionalPath = Field(None, description="a folder with YAML files of your own, GROUP/NAME.yaml")
    multirun: bool = Field(False, description="a run for every combination, as one job array")
    eval: Annotated[list[str], BeforeValidator(split_suites)] = Field(
        ["perplexity"], description="the suites to run afterwards, A,B or none (default: perplexity)"
    )
    dry_run: bool = Field(False, description="print the exact scripts, create and submit nothing")
    gpu: Literal[*PEAK_BF16_FLOPS] = Field(
        "A100", description=f"for the estimate (default: T6_GPU or A100): {', '.join(PEAK_BF16_FLOPS)}"
    )
    gpu_memory: Bytes | None = Field(
        None, description="such as 80GiB: warn if a run needs more (default: T6_GPU_MEMORY)"
    )
    mfu: float = Field(0.35, gt=0, le=1, description="the assumed share of the GPU's peak (default: T6_MFU or 0.35)")
    tokens_per_second: float | None = Field(
        None, gt=0, le=1e15, description="a measured rate of the whole run, instead of mfu"
    )

    @property
    def tasks(self) -> int:
        return self.nodes * self.ntasks_per_node


def parse(arguments: list[str], environment: dict[str, str], usage: str) -> tuple[Options, list[str], list[str]]:
    """Return (our options, those of sbatch, the overrides). ConfigError for all that are wrong."""
    parser = argparse.ArgumentParser(usage=usage, allow_abbrev=False)
    flags = {key: f"--{key.replace('_', '-')}" for key in Options.model_fields}
    for key, field in Options.model_fields.items():
        if field.annotation is bool:
            names = ["-m", flags[key]] if key == "multirun" else [flags[key]]
            parser.add_argument(*names, action="store_true", help=field.description)
        else:
            site = environment.get(SITE.get(key)) or None
            parser.add_argument(flags[key], metavar="VALUE", default=site, help=field.description)
    given, rest = parser.parse_known_args(arguments)
    overrides = [word for word in rest if not word.startswith("-")]
    errors = [
        f"{word}: is not an override (KEY=VALUE); give options of sbatch as --OPTION=VALUE"
        for word in overrides
        if "=" not in word and not word.startswith("~")
    ]
    options = Options()
    try:
        options = load({key: value for key, value in vars(given).items() if value is not None}, Options)
    except ConfigError as error:
        for key, _, message in (line.partition("=") for line in error.errors):
            errors.append(f"{flags[key]}={message}" + (f" (or {SITE[key]})" if key in SITE else ""))
    if errors:
        raise ConfigError(*errors)
    return options, [word for word in rest if word.startswith("-")], overrides
