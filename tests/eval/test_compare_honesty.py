"""What a comparison must not get wrong without a word: points, conditions, units, and what others put into a folder."""

import json
import re
import shutil

import pytest

import train
from configs.app import as_yaml, configured
from configs.block import to_dict
from configs.errors import ConfigError
from eval.benchmarks import HarnessSuite
from eval.compare import tables
from eval.compare.__main__ import choose, gather, main, parse
from eval.compare.benchmarks import evaluations
from eval.compare.collect import name_methods, read_run
from eval.compare.fairness import check, verdict
from eval.compare.report import page
from eval.config import question
from eval.units import in_unit, labelled
from tests.conftest import SMALL_RUN
from tests.eval.helpers import evaluation
from training.config import Config


@pytest.fixture(scope="module")
def run(small_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("honest") / "mha"
    overrides = [*SMALL_RUN, *small_data, "model=mha", "trainer.samples=0", "trainer.max_steps=4", f"run.dir={folder}"]
    assert train.main(configured(Config, overrides)) == 0
    return folder


@pytest.fixture
def other(run, small_data, tmp_path):
    """Return a maker of run folders with other keys and the same data, and with losses of its own."""

    def make(name: str, *overrides: str, every: int = 4, last: int = 4, loss: float = 5.0):
        folder = tmp_path / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("wandb", "results"))
        config = configured(Config, [*SMALL_RUN, *small_data, "model=mha", f"run.dir={folder}", *overrides])
        (folder / "config.yaml").write_text(as_yaml(to_dict(config)))
        lines = [
            {"step": step, "tokens": 512 * step, "val/loss": loss - 0.01 * step, "train/loss": 5.0}
            for step in range(every, last + 1, every)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return make


def results_of(*folders) -> tuple[tables.Table, tables.Question]:
    methods = name_methods([read_run(folder) for folder in folders])
    question = choose(parse(["x"]), methods, check(methods, 0.05))
    return tables.final(methods, question), question


def test_losses_are_subtracted_at_the_same_number_of_tokens(other):
    """One was evaluated every 7 steps and still trains, the other every 10, and none of these meet."""
    young = other("young", "model=t6", "trainer.max_steps=100", every=7, last=63, loss=5.0)
    old = other("old", "trainer.max_steps=100", every=10, last=60, loss=5.0)
    table, question = results_of(old, young)
    assert question.tokens == 60 * 512 and question.between
    assert float(table.rows[1][-1]) == 0  # both lie on one line: the young run's is read off between steps 56 and 63
    assert "on straight lines between each run's evaluations" in table.notes[0]
    table, question = results_of(old, other("even", "model=t6", "trainer.max_steps=100", every=5, last=60))
    assert not question.between and "straight" not in table.notes[0]


def test_nothing_is_made_up_before_the_first_evaluation_or_after_the_last(other):
    early = other("early", "model=t6", every=2, last=2)
    late = other("late", every=50, last=50)
    table, question = results_of(late, early)
    assert question.tokens == 2 * 512 and all(row[-1] == tables.DASH for row in table.rows)


def test_weights_to_start_from_and_precision_are_part_of_what_is_compared(other):
    plain, pretrained = other("plain"), other("pretrained", "trainer.init_from=runs/before")
    methods = name_methods([read_run(plain), read_run(pretrained)])
    assert [method.name for method in methods] == ["mha", "mha trainer.init_from=runs/before"]
    words, reasons = verdict(check(methods, 0.05), methods)
    assert words.startswith("Not a fair comparison") and "starting weights" in words
    assert any("random" in reason and "runs/before" in reason for reason in reasons)
    half = other("half", "model=t6", "trainer.dtype=bf16")
    (half / "events.jsonl").write_text(json.dumps({"event": "start", "step": 0, "dtype": "bfloat16"}) + "\n")
    methods = name_methods([read_run(plain), read_run(half)])
    assert "precision" in verdict(check(methods, 0.05), methods)[0]
    assert methods[0].first.precision == "float32"  # which the run itself wrote when it started
    assert any(row[0] == "`precision`" for row in tables.differences(methods).rows)


def test_each_result_has_its_unit(other):
    assert in_unit("arc_easy/acc_norm", 0.5126) == "51.26" and in_unit("none/256/loss", 6.58561) == "6.5856"
    assert in_unit("wikitext/word_perplexity", 27382375.69) == "27,382,375.69"
    assert in_unit("tokens", 10240.0) == "10,240"
    assert labelled("a/acc_norm") == "acc norm (%)" and labelled("a/bits_per_byte") == "bits per byte"
    folder = other("run")
    (folder / "results").mkdir()
    metrics = {"wikitext": "word_perplexity", "piqa": "acc"}
    record = {"suite": "harness", "metrics": metrics, "results": {"wikitext/word_perplexity": 658.5, "piqa/acc": 0.5}}
    (folder / "results/harness_tasks=x.json").write_text(json.dumps(record))
    (folder / "results/perplexity.json").write_text(json.dumps({"results": {"loss": 6.5, "tokens": 10240}}))
    found = evaluations(name_methods([read_run(folder)]), 0.95)
    table = found["Benchmarks: harness_tasks=x"]
    assert table.columns[2:] == ["wikitext word perplexity", "piqa acc (%)"]
    assert table.rows[0][2:] == ["658.50", "50.00"]
    assert not table.notes[0].startswith("Percent")
    assert found["Evaluation: perplexity"].columns[1:] == ["loss (nats/token)", "tokens"]
    assert found["Evaluation: perplexity"].rows[0][1:] == ["6.5000", "10,240"]


def test_the_papers_two_shot_averages_stand_next_to_ours(other):
    folder = other("run")
    (folder / "results").mkdir()
    suite = evaluation("run=x", "suite=paper_twoshot").suite
    scores = {f"{task}/{metric}": 0.5 for task, metric in suite.metrics.items()} | {"average": 0.5}
    record = {"suite": "paper_twoshot", "metrics": suite.metrics, "results": scores}
    (folder / "results/paper_twoshot.json").write_text(json.dumps(record))
    table = evaluations(name_methods([read_run(folder)]), 0.95)["Benchmarks: paper_twoshot"]
    assert [row[-1] for row in table.rows] == ["50.00", "48.11", "47.93"] and table.rows[1][2:-1] == ["-"] * 9


def test_every_question_has_a_file_of_its_own():
    names = {
        "": ["suite=paper_zeroshot", "suite.data_dir=/somewhere", "suite.samples=true"],
        "_limit=500": ["suite=paper_zeroshot", "limit=500"],
        "_tasks=arc_easy+piqa": ["suite=paper_zeroshot", "suite.tasks=[arc_easy,piqa]"],
        "_seq_len=2048_stride=512": ["suite=perplexity", "suite.seq_len=2048", "suite.stride=512"],
    }
    for name, overrides in names.items():
        assert question(evaluation("run=x", *overrides)) == name
    long = question(evaluation("run=x", "suite=harness", f"suite.tasks=[{','.join(f'task_{n}' for n in range(40))}]"))
    assert re.fullmatch("_[0-9a-f]{8}", long)
    paths = [
        question(evaluation("run=x", "suite=perplexity", f"suite.files=[{path}]")) for path in ("a/b", "a-b", "a b")
    ]
    assert len(set(paths)) == 3 and paths[1] == "_files=a-b"
    suite = HarnessSuite(name="mine", tasks=["piqa"])  # of no YAML
    assert question(evaluation("run=x", "suite=perplexity").replace(suite=suite)) == "_tasks=piqa"


def test_a_run_that_cannot_be_read_is_left_out_and_named(other, tmp_path, capsys):
    other("good")
    bad = other("bad[1]")
    (bad / "config.yaml").write_text("{")
    lines = [{"step": "x"}, {"step": 4, "tokens": 4, "val/loss": "high", "text": {"a": 1}}, {"tokens": 1}]
    with open(tmp_path / "good/metrics.jsonl", "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "good/results").mkdir()
    (tmp_path / "good/results/decoding.jsonl").write_text('{"model": "mha"}\n')
    assert main(parse([str(tmp_path), f"out={tmp_path}/out"]), "") == 0
    shown, report = capsys.readouterr().out, (tmp_path / "out/report.md").read_text()
    for text in (shown, report):
        assert re.search(r"left out: .*bad\[1\]/config.yaml: cannot be read as YAML", text)
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        gather(parse([str(bad)]))


def test_a_report_runs_and_embeds_nothing_but_its_own_plots(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"plot")
    (tmp_path / "secret.png").write_bytes(b"secret")
    text = "# <script>1</script>\n\n![x](loss.png) ![x](secret.png) ![x](pareto.png) ![x](https://e.org/x.jpg)\n\n"
    text += "<img src=x onerror=alert(1)> [a](javascript:alert(1))\n\n| a |\n|---|\n| <b>x</b> |\n"
    shown = page(text, tmp_path)
    assert shown.count("<img") == 4 and shown.count("base64,cGxvdA==") == 1 and "c2VjcmV0" not in shown
    assert "<script" not in shown and "<b>" not in shown and "e.org" not in shown and 'href="javascript' not in shown
    assert "onerror" in shown and "&lt;img" in shown  # as text


def test_a_cell_stays_in_its_line():
    assert str(tables.Table(["a\nb"], [["x\n\ny|z"]])).splitlines()[-1] == "| x y\\|z |"
