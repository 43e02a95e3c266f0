"""The W&B dashboard of a project: `python -m eval.dashboard project=t6 [entity=NAME] [group=EXPERIMENT]`

Makes a workspace view (every run, by section) and a report (the runs of a group compared, a line a method, the spread
over seeds behind it), with the wandb-workspaces library. `dry_run=true` prints what would be saved, without a network.
"""

import json

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.app import command
from configs.errors import ConfigError
from configs.load import load_flat
from configs.schema_compare import DashboardConfig
from eval import published

METHOD = "model/name"  # as training/wandb_run.py names config keys
COLUMNS = ["val/loss.min", "val/bits_per_byte.min", "params", "kv_bytes_per_token", "perf/tokens_per_second.mean"]


def line(title: str, y: list[str], x: str = "tokens", **options) -> wr.LinePlot:
    """Metrics against tokens, smoothed a little, the raw curve behind."""
    smooth = {"smoothing_type": "exponentialTimeWeighted", "smoothing_factor": 0.6, "smoothing_show_original": True}
    is_raw = options.pop("raw", False)
    return wr.LinePlot(title=title, x=x, y=y, title_x=x, **({} if is_raw else smooth), **options)


def scatter(title: str, x: str, y: str, **options) -> wr.ScatterPlot:
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y), **options)


def benchmark_metrics(tasks: list[str]) -> list[str]:
    """The benchmark metrics by the names under which runs log them; by default those that the paper reports."""
    paper = published.tasks("paper_zeroshot").items()
    return tasks or ["eval/paper_zeroshot/average", *(f"eval/{task}/{metric}" for task, metric in paper)]


def panels(tasks: list[str]) -> dict[str, list]:
    """The panels of each section, for the workspace and the report alike."""
    benchmarks = benchmark_metrics(tasks)
    return {
        "Loss & perplexity": [
            line("Validation loss", ["val/loss"], raw=True),
            line("Training loss", ["train/loss"]),
            line("Bits a byte (validation)", ["val/bits_per_byte"], raw=True),
            line("Perplexity (validation)", ["val/perplexity"], log_y=True, raw=True),
            line("Validation loss by step", ["val/loss"], x="step", raw=True),
            line("Validation loss by wall time", ["val/loss"], x="RelativeTime(Wall)", raw=True),
        ],
        "Benchmarks": [
            wr.BarPlot(title="Benchmarks", metrics=benchmarks, groupby=wr.Config(METHOD), groupby_aggfunc="mean"),
            *(line(key.removeprefix("eval/"), [key], raw=True) for key in benchmarks),
        ],
        "Speed & memory": [
            line("Training tokens a second", ["perf/tokens_per_second"]),
            line("MFU", ["perf/mfu"]),
            line("Peak memory (GB)", ["perf/memory_gb"], raw=True),
            scatter("Validation loss against training speed", "perf/tokens_per_second.mean", "val/loss.min"),
        ],
        "KV cache": [
            scatter("Validation loss against cache", "kv_bytes_per_token", "val/loss.min", log_x=True),
            wr.BarPlot(title="KV-cache bytes a token", metrics=["kv_bytes_per_token"], groupby=wr.Config(METHOD)),
            wr.BarPlot(title="Cache / MHA's", metrics=["attention_kv_bytes_over_mha"], groupby=wr.Config(METHOD)),
            scatter("Validation loss against parameters", "params", "val/loss.min"),
        ],
        "Optimisation": [
            line("Learning rate", ["optim/lr"], raw=True),
            line("Gradient norm", ["optim/grad_norm"], log_y=True),
        ],
        "Health": [
            line("Skipped steps", ["optim/skipped_steps"], raw=True),
            line("Gradient norm, unsmoothed", ["optim/grad_norm"], log_y=True, raw=True),
            wr.MediaBrowser(title="Samples and plots", media_keys=["samples", "plots/loss"]),
        ],
    }


def workspace(config: DashboardConfig, entity: str) -> ws.Workspace:
    """Every training run of the project (of the group, if there is one), grouped by nothing, a section a theme."""
    filters = [ws.Metric("JobType") == "train"] + ([ws.Metric("Group") == config.group] if config.group else [])
    pinned = [f"config:{key}.value" for key in (METHOD, "size/name", "run/seed")] + [
        f"summary:{key}" for key in COLUMNS
    ]
    return ws.Workspace(
        entity=entity,
        project=config.project,
        name=config.name,
        sections=[
            ws.Section(name=name, panels=found, is_open=number < 2, pinned=number == 0)
            for number, (name, found) in enumerate(panels(config.tasks).items())
        ],
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=config.max_runs),
        runset_settings=ws.RunsetSettings(filters=filters, pinned_columns=pinned),
    )


def report(config: DashboardConfig, entity: str) -> wr.Report:
    """The group's runs compared: a line a method (mean over seeds, the spread behind), and what differs in config."""

    def runset() -> wr.Runset:  # of the report's own project
        filters = 'Metric("JobType") == "train"' + (f' and Metric("Group") == "{config.group}"' if config.group else "")
        return wr.Runset(name="methods", filters=filters, groupby=[f"config.{METHOD}"])

    blocks: list = [
        wr.H1(config.name),
        wr.P(
            f"Runs of {f'the group {config.group}' if config.group else 'the project'}, a line a method: the mean over "
            "seeds, the standard error behind it. Whether they are matched, intervals and paired differences: see the "
            "report of python -m eval.compare."
        ),
        wr.TableOfContents(),
    ]
    for name, found in panels(config.tasks).items():
        for panel in found:
            if isinstance(panel, wr.LinePlot):
                panel.groupby, panel.groupby_aggfunc, panel.groupby_rangefunc = wr.Config(METHOD), "mean", "stderr"
        blocks += [wr.H2(name), wr.PanelGrid(runsets=[runset()], panels=found)]
    blocks += [wr.H2("What differs"), wr.PanelGrid(runsets=[runset()], panels=[wr.RunComparer(diff_only="split")])]
    title = f"{config.name}: {config.group}" if config.group else config.name
    return wr.Report(entity=entity, project=config.project, title=title, blocks=blocks, width="fluid")


def parse(arguments: list[str]) -> DashboardConfig:
    wrong = [argument for argument in arguments if "=" not in argument]
    if wrong:
        raise ConfigError(*(f"{argument}: must be key=value, as in project=t6" for argument in wrong))
    try:
        tree = OmegaConf.from_dotlist(arguments)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    return load_flat(tree, DashboardConfig)


def main(config: DashboardConfig) -> int:
    if config.dry_run:
        entity = config.entity or "ENTITY"
        view, written = workspace(config, entity)._to_model(), report(config, entity)._to_model()
        shown = {"workspace": view.spec, "report": written.spec}
        print(json.dumps({k: v.model_dump(by_alias=True, exclude_none=True) for k, v in shown.items()}, indent=2))
        return 0
    import wandb

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
    command(lambda arguments: main(parse(arguments)), __doc__)
