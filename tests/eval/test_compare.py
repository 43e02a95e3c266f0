"""Runs side by side: real runs of two mechanisms and two seeds, and what the report says of them."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.colors import to_hex
from scipy import stats

import train
from configs.app import configured
from configs.errors import ConfigError
from eval.compare import gate, plots, tables
from eval.compare.__main__ import choose, main, parse
from eval.compare.collect import label, name_methods, read_run, run_folders
from eval.compare.fairness import check, verdict
from eval.compare.from_wandb import write_folder
from eval.compare.statistics import difference, estimate, pareto, reaches, smooth
from eval.results import Outcome
from tests.conftest import SMALL_RUN
from tests.training.wandb_server import wandb_server
from training.config import Config
from training.jsonl import read_lines
from training.plots import colour_of

TINY = [*SMALL_RUN, "trainer.samples=0", "trainer.eval_batches=1"]


@pytest.fixture(scope="module")
def sweep(small_data, tmp_path_factory):
    """A folder of four runs: MHA and T6, seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("sweep")
    for model in ("mha", "t6"):
        for seed in (0, 1):
            overrides = [*TINY, *small_data, f"model={model}", f"run.seed={seed}", f"run.dir={folder}/{model}_{seed}"]
            overrides += ["wandb.mode=offline"] if (model, seed) == ("mha", 0) else []
            assert train.main(configured(Config, overrides)) == 0
    return folder


