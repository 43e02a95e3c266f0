"""The W&B dashboard of a project: `python -m eval.dashboard project=t6 [entity=NAME] [group=EXPERIMENT]`

Makes a workspace view of the runs and a report with the same panels, with a line for each method and the spread over
seeds behind it, by the wandb-workspaces library. `dry_run=true` prints what would be saved, without a network.
"""

import json
import re
from typing import Annotated, ClassVar

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from pydantic import AfterValidator, Field, field_validator

from configs.app import app
from configs.errors import ConfigError
from configs.load import Command
from eval import published
from training.config import wandb_name

METHOD = "model/name"  # as training/wandb_run.py names configuration keys
PINNED = [
    "config:model/name.value", "config:size/name.value", "config:run/seed.value", "summary:val/loss.min",
    "summary:val/bits_per_byte.min", "summary:params", "summary:kv_bytes_per_token",
    "summary:perf/tokens_per_second.mean",
]  # fmt: skip
SMOOTHED = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6, "smoothing_show_original": True}


class DashboardConfig(Command):
    yaml: ClassVar[str] = "dashboard"

    project: Annotated[str, AfterValidator(wandb_name)]  # alone, without the entity
    entity: Annotated[str | None, AfterValidator(wandb_name)] = None  # default: the one that is logged in
    group: str | None = Field(None, min_length=1, max_length=128)  # the experiment; default: all runs
    dry_run: bool = False  # print what would be saved, without a network

    @field_validator("group")
    @classmethod
    def _fits_a_filter(cls, group: str | None) -> str | None:
        if group and re.search(r'["\\]', group):
            raise ValueError("must not have \" or \\ in it: it stands in quotes in a filter of W&B's")
        return group


def line(title: str, metric: str, raw: bool = False, x: str = "tokens", **options) -> wr.LinePlot:
    """Return a plot of a metric: as it is (`raw`), or smoothed a little with the raw curve behind.

    A line is the mean of a method's runs, with the standard error behind it.
    """
    by_method = {"groupby": wr.Config(METHOD), "groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
    return wr.LinePlot(title=title, x=x, y=[metric], title_x=x, **by_method, **({} if raw else SMOOTHED), **options)


def scatter(title: str, x: str, **options) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric("val/loss.min"), **options)


def bars(title: str, *metrics: str, **options) -> wr.BarPlot:
    return wr.BarPlot(title=title, metrics=list(metrics), groupby=wr.Config(METHOD), **options)


def panels() -> dict[str, list]:
    """Return the panels of each section; the benchmarks are the paper's."""
    paper = published.tasks("paper_zeroshot").items()
    benchmarks = ["eval/paper_zeroshot/average", *(f"eval/{task}/{metric}" for task, metric in paper)]
    return {
        "Loss & perplexity": [
            line("Validation loss", "val/loss", raw=True),
            line("Training loss", "train/loss"),
            line("Bits per byte (validation)", "val/bits_per_byte", raw=True),
            line("Perplexity (validation)", "val/perplexity", log_y=True, raw=True),
            line("Validation loss by step", "val/loss", x="step", raw=True),
            line("Validation loss by hours of training", "val/loss", x="perf/training_hours", raw=True),
            line("Validation loss by FLOPs", "val/loss", x="perf/training_flops", raw=True),
        ],
        "Benchmarks": [
            bars("Benchmarks", *benchmarks, groupby_aggfunc="mean"),
            *(line(key.removeprefix("eval/"), key, raw=True) for key in benchmarks),
        ],
        "Speed & memory": [
            line("Training tokens per second", "perf/tokens_per_second"),
            line("MFU", "perf/mfu"),
            line("Peak memory (GB)", "perf/memory_gb", raw=True),
            scatter("Validation loss against training speed", "perf/tokens_per_second.mean"),
        ],
        "KV cache": [
            scatter("Validation loss against cache", "kv_bytes_per_token", log_x=True),
            bars("KV-cache bytes per token", "kv_bytes_per_token"),
            bars("Cache / MHA's", "attention_kv_bytes_over_mha"),
            scatter("Validation loss against parameters", "params"),
        ],
        "Optimisation": [
            line("Learning rate", "optim/lr", raw=True),
            line("Gradient norm", "optim/grad_norm", log_y=True),
            line("Skipped steps", "optim/skipped_steps", raw=True),
            wr.MediaBrowser(title="Samples and plots", media_keys=["samples", "plots/loss"]),
        ],
        "What differs": [wr.RunComparer(diff_only="split")],
    }


def filters(config: DashboardConfig) -> str:
    """Return what picks the training runs of the project, or of the group, if one is given."""
    return 'Metric("JobType") == "train"' + (f' and Metric("Group") == "{config.group}"' if config.group else "")


def title(config: DashboardConfig) -> str:
    return f"Attention mechanisms: {config.group}" if config.group else "Attention mechanisms"


def workspace(config: DashboardConfig, entity: str) -> ws.Workspace:
    """Return the view of the runs by section."""
    sections = [
        ws.Section(name=name, panels=found, is_open=number < 2, pinned=number == 0)
        for number, (name, found) in enumerate(panels().items())
    ]
    return ws.Workspace(
        entity=entity, project=config.project, sections=sections, name=title(config),
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=50),
        runset_settings=ws.RunsetSettings(filters=filters(config), pinned_columns=PINNED),
    )  # fmt: skip


def report(config: DashboardConfig, entity: str) -> wr.Report:
    """Return the same panels as a page to share."""
    blocks: list = [wr.TableOfContents()]
    for name, found in panels().items():
        runset = wr.Runset(name="methods", filters=filters(config), groupby=[f"config.{METHOD}"])
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runset], panels=found)]
    return wr.Report(entity=entity, project=config.project, title=title(config), blocks=blocks, width="fluid")


def main(config: DashboardConfig) -> int:
    if config.dry_run:
        made = {made.__name__: made(config, config.entity or "ENTITY")._to_model() for made in (workspace, report)}
        shown = {name: model.spec.model_dump(by_alias=True, exclude_none=True) for name, model in made.items()}
        print(json.dumps(shown, indent=2))
        return 0
    try:
        entity = config.entity or wandb.Api(timeout=30).default_entity
        view, written = workspace(config, entity).save(), report(config, entity).save()
    except Exception as error:
        raise ConfigError(
            f"project={config.project}: W&B took no dashboard ({error}). It needs a network and `wandb login`; "
            "dry_run=true prints it without"
        ) from None
    print(f"workspace  {view.url}\nreport     {written.url}")
    return 0


if __name__ == "__main__":
    app(main, DashboardConfig)
