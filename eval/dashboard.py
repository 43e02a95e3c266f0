"""The W&B dashboard of a project: `python -m eval.dashboard project=t6 [entity=NAME] [group=EXPERIMENT]`

Makes a workspace view (every run, by section) and a report (the runs of a group compared, a line for each method with
the spread over seeds behind it), with the wandb-workspaces library. `dry_run=true` prints what would be saved, without
a network.
"""

import json
from typing import ClassVar

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from pydantic import field_validator

from configs.app import app
from configs.errors import ConfigError
from configs.load import Command
from eval import published

NAME = "Attention mechanisms"
METHOD = "model/name"  # as training/wandb_run.py names configuration keys
PINNED = [
    "config:model/name.value", "config:size/name.value", "config:run/seed.value", "summary:val/loss.min",
    "summary:val/bits_per_byte.min", "summary:params", "summary:kv_bytes_per_token",
    "summary:perf/tokens_per_second.mean",
]  # fmt: skip
SMOOTHED = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6, "smoothing_show_original": True}


class DashboardConfig(Command):
    yaml: ClassVar[str] = "dashboard"

    project: str
    entity: str | None = None  # default: the one that is logged in
    group: str | None = None  # the experiment that the report is about; default: all runs
    dry_run: bool = False  # print what would be saved, without a network

    @field_validator("project")
    @classmethod
    def _alone(cls, project: str) -> str:
        if "/" in project:
            raise ValueError("must be the project alone; give the entity as entity=...")
        return project


def line(title: str, metric: str, raw: bool = False, x: str = "tokens", **options) -> wr.LinePlot:
    """Return a plot of a metric: as it is (`raw`), or smoothed a little with the raw curve behind."""
    return wr.LinePlot(title=title, x=x, y=[metric], title_x=x, **({} if raw else SMOOTHED), **options)


def scatter(title: str, x: str, **options) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric("val/loss.min"), **options)


def bars(title: str, *metrics: str, **options) -> wr.BarPlot:
    return wr.BarPlot(title=title, metrics=list(metrics), groupby=wr.Config(METHOD), **options)


def panels() -> dict[str, list]:
    """Return the panels of each section, for the workspace and the report alike; the benchmarks are the paper's."""
    paper = published.tasks("paper_zeroshot").items()
    benchmarks = ["eval/paper_zeroshot/average", *(f"eval/{task}/{metric}" for task, metric in paper)]
    return {
        "Loss & perplexity": [
            line("Validation loss", "val/loss", raw=True),
            line("Training loss", "train/loss"),
            line("Bits per byte (validation)", "val/bits_per_byte", raw=True),
            line("Perplexity (validation)", "val/perplexity", log_y=True, raw=True),
            line("Validation loss by step", "val/loss", x="step", raw=True),
            line("Validation loss by wall time", "val/loss", x="RelativeTime(Wall)", raw=True),
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
    }


def workspace(config: DashboardConfig, entity: str) -> ws.Workspace:
    """Return the view of every training run of the project (of the group, if one is given), by section."""
    filters = [ws.Metric("JobType") == "train"] + ([ws.Metric("Group") == config.group] if config.group else [])
    sections = [
        ws.Section(name=name, panels=found, is_open=number < 2, pinned=number == 0)
        for number, (name, found) in enumerate(panels().items())
    ]
    return ws.Workspace(
        entity=entity, project=config.project, name=NAME, sections=sections,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=50),
        runset_settings=ws.RunsetSettings(filters=filters, pinned_columns=PINNED),
    )  # fmt: skip


def report(config: DashboardConfig, entity: str) -> wr.Report:
    """Return the comparison of the group's runs: a line for each method, and what differs in their configurations."""
    filters = 'Metric("JobType") == "train"' + (f' and Metric("Group") == "{config.group}"' if config.group else "")

    def grid(found: list) -> wr.PanelGrid:  # of runs in the report's own project
        runset = wr.Runset(name="methods", filters=filters, groupby=[f"config.{METHOD}"])
        return wr.PanelGrid(runsets=[runset], panels=found)

    introduction = (
        f"Runs of {f'the group {config.group}' if config.group else 'the project'}, a line for each method: the mean "
        "over seeds, with the standard error behind it. Whether they are matched, intervals and paired differences: "
        "see the report of python -m eval.compare."
    )
    blocks = [wr.H1(NAME), wr.P(introduction), wr.TableOfContents()]
    for name, found in panels().items():
        for panel in found:
            if isinstance(panel, wr.LinePlot):
                panel.groupby, panel.groupby_aggfunc, panel.groupby_rangefunc = wr.Config(METHOD), "mean", "stderr"
        blocks += [wr.H2(name), grid(found)]
    blocks += [wr.H2("What differs"), grid([wr.RunComparer(diff_only="split")])]
    title = f"{NAME}: {config.group}" if config.group else NAME
    return wr.Report(entity=entity, project=config.project, title=title, blocks=blocks, width="fluid")


def main(config: DashboardConfig) -> int:
    if config.dry_run:
        entity = config.entity or "ENTITY"
        models = {"workspace": workspace(config, entity)._to_model(), "report": report(config, entity)._to_model()}
        shown = {name: model.spec.model_dump(by_alias=True, exclude_none=True) for name, model in models.items()}
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
    app(main, DashboardConfig, texts=("project", "entity", "group"))
