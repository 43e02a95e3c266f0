"""The dashboards are built of wandb-workspaces' own objects and validated by its models, without a network."""

import json

import pytest
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from configs.app import configured
from configs.errors import ConfigError
from eval.dashboard import DashboardConfig, main, panels, report, workspace
from eval.published import tasks

SECTIONS = ["Loss & perplexity", "Benchmarks", "Speed & memory", "KV cache", "Optimisation", "What differs"]


def test_the_workspace_survives_the_library_and_back():
    view = workspace(DashboardConfig(project="t6", group="night"), "me")._to_model()
    text = view.spec.model_dump_json(by_alias=True, exclude_none=True)  # what `save` sends
    again = ws.Workspace._from_model(type(view).model_validate(view.model_dump() | {"spec": view.spec}))
    assert [section.name for section in again.sections] == SECTIONS
    assert all(section.panels for section in again.sections) and again.settings.x_axis == "tokens"
    loss = again.sections[0].panels[0]
    assert isinstance(loss, wr.LinePlot) and loss.x.name == "tokens" and [y.name for y in loss.y] == ["val/loss"]
    filters = json.loads(text)["section"]["runSets"][0]["filters"]["filters"]
    assert {f["key"]["name"]: f["value"] for f in filters} == {"jobType": "train", "group": "night"}
    assert "config:model/name.value" in text and "summary:val/loss.min" in text


def test_the_report_has_the_panels_of_the_workspace():
    made = report(DashboardConfig(project="t6", group="night"), "me")._to_model()
    again = wr.Report._from_model(type(made).model_validate(made.model_dump() | {"spec": made.spec}))
    assert [block.text for block in again.blocks if isinstance(block, wr.H1)] == SECTIONS
    grids = [block for block in again.blocks if isinstance(block, wr.PanelGrid)]
    assert [len(grid.panels) for grid in grids] == [len(found) for found in panels().values()]
    assert all("night" in grid.runsets[0].filters for grid in grids)


def test_a_line_is_the_mean_of_a_method():
    lines = [panel for found in panels().values() for panel in found if isinstance(panel, wr.LinePlot)]
    again = ws.Workspace._from_model(workspace(DashboardConfig(project="t6"), "me")._to_model())
    kept = [panel for section in again.sections for panel in section.panels if isinstance(panel, wr.LinePlot)]
    assert len(kept) == len(lines) and {plot.groupby_rangefunc for plot in kept} == {"stderr"}
    assert all("model/name" in str(plot.groupby) for plot in kept)


def test_the_panels_show_metrics_that_runs_log():
    shown = {key for found in panels().values() for panel in found if isinstance(panel, wr.LinePlot) for key in panel.y}
    assert {"val/loss", "optim/grad_norm", "optim/skipped_steps", "perf/mfu"} <= shown
    paper = {f"eval/{task}/{metric}" for task, metric in tasks("paper_zeroshot").items()}
    assert paper | {"eval/paper_zeroshot/average"} < shown


def test_it_can_be_printed_and_bad_input_is_named(capsys, monkeypatch, tmp_path):
    assert main(configured(DashboardConfig, ["project=t6", "dry_run=true"])) == 0
    assert json.loads(capsys.readouterr().out)["workspace"]["section"]["panelBankConfig"]
    for arguments, message in (
        ([], "project is not set"),
        (["project=t6", "grup=x"], "did you mean group"),
        (["project=me/t6"], "none of them /"),
    ):
        with pytest.raises(ConfigError, match=message):
            configured(DashboardConfig, arguments)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="needs a network and `wandb login`"):
        main(configured(DashboardConfig, ["project=t6", "entity=me"]))