def copy(run, to, **config) -> None:
    """The run folder with other values in its config.yaml and without its checkpoints."""
    shutil.copytree(run, to, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    text = (to / "config.yaml").read_text()
    for key, (old, new) in config.items():
        assert f"{key}: {old}\n" in text
        text = text.replace(f"{key}: {old}\n", f"{key}: {new}\n")
    (to / "config.yaml").write_text(text)


def compared(*arguments) -> str:
    config = parse([str(argument) for argument in arguments])
    assert main(config, "the command") == 0
    out = Path(config.out or Path(config.runs[0], "compare"))
    return without_padding((out / "report.md").read_text())


def without_padding(text: str) -> str:
    """Return Markdown whose tables have one space around each cell."""
    return re.sub(r" +\|", " |", re.sub(r"\| +", "| ", text))


def test_a_sweep_becomes_a_report_with_plots(sweep, capsys):
    text = compared(sweep)
    out = sweep / "compare"
    assert text.splitlines()[2].startswith(
        "> **Matched in parameters, training FLOPs per token, tokens trained, horizon,"
    )
    plots = ("loss.png", "pareto.png")
    assert all((out / name).stat().st_size > 10_000 and f"({name})" in text for name in plots)
    page = (out / "report.html").read_text()
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == len(plots)
    assert page.count("<table>") == text.count("\n| ---") and "| ---" not in page
    assert "<blockquote>" in page
    assert "Matched in" in capsys.readouterr().out


def test_the_final_table_is_that_of_the_runs(sweep):
    methods = name_methods([read_run(folder) for folder in run_folders(str(sweep))])
    assert [(method.name, method.seeds) for method in methods] == [("mha", [0, 1]), ("t6", [0, 1])]
    question = choose(parse([str(sweep)]), methods, check(methods, 0.05))
    assert question.baseline.name == "mha" and question.tokens == 8 * 512
    last = {(m, s): read_lines(sweep / f"{m}_{s}/metrics.jsonl")[-1]["val/loss"] for m in ("mha", "t6") for s in (0, 1)}
    assert question.comparable
    row = tables.final(methods, question).rows[1]
    gaps = [last["t6", s] - last["mha", s] for s in (0, 1)]
    low, high = stats.t.interval(0.95, 1, loc=sum(gaps) / 2, scale=stats.sem(gaps))
    assert row[-1] == f"{sum(gaps) / 2:+.4f} ± {(high - low) / 2:.4f}" and row[1] == "2"
    assert tables.health(methods).rows[0][3:8] == ["finished", "0", "0", "0", "0"]


def first_lines(text: str) -> str:
    return "\n".join(text.splitlines()[:8])


def test_an_unfair_pair_is_called_unfair_in_the_first_lines(sweep, tmp_path):
    seeds = compared(sweep / "mha_0", sweep / "t6_1", f"out={tmp_path}/seeds")
    assert "Not a fair comparison" in first_lines(seeds) and "seeds: mha: 0; t6: 1" in first_lines(seeds)
    copy(sweep / "t6_0", tmp_path / "wide", d_ff=(170, 300))
    wide = compared(sweep / "mha_0", tmp_path / "wide", f"out={tmp_path}/parameters")
    assert "Not a fair comparison" in first_lines(wide) and "parameters: mha: " in first_lines(wide)
    assert "> - " in wide and "horizon" not in first_lines(wide)


def test_losses_of_different_data_are_not_subtracted(sweep, tmp_path):
    copy(sweep / "t6_0", tmp_path / "other")
    shutil.copytree(sweep / "t6_0/checkpoints", tmp_path / "other/checkpoints")
    for path in (tmp_path / "other/checkpoints").glob("*/manifest.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"data_fingerprint": "0" * 64}))
    text = compared(sweep / "mha_0", tmp_path / "other", f"out={tmp_path}/out")
    assert "Not a fair comparison" in first_lines(text) and "data: " in first_lines(text)
    methods = name_methods([read_run(sweep / "mha_0"), read_run(tmp_path / "other")])
    fairness = check(methods, 0.05)
    question = choose(parse(["x"]), methods, fairness)
    assert not question.comparable
    assert all(row[-1] == tables.DASH for row in tables.final(methods, question).rows)
    assert "## What it takes to get there" not in text


def test_a_run_that_still_trains_is_compared_at_the_tokens_that_all_have(sweep, tmp_path):
    copy(sweep / "t6_0", tmp_path / "young")
    (tmp_path / "young/summary.json").unlink()
    lines = (tmp_path / "young/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "young/metrics.jsonl").write_text("".join(lines[:5]) + lines[5][:20])  # and a line is being written
    text = compared(sweep / "mha_0", tmp_path / "young", f"out={tmp_path}/out")
    assert "At 2,048 tokens" in text and "tokens trained: mha: 4,096; t6: 2,560" in first_lines(text)
    assert "step 5 of 8" in text
    (tmp_path / "young/metrics.jsonl").write_text("")  # and one that has just begun
    text = compared(sweep / "mha_0", tmp_path / "young", f"out={tmp_path}/out")
    assert "| t6 | 1 | - | - | - | - | - |" in text


def test_events_benchmarks_and_decoding_are_shown_where_they_are(sweep, tmp_path):
    copy(sweep / "t6_0", tmp_path / "run")
    events = [{"event": "start", "step": 0, "dtype": "float32"}, {"event": "rollback", "step": 4, "to_step": 2},
              {"event": "start", "step": 4, "dtype": "float32"}]  # fmt: skip
    (tmp_path / "run/events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (tmp_path / "run/results").mkdir()
    results = {"arc_easy/acc_norm": 0.5126, "mmlu/acc": 0.25, "average": 0.38}
    record = {"run": "x", "suite": "paper_zeroshot", "step": 8, "tokens": 4096, "limit": 200, "results": results,
              "stderr": {"arc_easy/acc_norm": 0.0103}}  # fmt: skip
    (tmp_path / "run/results/paper_zeroshot.json").write_text(json.dumps(record))
    perplexity = record | {"suite": "perplexity", "results": {"loss": 5.0, "perplexity": math.exp(5)}, "stderr": {}}
    (tmp_path / "run/results/perplexity.json").write_text(json.dumps(perplexity))
    points = [
        {"model": "t6", "scope": "model", "batch": 1, "length": n, "device": "cpu", "tokens_per_second": 900.0 / n}
        for n in (1, 9)
    ]
    points.append(points[0] | {"scope": "attention", "length": 99})  # of one layer: not the model's speed
    (tmp_path / "run/results/decoding.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
    text = compared(tmp_path / "run", sweep / "mha_0", f"out={tmp_path}/out")
    assert "| t6 | 132k | 51.26 ± 1.03 | - |" in text and "Only the first 200 questions of each task" in text
    assert "| published: TPA | 124M | 51.26 | 27.39 |" in text and "| mha | 131k | - | - |" in text
    assert "## Evaluation: perplexity" in text and "148.41" in text
    row = next(line for line in text.splitlines() if line.startswith("| run | t6 | 0 | finished"))
    assert row.split(" | ")[5:8] == ["1", "1", "0"]  # one restart, one rollback
    assert "Decoding: model, batch 1 at 9 tokens on cpu" in text and text.count("| 100 |") == 1
    assert "excludes zero" not in text  # with one seed there is no interval
    text = compared(tmp_path / "run", sweep / "t6_1", f"out={tmp_path}/out")
    assert "Not every seed has been evaluated: t6 (1 of 2)" in text


def test_runs_of_wandb_are_compared_as_folders_are(sweep, tmp_path):
    """From what `wandb sync` sends to a server."""
    run = sweep / "mha_0"
    with wandb_server() as server:
        environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "0" * 40}
        paths = [str(path) for path in run.glob("wandb/offline-run-*")]
        subprocess.run([sys.executable, "-m", "wandb", "sync", *paths], env=environment, check=True, timeout=120)
    ((_, sent),) = server.items()
    config = {key: item["value"] for key, item in sent["config"].items()}
    folder = write_folder(tmp_path / "fetched", config, sent["history"], sent["summary"])
    assert read_lines(folder / "metrics.jsonl") == read_lines(run / "metrics.jsonl")
    assert read_run(folder).config == read_run(run).config and read_run(folder).finished
    methods = name_methods([read_run(folder), read_run(sweep / "t6_0")])
    words, _ = verdict(check(methods, 0.05), methods)
    assert "not matched" not in words


def test_the_gate_fails_where_a_run_is_worse(sweep, tmp_path, capsys):
    run, reference = str(sweep / "mha_0"), tmp_path / "reference.json"
    assert main(parse([run, f"reference={reference}", "update=true"]), "") == 0
    assert main(parse([run, f"reference={reference}"]), "") == 0
    assert main(parse([run, f"reference={sweep}/mha_0/summary.json"]), "") == 0  # any run's summary will do
    content = json.loads(reference.read_text())
    content["metrics"]["val/loss"] *= 0.98
    content["metrics"]["perf/tokens_per_second"] *= 100  # shown, not judged
    reference.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(parse([run, f"reference={reference}"]), "") == 1
    assert "Worse than" in (shown := capsys.readouterr().out) and shown.rstrip().endswith(": val/loss")
    assert main(parse([run, f"reference={reference}", "tolerance=0.03"]), "") == 0
    assert main(parse([run, f"reference={reference}", "metrics=[perf/tokens_per_second]"]), "") == 1
    content["metrics"]["eval/hellaswag/acc_norm"] = 0.3
    reference.write_text(json.dumps(content))
    assert main(parse([run, f"reference={reference}", "tolerance=0.03"]), "") == 1  # it has no such result
    with pytest.raises(ConfigError, match="val/lss is not in the reference"):
        main(parse([run, f"reference={reference}", "metrics=[val/lss]"]), "")
    reference.write_text(json.dumps(content | {"data": "0" * 64}))
    with pytest.raises(ConfigError, match="was trained on other data"):
        main(parse([run, f"reference={reference}"]), "")


def test_results_have_the_names_that_they_are_logged_by():
    outcomes = {
        "long_context": Outcome({"none/256/loss": 1.0}),
        "paper_zeroshot": Outcome({"average": 0.4, "piqa/acc": 0.5}, tasks={"piqa": "piqa"}),
    }
    logged = {name: value for suite, outcome in outcomes.items() for name, value in outcome.metrics(suite).items()}
    results = {suite: {"results": outcome.results} for suite, outcome in outcomes.items()}
    assert gate.metrics_of(SimpleNamespace(lines=[], results=results)) == logged


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no runs given"),
        (["nowhere"], "nowhere: there is no such folder"),
        (["{sweep}/mha_0/results"], "is neither a run folder"),
        (["{sweep}", "tolerence=1"], "did you mean tolerance"),
        (["{sweep}", "confidence=2"], "confidence=2: must be less than 1"),
        (["{sweep}", "--out=x"], "options are key=value"),
        (["{sweep}", "baseline=gpt"], "baseline=gpt: no such method; there are mha, t6"),
        (["{sweep}", "metric=val/lss"], "no run has logged it"),
        (["{sweep}", "reference=x.json"], "judges one run, and 4 are given"),
        (["{sweep}/mha_0", "reference=x.json"], "there is no such file; update=true writes it"),
        (["{sweep}/mha_0", "update=true"], "update: only goes with reference=FILE"),
        (["{sweep}", "out={sweep}/mha_0/config.yaml/x"], "config.yaml/x: cannot write"),
    ],
)
def test_bad_input_is_one_clear_message(sweep, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (sweep / "mha_0/results").mkdir(exist_ok=True)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        main(parse([argument.format(sweep=sweep) for argument in arguments]), "")
    assert list(tmp_path.iterdir()) == []


def test_intervals_are_students(sweep):
    values = [3.1, 3.4, 3.2, 3.3]
    low, high = stats.t.interval(0.95, 3, loc=3.25, scale=stats.sem(values))
    found = estimate(values, 0.95)
    assert found.mean == pytest.approx(3.25) and (found.low, found.high) == pytest.approx((low, high))
    assert estimate([3.0], 0.95).half is None and estimate([], 0.95) is None
    ours, theirs = {0: 1.0, 1: 2.0, 2: 3.0}, {0: 1.1, 1: 2.2, 2: 3.0}
    paired = stats.ttest_rel(list(ours.values()), list(theirs.values())).confidence_interval(0.9)
    found = difference(ours, theirs, 0.9)
    assert found.paired and (found.low, found.high) == pytest.approx((paired.low, paired.high))
    welch = stats.ttest_ind(list(ours.values()), [5.0, 6.5], equal_var=False).confidence_interval(0.9)
    found = difference(ours, {7: 5.0, 8: 6.5}, 0.9)
    assert not found.paired and found.is_clear == (welch.high < 0)
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    assert difference(ours, {}, 0.9) is None


def test_a_mechanism_has_its_colour_and_its_variants_have_shades_of_it():
    methods = [SimpleNamespace(mechanism=name) for name in ("mha", "t6", "t6", "t6")]
    styles = plots.styles(methods)
    assert [to_hex(style["color"]).upper() for style in styles[:2]] == [colour_of("mha"), colour_of("t6")]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 4
    assert [style["linestyle"] for style in styles] == ["-", "-", "--", "-."]


def test_methods_are_named_by_what_tells_them_apart():
    plain = {"model.name": "t6", "model.q_rank": 6, "size.name": "tiny", "size.d_model": 256, "core.name": "full",
             "core._target_": "a.Full", "data.name": "files", "data.files": "a", "run.seed": 0}  # fmt: skip
    others = [{"core.name": "sliding_window", "core._target_": "a.Window"}, {"size.name": "small", "size.d_model": 768},
              {"data.files": "b"}, {"model.name": "mha"}]  # fmt: skip
    everyone = [plain, *(plain | changes for changes in others)]
    assert label(plain, everyone[:2]) == "t6 core.name=full"
    assert label(everyone[2], [plain, everyone[2]]) == "t6 small"
    assert label(everyone[3], [plain, everyone[3]]) == "t6 data.files=b"
    assert label(everyone[4], everyone) == "mha"


def test_small_helpers():
    assert [tables.count(value) for value in (2.62e6, 999_999, 999_499, 12.3)] == ["2.62M", "1M", "999k", "12.3"]
    assert reaches([(0, 4.0), (10, 3.0), (20, 2.0)], 2.5) == 15 and reaches([(0, 4.0)], 2.5) is None
    assert smooth([0.0, 3.0, 6.0, 3.0, 0.0], 0.4) == [0.0, 3.0, 4.0, 3.0, 0.0]
    assert smooth([1.0, 2.0], 0) == [1.0, 2.0]
    assert pareto({"a": (1, 3), "b": (2, 2), "c": (2, 3), "d": (3, 2.5)}) == ["a", "b"]
